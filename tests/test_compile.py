"""Kernels compiled for GPUs that are absent: a subset, and in `make test-all` every plan."""

import os
from itertools import product
from types import SimpleNamespace

import compiling
import pytest
import torch
from compile_all import run_script
from compiling import COMPILED_CHIPS, SHAPE, Job, combined, faults, job_of

from fusedrnn.kernels.plan import CHIPS, SCHEDULES, Problem, plan_stack
from fusedrnn.kernels.sass import Instruction
from fusedrnn.kernels.spec import SPECS


@pytest.mark.parametrize("part", ["0/2", "1/2"])
def test_the_covering_subset(part):
    done = run_script("compile_all.py", "--part", part, "--workers", "1")
    assert " 0 with faults" in done


@pytest.mark.slow
def test_every_plan():
    assert " 0 with faults" in run_script("compile_all.py", "--every", "plan", "--chip", "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("chip", COMPILED_CHIPS[1:])
def test_every_pair(chip):
    assert " 0 with faults" in run_script("compile_all.py", "--every", "pair", "--chip", chip)


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["FUSEDRNN_TRITON_36", "FUSEDRNN_TRITON_39"])
def test_other_tritons(variable):
    """The oldest that is supported and the newest, which `make test-all` installs."""
    if not (triton_dir := os.environ.get(variable)):
        pytest.skip(f"{variable} names no folder")
    options = "--every", "pair", "--chip", "sm_90"
    done = run_script("compile_all.py", *options, triton_dir=triton_dir)
    assert " 0 with faults" in done
    assert f"by Triton {variable[-2]}.{variable[-1]}." in done


#: None of them is in the lists.
OTHER_SIZES = (7, 24, 48, 96, 130, 384, 900, 1280, 2100, 3072)


def reached(chip):
    """Yields the traits of the kernels that the planner chooses for other sizes."""
    products = {job.problem[4:6] for job in compiling.candidates(chip)}
    for cell, H, (dtype, precision), ragged in product(SPECS, OTHER_SIZES, products, (True, False)):
        for B, D, L, needs_grad in product((3, 5000), (1, 2), (1, 2), (True, False)):
            problem = Problem(cell, H, B, D, dtype, precision, needs_grad, L, ragged)
            for chosen in plan_stack(problem, CHIPS[chip]):
                yield Job(problem._replace(layers=chosen.layers), chip, chosen).traits


@pytest.mark.parametrize(
    "chip", ["sm_90", *(pytest.param(c, marks=pytest.mark.slow) for c in COMPILED_CHIPS[1:])]
)
def test_the_lists_leave_no_kernel_out(chip):
    lists = [(compiling.covering(), 1, None), (compiling.cover(chip, 2), 2, None)]
    if chip == "sm_90":
        lists.append((compiling.every_plan(chip), 3, SHAPE))
    found = set(reached(chip))
    assert len({traits[0] for traits in found}) == len(SCHEDULES)
    for jobs, count, of in lists:
        held = set().union(*(combined(job.traits[:of], count) for job in jobs))
        assert set().union(*(combined(traits[:of], count) for traits in found)) <= held


def kernel(ttgir="", ptx="", ttir="", **changes):
    """Something like a compiled kernel, of which nothing is right."""
    asm = {"ttgir": ttgir, "ptx": ptx, "ttir": ttir}
    binary = SimpleNamespace(asm=asm, metadata=SimpleNamespace(launch_cooperative_grid=False))
    given = {"spills": 72, "shared_bytes": 10**6, "direction": "forward", "binary": binary}
    return SimpleNamespace(**given | changes)


def test_faults_are_seen():
    job = job_of(Problem("lstm", 64, 16, 1, torch.float32, "tf32x3", True))
    narrow = "%5 = tt.addptr %4, %x : !tt.ptr<bf16>, i32"
    found = faults(job, kernel(ttir=narrow, tiles=job.plan.forward), ragged=506.0, dense=300.0)
    last = [fault.split()[-1] for fault in found]
    assert last == ["spilled", "allowed", "300", "bits", "constant", "instruction"]


def test_faults_of_an_exchange_are_seen():
    job = job_of(Problem("lstm", 512, 16, 1, torch.bfloat16, "ieee", True))
    names = ["LDG.E.64.STRONG.GPU", "LDG.E.STRONG.GPU", "STL", "SHFL", *["BAR"] * 4, "BRA"]
    loop = [Instruction(n, name, ".L_0", labels=(".L_0",)[n:]) for n, name in enumerate(names)]
    ptx = "\tst.global.b32\n\t@p red.release.gpu.global\n\tld.acquire.gpu.global\n\tld.global.cg"
    found = faults(job, kernel(ptx=ptx, tiles=job.plan.forward, spills=600, instructions=loop))
    assert [fault.split()[-1] for fault in found] == [
        "spilled", "allowed", "step", "loop", "instruction", "threads", "time", "wait",
        "st.global", "ld.global.cg", "limit", "once",
    ]  # fmt: skip
    assert {"no red.release.gpu", "no ld.acquire.gpu"} <= set(
        faults(job, kernel(tiles=job.plan.forward, instructions=loop))
    )
