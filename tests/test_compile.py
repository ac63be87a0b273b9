"""Ring 3: kernels compiled for GPUs that are not there; a covering subset of `make compile-all`."""

import csv
import json
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from compile_all import about, compile_jobs, faults, run_script
from compiling import every_job, plan_of

from fusedrnn.kernels.plan import CHIPS

TABLE = Path(__file__).parent.parent / "docs" / "compiled.csv"


def covering(chip: str, every: int, ragged: tuple[bool, ...] = (False, True)):
    """The largest H of each cell, precision and form of rows, both kernels; one in ``every``."""

    def kind(job):
        p = job.problem
        schedule = plan_of(p, CHIPS[job.chip]).schedule
        rows = p.ragged, p.members
        return schedule, job.direction, job.launch, p.cell, str(p.dtype), p.precision, rows

    def weight(job):
        # The widest tile of rows and, for the forward, the input projected in the kernel.
        p = job.problem
        return p.hidden_size, p.batch, p.layers, -p.input_size

    jobs = sorted((job for job in every_job(chip) if job.problem.ragged in ragged), key=kind)
    largest = [max(group, key=weight) for _, group in groupby(jobs, kind)]
    return largest[::every]


def check(jobs, triton_dir=None):
    usages = compile_jobs(jobs, triton_dir)
    found = [(job, usage) for job, usage in zip(jobs, usages, strict=True) if faults(job, usage)]
    assert not found, "\n".join(f"{faults(*pair)}: {pair}" for pair in found)
    return usages


def test_hopper():
    """By the Triton of this environment: every second, of ragged rows every fourth."""
    dense, ragged = covering("sm_90", 2, (False,)), covering("sm_90", 4, (True,))
    assert len(check(dense + ragged)) >= 90


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_by_newest_and_oldest_triton(chip, triton_dir):
    usages = check(covering(chip, 9), triton_dir)
    version = (Path(triton_dir) / "triton" / "__init__.py").read_text()
    assert all(f"'{usage['triton']}'" in version for usage in usages)


def test_row_offsets_are_64_bits_wide():
    """T * B * H beyond 2**31 elements: seen in the compiler's own intermediate form."""
    jobs = [j for j in every_job("sm_90") if j.problem.batch == 8 and j.problem.hidden_size == 16]
    assert {usage["narrow"] for usage in check(jobs[::7])} == {0}


def test_faults_are_seen():
    job = covering("sm_90", 1)[0]
    usage = {"shared": 10**6, "spills": 8, "registers": 255, "mma": 0, "narrow": 1}
    usage |= {"early": 1, "scalar": 1, "endless": 1, "apart": True, "chain": 99}
    assert [f.split()[1:3] for f in faults(job, usage)] == [
        ["bytes", "spilled"],
        ["bytes", "shared,"],
        ["row", "offsets"],
        ["loads", "of"],
        ["loads", "of"],
        ["waits", "without"],
        ["cooperative", "launch"],
        ["dependent", "mma,"],
        ["tensor-core", "instruction"],
    ]


def test_the_table_holds_exactly_these_kernels():
    """What `make compile-all` would compile now is what docs/compiled.csv was made of, by keys."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tritons = {row["triton"] for row in rows}
    jobs = [about(job) for chip in CHIPS for job in every_job(chip)]
    now = Counter((triton, *map(str, job.values())) for triton in tritons for job in jobs)
    table = Counter(tuple(row[name] for name in ("triton", *jobs[0])) for row in rows)
    assert len(tritons) == 2
    assert not now - table, "kernels are missing from the table: run `make compile-all`"
    assert not table - now, "nobody would compile some kernels of the table any more"


def test_the_launchers_own_arguments(triton_dir):
    """Everything up to the launch, through the launchers: for each cell five forward and backward
    calls, of which those with another T and B compile nothing new, though both are 1."""
    done = run_script("launching.py", triton_dir)
    names, distinct, counts = map(json.loads, done.splitlines())
    resident, together = ([f"_{name}_{d}_kernel" for d in ("fwd", "bwd")]
                          for name in ("resident", "cooperative"))  # fmt: skip
    stepwise = ["_stepwise_fwd_kernel"] * 2 + ["_stepwise_bwd_kernel"] * 2
    assert names == (resident * 3 + together * 2) * 5 + stepwise
    assert distinct == 5 * 6 + 4
    for is_aligned, (first, *more) in counts:
        # Else one binary for each set of parts that are aligned to 16 bytes.
        assert (set(more) == {first}) == is_aligned
