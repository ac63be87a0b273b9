"""Compiles every kernel and tile size the plan can choose, for every chip; `make compile-all`.

Writes one line per plan to a CSV file and fails if any binary spills, wants more shared memory
than its chip has or its plan estimated, or lacks tensor-core instructions where they are meant.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from compiling import Job, every_job, plan_of

from fusedrnn.kernels.model import dependent_mma, kind_of
from fusedrnn.kernels.plan import CHIPS

HERE = Path(__file__).parent


def run_script(name: str, triton_dir: str | None = None, lines: str = "") -> str:
    """Runs a script of this folder where Triton compiles, by another Triton if one is named."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = ([triton_dir] if triton_dir else []) + [str(HERE.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, HERE / name], input=lines, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def compile_jobs(jobs: Sequence[Job], triton_dir: str | None = None) -> list[dict]:
    """Compiles every job and returns what each binary needs."""
    lines = "".join(job.to_json() + "\n" for job in jobs)
    return [json.loads(line) for line in run_script("compiling.py", triton_dir, lines).splitlines()]


def faults(job: Job, usage: dict) -> list[str]:
    """What is wrong with a binary, in words."""
    chosen, chip = plan_of(job.problem, CHIPS[job.chip]), CHIPS[job.chip]
    tiles = chosen.forward if job.direction == "forward" else chosen.backward
    found = []
    if usage["spills"]:
        found.append(f"{usage['spills']} bytes spilled")
    if usage["shared"] > min(chip.shared_bytes, tiles.shared_bytes):
        found.append(f"{usage['shared']} bytes shared, {tiles.shared_bytes} estimated")
    if usage["narrow"]:
        found.append(f"{usage['narrow']} row offsets of 32 bits")
    if usage.get("early"):
        found.append(f"{usage['early']} loads of exchanged data before the wait")
    if usage.get("scalar"):
        found.append(f"{usage['scalar']} loads of exchanged data element by element")
    if usage.get("endless"):
        found.append(f"{usage['endless']} waits without a limit")
    if usage.get("apart"):
        found.append("no cooperative launch of programs that wait for each other")
    if "chain" in usage and usage["chain"] != (chain := expected_chain(job)):
        found.append(f"{usage['chain']} dependent mma, {chain} modelled")
    on_fma_units = job.chip != "gfx942" and job.problem.precision == "ieee"
    in_library = chosen.schedule == "stepwise"  # whose products are torch.mm
    if (
        not usage["mma"]
        and not in_library
        and not (on_fma_units and job.problem.dtype.itemsize == 4)
    ):
        found.append("no tensor-core instruction")
    return found


def expected_chain(job: Job) -> int:
    """The longest chain of mma by the model, which leaves out a projection in the kernel."""
    chosen, chip = plan_of(job.problem, CHIPS[job.chip]), CHIPS[job.chip]
    forward, kind = job.direction == "forward", kind_of(job.problem, chip)
    tiles = chosen.forward if forward else chosen.backward
    chains = dependent_mma(job.problem, kind, tiles, chosen.layers, job.direction)
    if forward and chosen.i_blocks:
        given = replace(tiles, blocks=chosen.i_blocks)
        chains += dependent_mma(job.problem, kind, given, 1, job.direction)
    return max(chains)


def about(job: Job) -> dict:
    """The columns of the table that say which kernel it is."""
    chosen = plan_of(job.problem, CHIPS[job.chip])
    tiles = chosen.forward if job.direction == "forward" else chosen.backward
    return {
        "chip": job.chip,
        "schedule": chosen.schedule,
        "cell": job.problem.cell,
        "dtype": str(job.problem.dtype).removeprefix("torch."),
        "precision": tiles.input_precision,
        "H": job.problem.hidden_size if tiles.k_chunks else "",
        "units": "+".join(str(width) for _, width in tiles.blocks),
        "I": "+".join(str(width) for _, width in chosen.i_blocks) or "GEMM",
        "rows": "members"
        if job.problem.members > 1
        else "ragged"
        if job.problem.ragged
        else "dense",
        "directions": job.problem.directions,
        "layers": chosen.layers,
        "kernel": f"{job.direction} {job.launch}"
        if chosen.schedule == "stepwise"
        else job.direction
        if job.problem.needs_grad
        else "inference",
        "block_b": tiles.block_b,
        "warps": tiles.num_warps,
    }


def row(job: Job, usage: dict) -> dict:
    found = {key: usage[key] for key in ("registers", "spills", "shared", "mma", "step")}
    return {
        "triton": usage["triton"],
        **about(job),
        **found,
        "faults": "; ".join(faults(job, usage)),
    }


def run(
    jobs: Iterable[Job],
    tritons: Sequence[str | None],
    table: Path,
    workers: int,
    kept: Sequence[dict] = (),
) -> int:
    chunk = 20
    jobs = list(jobs)
    work = [(t, jobs[i : i + chunk]) for t in tritons for i in range(0, len(jobs), chunk)]
    rows: list[dict] = []
    errors: list[BaseException] = []
    lock = threading.Lock()

    def worker() -> None:
        while not errors:
            with lock:
                if not work:
                    return
                triton_dir, part = work.pop(0)
            try:
                answers = compile_jobs(part, triton_dir)
            except BaseException as error:  # handed to the main thread below
                errors.append(error)
                return
            with lock:
                rows.extend(row(j, usage) for j, usage in zip(part, answers, strict=True))
                sys.stdout.write(f"{len(rows)} of {len(jobs) * len(tritons)}\n")
                sys.stdout.flush()

    threads = [threading.Thread(target=worker) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    rows += kept
    rows.sort(key=lambda r: [str(value) for value in r.values()])
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    faulty = [r for r in rows if r["faults"]]
    for r in faulty:
        sys.stdout.write(", ".join(f"{k}={v}" for k, v in r.items()) + "\n")
    sys.stdout.write(f"{len(rows)} kernels compiled, {len(faulty)} with faults; see {table}\n")
    return 1 if faulty else 0


def beside(table: Path, jobs: Sequence[Job]) -> tuple[list[Job], list[dict]]:
    """The jobs that a table has no line of, and the lines that stay."""
    named = {tuple(map(str, about(job).values())): job for job in jobs}
    columns = list(about(jobs[0]))
    kept: dict[tuple[str, ...], list[dict]] = {}
    with table.open(newline="") as file:
        for line in csv.DictReader(file):
            key = tuple(line[name] for name in columns)
            if key in named:
                kept.setdefault(key, []).append(line)
    lines = [line for each in kept.values() for line in each]
    return [job for key, job in named.items() if key not in kept], lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--missing", action="store_true", help="keep the lines that the table has already"
    )
    arguments = parser.parse_args()
    others = [os.environ.get(f"FUSEDRNN_TRITON_{version}") for version in (39, 36)]
    tritons = [folder for folder in others if folder] or [None]
    jobs = [job for chip in arguments.chips for job in every_job(chip)]
    kept: list[dict] = []
    if arguments.missing:
        jobs, kept = beside(arguments.table, jobs)
    return run(jobs, tritons, arguments.table, arguments.workers, kept)


if __name__ == "__main__":
    sys.exit(main())
