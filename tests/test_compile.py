"""Ring 3: kernels compiled for GPUs that are not there; a covering subset of `make compile-all`."""

import ast
import os
from itertools import groupby
from pathlib import Path

import pytest
from compile_all import compile_jobs, faults
from compiling import every_job

from fusedrnn.kernels.plan import CHIPS


def covering(chip: str, every: int):
    """The largest H of each cell and precision, both kernels; of those, one in ``every``."""

    def kind(job):
        p = job.problem
        return job.direction, p.cell, str(p.dtype), p.precision

    def weight(job):
        # The widest tile of rows and, for the forward, the input projected in the kernel.
        return job.problem.hidden_size, job.problem.batch, -job.problem.input_size

    jobs = sorted(every_job(chip), key=kind)
    largest = [max(group, key=weight) for _, group in groupby(jobs, kind)]
    return largest[::every]


def check(jobs, triton_dir=None):
    usages = compile_jobs(jobs, triton_dir)
    found = [(job, usage) for job, usage in zip(jobs, usages, strict=True) if faults(job, usage)]
    assert not found, "\n".join(f"{faults(*pair)}: {pair}" for pair in found)
    return usages


def test_hopper():
    assert len(check(covering("sm_90", 1))) >= 40


@pytest.mark.parametrize("chip", sorted(set(CHIPS) - {"sm_90"}))
def test_other_chips(chip):
    check(covering(chip, 3))


@pytest.mark.parametrize("chip", CHIPS)
def test_oldest_triton(chip):
    """Triton 3.6, which torch 2.11 brings; `make test` installs it and names it."""
    triton_dir = os.environ.get("FUSEDRNN_TRITON_36")
    if not triton_dir:
        pytest.skip("FUSEDRNN_TRITON_36 does not name a folder with Triton 3.6; `make test` does")
    usages = check(covering(chip, 4), triton_dir)
    assert {usage["triton"] for usage in usages} == {"3.6.0"}


def test_row_offsets_are_64_bits_wide():
    """T * B * H beyond 2**31 elements: seen in the compiler's own intermediate form."""
    jobs = [j for j in every_job("sm_90") if j.problem.batch == 8 and j.problem.hidden_size == 16]
    assert {usage["narrow"] for usage in check(jobs[::7])} == {0}


def test_faults_are_seen():
    job = covering("sm_90", 1)[0]
    usage = {"shared": 10**6, "spills": 8, "registers": 255, "mma": 0, "narrow": 1}
    assert [f.split()[1:3] for f in faults(job, usage)] == [
        ["bytes", "spilled"],
        ["bytes", "shared,"],
        ["row", "offsets"],
        ["tensor-core", "instruction"],
    ]


@pytest.mark.parametrize("kernel", ["_resident_fwd_kernel", "_resident_bwd_kernel"])
def test_no_binary_depends_on_t_or_b(kernel):
    """A new T or B compiles nothing: not even 1, or a multiple of 16, is a case of its own."""
    source = (Path(__file__).parent.parent / "kernels" / "resident.py").read_text()
    tree = ast.parse(source)
    function = next(n for n in tree.body if getattr(n, "name", "") == kernel)
    plain = {a.arg for a in function.args.args if a.annotation is None}
    sizes = {name for name in plain if not name.endswith("_ptr")}
    assert {"T", "B"} <= sizes
    (decorator,) = function.decorator_list
    (keyword,) = decorator.keywords
    assert keyword.arg == "do_not_specialize"
    assert {constant.value for constant in keyword.value.elts} == sizes
