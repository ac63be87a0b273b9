"""Kernels compiled for GPUs that are absent: a subset, and in `make test-all` every plan."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from compile_all import run_script
from compiling import COMPILED_CHIPS, every_job, faults, longest_chain
from compiling import job as one_job

from fusedrnn.kernels.compile import count_kinds
from fusedrnn.kernels.sass import Instruction

NAMES = ("resident_nvidia", "resident", "cooperative")
PARTS = [("sm_90", name) for name in (*NAMES, "stepwise")]
PARTS += [(chip, name) for chip in ("sm_80", "sm_100") for name in ("resident_nvidia", NAMES[-1])]
PARTS += [(chip, "resident_nvidia") for chip in ("sm_86", "sm_89", "sm_120")]
PARTS += [(chip, "cooperative") for chip in ("sm_89", "sm_120")]


@pytest.mark.parametrize(("chip", "schedule"), PARTS)
def test_the_covering_subset(chip, schedule):
    options = "--covering", "--workers", "1", "--chips", chip, "--schedules", schedule
    count, *_ = run_script("compile_all.py", *options).split()
    assert int(count) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("chip", COMPILED_CHIPS)
def test_every_plan(chip):
    assert len(list(every_job(chip))) > 300
    assert " 0 with faults" in run_script("compile_all.py", "--chips", chip)


@pytest.mark.slow
def test_other_tritons(triton_dir):
    version = (Path(triton_dir) / "triton" / "__init__.py").read_text()
    done = run_script("compile_all.py", "--covering", triton_dir=triton_dir)
    assert " 0 with faults" in done
    assert f"'{done.split()[1]}'" in version


def kernel(ttgir="", ptx="", ttir="", **changes):
    """Something like a compiled kernel, of which nothing is right."""
    asm = {"ttgir": ttgir, "ptx": ptx, "ttir": ttir}
    binary = SimpleNamespace(asm=asm, metadata=SimpleNamespace(launch_cooperative_grid=False))
    given = {"spills": 72, "shared_bytes": 10**6, "direction": "forward", "binary": binary}
    return SimpleNamespace(**given | changes)


def test_faults_are_seen():
    job = one_job("lstm", 512)
    narrow = "%5 = tt.addptr %4, %x : tensor<8x!tt.ptr<bf16>>, tensor<8xi32>"
    tiles = SimpleNamespace(**vars(job.plan.forward) | {"block_b": 8})
    ttgir = "tt.load %a cacheModifier = cg\n atomic_rmw add, acquire\n atomic_rmw add, acquire"
    found = faults(job, kernel(ttgir, "ld.global.cg.b16", narrow, tiles=tiles))
    assert [fault.split()[-1] for fault in found] == [
        "spilled", "allowed", "bits", "constant", "instruction", "modelled",
        "wait", "element", "limit", "once",
    ]  # fmt: skip
    assert "no load of exchanged data" in faults(job, kernel("acquire", tiles=tiles))[-3]


def test_the_longest_chain_goes_through_accumulators_and_sums():
    dot = "%{} = tt.dot %a, %b, %{} : tensor<16x32xbf16, #ttg.dot_op<{{opIdx = 0, x}}>> * y\n"
    text = dot.format("c", "zero") + dot.format("d", "c") + dot.format("e", "zero")
    text += "%f = arith.addf %d, %e : tensor<16x8xf32>\n" + dot.format("g", "f")
    assert longest_chain(text, 16) == 6
    assert longest_chain(dot.format("h", "zero"), 8) == 4


def test_counts_of_kinds():
    names = ["LDG.E.128", "LD.E.STRONG", "BRA", "HMMA.16816", "MUFU.EX2", "FFMA", "BRA"]
    counts = count_kinds([Instruction(i, name) for i, name in enumerate(names)])
    assert {kind: n for kind, n in counts.items() if n} == {
        "tensor core": 1, "MUFU": 1, "global load": 2, "FMA unit": 1, "other": 2, "total": 7,
    }  # fmt: skip
