"""Kernels compiled for GPUs that are absent: a subset, and in `make test-all` every plan."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from compile_all import run_script
from compiling import COMPILED_CHIPS, FP32, every_job, faults
from compiling import job as one_job

from fusedrnn.kernels.compile import count_kinds
from fusedrnn.kernels.sass import Instruction

NAMES = ("resident_nvidia", "resident", "cooperative")
PARTS = [("sm_90", name) for name in (*NAMES, "stepwise")]
PARTS += [(chip, name) for chip in ("sm_80", "sm_100") for name in ("resident_nvidia", NAMES[-1])]
PARTS += [(f"sm_{n}", name) for n in (86, 89, 120) for name in ("resident_nvidia", NAMES[-1])]


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
@pytest.mark.parametrize("variable", ["FUSEDRNN_TRITON_36", "FUSEDRNN_TRITON_39"])
def test_other_tritons(variable):
    """The oldest that is supported and the newest, which `make test-all` installs."""
    if not (triton_dir := os.environ.get(variable)):
        pytest.skip(f"{variable} names no folder")
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
    job = one_job("lstm", 64, FP32, "tf32x3")
    narrow = "%5 = tt.addptr %4, %x : tensor<8x!tt.ptr<bf16>>, tensor<8xi32>"
    found = faults(job, kernel(ttir=narrow, tiles=job.plan.forward))
    last = [fault.split()[-1] for fault in found]
    assert last == ["spilled", "allowed", "bits", "constant", "instruction"]


def test_faults_of_an_exchange_are_seen():
    job = one_job("lstm", 512)
    names = ["LDG.E.64.STRONG.GPU", "LDG.E.STRONG.GPU", "STL", "SHFL", *["BAR"] * 4, "BRA"]
    loop = [Instruction(n, name, target=0) for n, name in enumerate(names)]
    ptx = "\tst.global.b32\n\t@p red.release.gpu.global\n\tld.acquire.gpu.global\n\tld.global.cg"
    found = faults(job, kernel(ptx=ptx, tiles=job.plan.forward, spills=600, instructions=loop))
    assert [fault.split()[-1] for fault in found] == [
        "spilled", "allowed", "step", "loop", "instruction", "threads", "time", "wait",
        "st.global", "ld.global.cg", "limit", "once",
    ]  # fmt: skip
    assert {"no red.release.gpu", "no ld.acquire.gpu"} <= set(
        faults(job, kernel(tiles=job.plan.forward, instructions=loop))
    )


def test_counts_of_kinds():
    names = ["LDG.E.128", "LD.E.STRONG", "BRA", "HMMA.16816", "MUFU.EX2", "FFMA", "BRA"]
    counts = count_kinds([Instruction(i, name) for i, name in enumerate(names)])
    assert {kind: n for kind, n in counts.items() if n} == {
        "tensor core": 1, "MUFU": 1, "global load": 2, "FMA unit": 1, "other": 2, "total": 7,
    }  # fmt: skip
