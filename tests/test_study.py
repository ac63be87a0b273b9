"""``python -m fusedrnn study``: what it prints is what the compiler left, read in another way."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fusedrnn.kernels.assembly import (
    count_kinds,
    dialect_of,
    longest_loop,
    read_assembly,
    tensor_names,
)
from fusedrnn.kernels.occupancy import occupancy
from fusedrnn.kernels.plan import CHIPS
from fusedrnn.study import copies_of

ROOT = Path(__file__).parents[1]

#: A loop that polls (.L_x_2) inside the loop over T (.L_x_1), a jump ahead, and one loop more.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_4) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDSM.16.M88.4 R8, [R4] ;
.L_x_2:
        /*0040*/                   LD.E.STRONG.GPU R0, desc[UR4][R2.64] ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R8, R12, RZ ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   FFMA.FTZ R5, R5, R6, R7 ;
        /*0090*/                   STS.128 [R4], R8 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00c0*/             @!UP0 BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   ATOM.E.ADD.STRONG.GPU PT, R0, desc[UR4][R2.64], R1 ;
        /*00e0*/                   MEMBAR.SC.GPU ;
.L_x_5:
        /*00f0*/                   SHFL.BFLY PT, R0, R1, 0x1, 0x1f ;
        /*0100*/               @P2 BRA `(.L_x_5) ;
        /*0110*/                   STL [R1], R0 ;
        /*0120*/                   EXIT ;
"""
AMDGCN = """
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
\ts_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; %for
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tds_read_b128 v[4:7], v8
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[4:5], a[0:3]
\tv_exp_f32_e32 v9, v9
\ts_barrier
\ts_cbranch_scc0 .LBB0_1
; %bb.2:
\tscratch_store_dword off, v0, s32
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
\t.section .rodata
\tv_mfma_that_is_data
"""


def test_the_loop_over_time_is_the_longest_one():
    """Not the loop that polls inside it, nor a shorter one behind it, nor a jump ahead."""
    loop = longest_loop(read_assembly(SASS))
    assert [i.name for i in loop[:2]] == ["LDG.E.128", "LDSM.16.M88.4"]
    assert loop[-1].operands == "`(.L_x_1)"
    assert len(loop) == 11
    loop = longest_loop(read_assembly(AMDGCN))
    assert (loop[0].name, loop[-1].name) == ("global_load_dwordx4", "s_cbranch_scc0")
    assert len(loop) == 6


def test_without_a_loop_there_is_none():
    assert longest_loop(read_assembly("/*0000*/ MOV R1, R2 ;\n/*0010*/ EXIT ;")) == ()


def test_every_instruction_has_its_kind():
    every = read_assembly(SASS)
    counts = count_kinds(every, dialect_of(SASS))
    once = "tensor core,MUFU,shared load,shared store,global store,global atomic,barrier,fence"
    for kind in (*once.split(","), "shuffle", "spill", "FMA unit"):
        assert counts.pop(kind) == 1, kind
    # MOV, EXIT and four branches.
    assert counts == {"global load": 2, "other": 6, "total": 19}
    assert tensor_names(every, "sass") == {"HMMA.16816.F32.BF16": 1}
    counts = count_kinds(read_assembly(AMDGCN), dialect_of(AMDGCN))
    for kind in ("tensor core", "MUFU", "shared load", "global load", "barrier", "spill"):
        assert counts[kind] == 1, kind
    assert (counts["other"], counts["total"]) == (4, 10)


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "programs", "limit"),
    [
        # 255 registers: 32 * 255 up to 8192 a warp, 8 warps an SM; 2 programs of 4.
        ("sm_90", 255, 0, 4, 2, "registers"),
        # 128 registers: 4096 a warp, 16 warps.
        ("sm_90", 128, 0, 4, 4, "registers"),
        # 129: up to 136, 4352 a warp, 15.06 warps, of which whole fours: 12.
        ("sm_90", 129, 0, 2, 6, "registers"),
        # 228 KiB an SM; 1 KiB more than each program asks for: 3 of 76 KiB and no more.
        ("sm_90", 32, 75 * 1024, 4, 3, "shared memory"),
        ("sm_90", 32, 75 * 1024 + 1, 4, 2, "shared memory"),
        # The most that one program may have.
        ("sm_90", 32, 227 * 1024, 8, 1, "shared memory"),
        # sm_80 has 164 KiB.
        ("sm_80", 32, 40 * 1024, 4, 4, "shared memory"),
        # 64 warps an SM.
        ("sm_90", 32, 0, 8, 8, "registers and threads"),
        ("sm_90", 16, 0, 16, 4, "threads"),
        # gfx942: 512 registers a lane, 128 of them each: 4 waves on each of 4 SIMDs.
        ("gfx942", 128, 0, 4, 4, "registers"),
        ("gfx942", 129, 0, 4, 3, "registers"),
        ("gfx942", 64, 16 * 1024, 4, 4, "shared memory"),
    ],
)
def test_occupancy_by_hand(chip, registers, shared, warps, programs, limit):
    found = occupancy(CHIPS[chip], registers, shared, warps)
    assert (found.programs, found.limit) == (programs, limit)


def study(folder, *options, interpret=None, triton_dir=""):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, (triton_dir, str(ROOT))))} | (
        {} if interpret is None else {"TRITON_INTERPRET": interpret}
    )
    command = [sys.executable, "-m", "fusedrnn", "study", *options, "--out", str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def table(report, heading):
    """The lines of a numbered paragraph by their first word, the numbers in them."""
    part = next(p for p in report.split("\n\n") if p.startswith(heading))
    lines = [line.split() for line in part.splitlines()[1:]]
    # The first of a name: notes follow the table.
    lines = {words[0]: words[1:] for words in reversed(lines) if words}
    return {name: [w for w in words if re.fullmatch(r"[\d.]+", w)] for name, words in lines.items()}


CASES = {
    "resident": ("--hidden", "64"),
    "cooperative": ("--hidden", "512", "--cell", "gru"),
    "stepwise": ("--hidden", "96", "--dtype", "fp64"),
    "amd": ("--hidden", "64", "--dtype", "fp16", "--arch", "gfx942", "--bidirectional"),
    "several": ("--hidden", "128", "--input", "32", "--layers", "3", "--arch", "sm_80"),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The report and the folder of a case; each is studied once."""

    @cache
    def of(case):
        folder = tmp_path_factory.mktemp(case)
        done = study(folder, *CASES[case])
        assert done.returncode == 0, done.stderr
        return done.stdout, folder

    return of


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize("case", CASES)
def test_a_report(case, reports):
    """Registers against the disassembly, and every file there."""
    report, folder = reports(case)
    schedule = {"amd": "resident", "several": "cooperative"}.get(case, case)
    assert f"{schedule}: " in report.partition("why not")[0]
    files = {path.name for path in folder.iterdir()}
    last = ("amdgcn", "hsaco") if case == "amd" else ("ptx", "sass", "cubin")
    kernels = {name.partition(".")[0] for name in files}
    assert files == {f"{k}.{s}" for k in kernels for s in ("ttir", "ttgir", "llir", *last)}
    assert all((folder / name).stat().st_size > 500 for name in files)
    assert all(name in report for name in files)

    resources = table(report, "2. ")
    for kernel in kernels:
        registers = int(resources[kernel][1])
        text = (folder / f"{kernel}.{'amdgcn' if case == 'amd' else 'sass'}").read_text()
        if case == "amd":  # accumulation registers lie behind the others, from a multiple of 4 on
            accumulators = int(re.search(r"\.agpr_count:\s+(\d+)", text)[1])
            offset = int(re.search(r"\.amdhsa_accum_offset (\d+)", text)[1])
            total = offset + accumulators
            assert total - (0 if accumulators else 3) <= registers <= total
        else:  # the compiler counts two more than it names, and rounds
            named = 1 + max(int(n) for n in re.findall(r"\bR(\d+)\b", text))
            assert named <= registers <= named + 8
        assert resources[kernel][2] == "0", "it spills"


@pytest.mark.xdist_group("study")
def test_shared_memory_and_instructions(reports):
    """What W_hh alone needs, and the tensor core's instructions as they stand in the file."""
    report, folder = reports("resident")
    resources = table(report, "2. ")
    mix = next(p for p in report.split("\n\n") if p.startswith("3. "))
    loop = {line.split()[0]: line.split()[1:] for line in mix.splitlines() if "total" in line}
    assert len(loop["total"]) == 4
    assert int(resources["forward"][3]) >= 64 * 64 * 4 * 2, "W_hh in bf16 is in shared memory"
    assert int(loop["total"][0]) < int(loop["total"][1])
    hmma = (folder / "forward.sass").read_text().count("HMMA.16816")
    assert f"forward: {hmma} HMMA.16816.F32.BF16" in mix


def test_threads_that_compute_one_element_are_counted():
    """256 threads that take 4 and 4 exponentials, of two tiles of 16 x 8."""
    tile = "%i_2 = math.exp %i_1 : tensor<16x8xf32, #ttg.slice<{dim = 0, parent = #mma}>> loc(#l)\n"
    scalar = "%a = math.exp %b : f32\n"
    taken = read_assembly("        /*0070*/  MUFU.EX2 R5, R5 ;\n" * 8)
    reciprocals = read_assembly("        /*0070*/  MUFU.RCP R5, R5 ;\n" * 8)
    assert copies_of(2 * tile + scalar, [*taken, *reciprocals], 256) == 8
    assert copies_of(16 * tile, taken, 256) == 1
    assert copies_of(3 * tile, taken, 256) is None
    assert copies_of(scalar, taken, 256) is None
    assert copies_of(tile, reciprocals, 256) is None


def specials(report):
    """What the third paragraph says of MUFU below its table, by kernel."""
    mix = next(p for p in report.split("\n\n") if p.startswith("3. "))
    lines = [line.strip() for line in mix.splitlines() if "MUFU a thread and step" in line]
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.xdist_group("study")
def test_the_floor_s_activations_stand_beside_those_of_the_binary(reports):
    """After the sum of pieces every one of 8 warps has the whole tile, and computes it."""
    said = specials(reports("cooperative")[0])
    assert said == {
        "forward": "24 MUFU a thread and step, the floor counts 3: each element is computed by 8 "
        "threads"
    }
    said = specials(reports("resident")[0])
    assert set(said) == {"forward", "backward"}
    assert all(
        line.endswith("MUFU a thread and step, as the floor counts") for line in said.values()
    )
    said = specials(reports("amd")[0])
    assert said["forward"].endswith("as the floor counts")
    assert not specials(reports("stepwise")[0]), "exponentials in fp64 are no MUFU"


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    """As in ``study ... | head -1``."""
    command = [sys.executable, "-m", "fusedrnn", "study", "--hidden", "64", "--dtype", "fp64"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as study:  # fmt: skip
        assert study.stdout.readline().startswith("lstm: ")
        study.stdout.close()
        assert study.stderr.read() == ""
    assert study.returncode == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hidden", "64", "--arch", "sm_75"), "invalid choice: 'sm_75'"),
        (("--hidden", "0"), "invalid positive number value: '0'"),
        (("--hidden", "4096", "--schedule", "resident"), "no plan: "),
        (("--hidden", "64", "--dtype", "fp64", "--schedule", "cooperative"), "no plan: "),
        (("--hidden", "99999999"), "no plan: the weights alone are 149,011,609 GiB, and no GPU"),
        (("--hidden", "64", "--layers", "99999999"), "no plan: the weights alone are "),
        (
            ("--hidden", "64", "--batch", "999999999999"),
            "no plan: the inputs and gates of one step",
        ),
    ],
)
def test_what_cannot_be_studied_is_one_sentence(options, message, tmp_path):
    done = study(tmp_path / "new", *options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = study(tmp_path / "file" / "below", "--hidden", "64")
    assert done.returncode == 2
    assert re.fullmatch(r".*below cannot be made: Not a directory\n", done.stderr)


def test_under_the_interpreter_it_says_so(tmp_path):
    done = study(tmp_path, "--hidden", "64", interpret="1")
    assert done.returncode == 2
    assert done.stderr.startswith("TRITON_INTERPRET is set")


def check_publications(ptx):
    """One thread adds behind a barrier; Triton 3.6 and 3.7 do it by an `atom` of unused value."""
    add = (
        r"(.*)\n(?:mov\.[bu]32[^\n]*\n)*@%p\d+ (red|atom)\.global\.gpu\.release\.add\.u32 (%r\d+)?"
    )
    adds = re.findall(add, ptx)
    assert adds, "no publication"
    for before, name, value in adds:
        assert before.startswith("bar.sync")
        assert (name == "atom") == bool(value)
        assert not value or len(re.findall(rf"{value}\b", ptx)) == 2, "set to 0, and overwritten"
    # No counter is touched in another way.
    assert len(re.findall(r"\b(?:atom|red)\.(?!shared)", ptx)) == len(adds)


def check_waits(ptx):
    """Thread 0 polls, tells all through shared memory, and only behind that is anything loaded."""
    polls = ptx.split("ld.global.gpu.acquire.b32")[1:]
    assert polls
    for after in polls:
        assert re.match(r"[^\n]*\n(?:\w[^\n]*\n)?@%p\d+ st\.shared[^\n]*\nbar\.sync", after)
    # What is exchanged is loaded where only a block that polled branches to.
    blocks = re.split(r"\n(\$L__BB\d+_\d+):", ptx)
    texts = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    (behind,) = (label for label, text in texts.items() if "ld.global.cg" in text)
    sources = [text for text in blocks[::2] if re.search(rf"\bbra(\.uni)?\s+\{behind};", text)]
    assert sources
    assert all("ld.global.gpu.acquire" in text for text in sources)
    above = blocks[blocks.index(behind) - 1].rstrip().splitlines()[-1]
    assert above.startswith("bra.uni"), "it is fallen into"
    assert "ld.global.cg" not in blocks[0]


def check_protocol(folder):
    """docs/protocol.md argues about these sequences of instructions, and about no others."""
    for direction in ("forward", "backward"):
        ptx = (folder / f"{direction}.ptx").read_text()
        ptx = re.sub(r"//[^\n]*|\.loc[^\n]*|\$L__tmp\d+:|\s*\n\s*", "\n", ptx)
        ptx = re.sub(r"\n+", "\n", ptx)
        check_publications(ptx)
        check_waits(ptx)
        sass = (folder / f"{direction}.sass").read_text()
        assert re.search(r"MEMBAR\.\w+\.GPU(?s:.{1,400})REDG\.E\.ADD\.STRONG\.GPU", sass)
        assert re.search(r"LDG\.E\.STRONG\.GPU[^\n]*\n[^\n]*CCTL\.IVALL", sass)


@pytest.mark.xdist_group("study")
def test_the_protocol_is_compiled_as_its_proof_has_it(reports):
    check_protocol(reports("cooperative")[1])


@pytest.mark.xdist_group("study")
def test_so_it_is_by_newest_and_oldest_triton(triton_dir, tmp_path):
    done = study(tmp_path, *CASES["cooperative"], triton_dir=triton_dir)
    assert done.returncode == 0, done.stderr
    check_protocol(tmp_path)
