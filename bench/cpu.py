"""``python -m bench cpu``: speed and memory beside torch.nn on the CPU.

Each case and cell is timed in new processes, because times depend on the state of the heap and on
which CPUs a process gets. The row is that of the process in the middle.
"""

import argparse
from typing import Any

import torch

from .cases import CHARACTER, LESSONS, LONG, ONE_HOT, RAGGED, named
from .providers import TORCH
from .report import COLUMNS
from .run import run as run_plan

OPTIONS = ("imdb", "download", "out", "seed", "quick", "minutes", "resume")
ARGUMENTS = {"--only": {"metavar": "NAMES", "help": "only these cases, with commas"}}
PROCESSES = 3
#: Who is measured beside torch.nn, where it is not fusedrnn alone.
SPECIAL = {
    ONE_HOT: ("fusedrnn", "fusedrnn torch", "fusedrnn recompute"),
    CHARACTER: ("fusedrnn", "fusedrnn stream"),
    RAGGED: ("fusedrnn lengths",),
}


def run(options: argparse.Namespace) -> int:
    """Measures all cases, and prints the geometric means and the cost of recomputing."""
    options.device = "cpu"
    workloads = named(options.only) if options.only else (*LESSONS, LONG, RAGGED)
    plan = [(w, (TORCH, *SPECIAL.get(w, ("fusedrnn",)))) for w in workloads]
    rows, code = run_plan(options, plan, processes=1 if options.quick else PROCESSES)
    summary(rows)
    return code


def summary(rows: list[dict[str, Any]]) -> None:
    import pandas

    frame = pandas.DataFrame(rows, columns=COLUMNS).dropna(subset=["x"])
    groups = frame[frame.provider == "fusedrnn"].groupby(["cell", "pass"], sort=False)
    table = groups.x.agg(["min", geometric_mean, "count"]).reset_index()
    print(f"\ntorch.nn's time / fusedrnn's\n{table.to_markdown(index=False, floatfmt='.2f')}")
    training = frame[(frame["case"] == ONE_HOT.name) & (frame["pass"] == "training")]
    if len(training):
        table = training.pivot(index="provider", columns="cell", values=["kept_mb", "ms"])
        table.columns = [" ".join(name) for name in table.columns]
        print(f"\n{ONE_HOT.name}, training: MB kept for backward, ms\n{table.to_markdown()}")


def geometric_mean(values: Any) -> float:
    return float(torch.tensor(list(values)).log().mean().exp())
