"""Compiles every kernel the planner can choose, in a process without ``TRITON_INTERPRET``.

Exit code 1 if a binary spills more than 64 bytes a thread, needs more shared memory than planned,
or breaks another rule of ``compiling.py``.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import triton
from compiling import COMPILED_CHIPS, Job, cover, covering, every_plan, faults
from processes import python


class Row(NamedTuple):
    """One kernel of a job."""

    chip: str
    schedule: str
    cell: str
    direction: str
    registers: int
    spills: int
    shared: int
    times: float  # those of a dense step, where rows are ragged; else 0
    faults: list[str]
    name: str


def compile_job(job: Job) -> list[Row]:
    """Compiles both directions of a job."""
    from fusedrnn.kernels.compile import compile_plan
    from fusedrnn.kernels.plan import CHIPS

    chip = CHIPS[job.chip]
    kernels = compile_plan(job.problem, job.plan, chip)
    other = compile_plan(job.problem._replace(batch=1), job.plan, chip)
    assert [k.binary for k in kernels] == [k.binary for k in other], "a binary depends on B"
    rows, dense = [], []
    if job.plan.schedule == "resident_nvidia" and job.problem.ragged:
        dense = compile_plan(job.problem._replace(ragged=False), job.plan, chip)
    for kernel, like in zip_longest(kernels, dense):
        pair = (kernel, like) if like else ()
        cycles = [each.predict(chip.arch).cycles for each in pair]
        times = round(cycles[0] / cycles[1], 2) if cycles else 0.0
        usage = kernel.registers, kernel.spills, kernel.shared_bytes, times
        about = job.chip, job.plan.schedule, job.problem.cell, kernel.direction
        rows.append(Row(*about, *usage, faults(job, kernel, *cycles), str(job.problem)))
    return rows


def summary(rows: list[Row]) -> str:
    """A Markdown table with a line for each chip, schedule and direction."""
    import pandas

    columns = {
        "kernels": ("name", "size"),
        "registers": ("registers", lambda used: f"{min(used)}-{max(used)}"),
        "spilling": ("spills", lambda bytes: (bytes > 0).sum()),
        "most bytes spilled": ("spills", "max"),
        "ragged / dense": ("times", "max"),
        "shared KiB": ("shared", lambda bytes: round(bytes.max() / 1024)),
    }
    groups = pandas.DataFrame(rows).groupby(["chip", "schedule", "direction"])
    return groups.agg(**columns).reset_index().to_markdown(index=False)


def run_script(name: str, *arguments: str, triton_dir: str | None = None) -> str:
    """Runs a script of this folder where Triton compiles, by another Triton if one is named."""
    here = Path(__file__).parent
    paths = ([triton_dir] if triton_dir else []) + [str(here.parent), str(here)]
    done = python(here / name, *arguments, PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", choices=("pair", "plan"), help="not the subset of `make test`")
    parser.add_argument("--chip", choices=COMPILED_CHIPS, help="that alone")
    parser.add_argument("--schedule", help="that alone")
    parser.add_argument("--part", default="0/1", help="each n-th job from the i-th on, as 0/4")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--summary", action="store_true", help="end with a table in Markdown")
    options = parser.parse_args()
    jobs = covering()
    if options.every:
        chip = options.chip or "sm_90"
        jobs = cover(chip, 2) if options.every == "pair" else every_plan(chip)
    number, of = map(int, options.part.split("/"))
    jobs = [
        job
        for job in jobs[number::of]
        if options.chip in (None, job.chip) and options.schedule in (None, job.plan.schedule)
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = [row for found in pool.map(compile_job, jobs) for row in found]
    wrong = [row for row in rows if row.faults]
    for row in wrong:
        print(f"{row.chip} {row.schedule} {row.direction} {row.name}: {', '.join(row.faults)}")  # noqa: T201
    print(f"{len(rows)} kernels compiled by Triton {triton.__version__}, {len(wrong)} with faults")  # noqa: T201
    if options.summary:
        print(summary(rows))  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
