"""``python -m bench cpu``: speed and memory beside torch.nn on the CPU, and the targets.

Each case and cell is timed in new processes, because times depend on the state of the heap and on
which CPUs a process gets. The row is that of the process in the middle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch

from . import UserError
from .cases import CHARACTER, LESSONS, LONG, ONE_HOT, RAGGED, Workload
from .providers import TORCH
from .run import run as run_plan

OPTIONS = ("imdb", "download", "out", "seed", "quick")
PROCESSES = 3
#: Who is measured beside torch.nn, where it is not fusedrnn alone.
SPECIAL = {
    ONE_HOT: ("fusedrnn", "fusedrnn torch", "fusedrnn recompute"),
    CHARACTER: ("fusedrnn", "fusedrnn stream"),
    RAGGED: ("fusedrnn lengths",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="NAMES", help="only these cases, with commas")


def run(options: argparse.Namespace) -> int:
    """Measures all cases, and prints the tables and the targets."""
    options.device = "cpu"
    cases: dict[str, Workload] = {w.name: w for w in (*LESSONS, LONG, RAGGED)}
    names = options.only.split(",") if options.only else list(cases)
    for name in names:
        if name not in cases:
            raise UserError(f"there is no case {name!r}; there are {', '.join(cases)}")
    plan = [(cases[n], (TORCH, *SPECIAL.get(cases[n], ("fusedrnn",)))) for n in names]
    rows, code = run_plan(options, plan, processes=1 if options.quick else PROCESSES)
    summary(rows, host_time(20 if options.quick else 1000))
    return code


def geomean(values: Any) -> float:
    return float(torch.tensor(list(values)).log().mean().exp())


def summary(rows: list[dict[str, Any]], host: list[dict[str, Any]] | str) -> None:
    """Prints geometric means, the cost of recomputing, the host's time, and the targets."""
    import pandas

    frame = pandas.DataFrame(rows).dropna(subset=["x"])
    lessons = frame[(frame.provider == "fusedrnn") & (frame["case"] != RAGGED.name)]
    means = lessons.groupby(["cell", "pass"], sort=False, as_index=False)
    table = means.agg(least=("x", "min"), geometric_mean=("x", geomean), cases=("x", "count"))
    print(f"\ntorch.nn's time / fusedrnn's\n{table.to_markdown(index=False, floatfmt='.2f')}")
    training = frame[(frame["case"] == ONE_HOT.name) & (frame["pass"] == "training")]
    if len(training):
        table = training.pivot(index="provider", columns="cell", values=["kept_mb", "ms"])
        table.columns = [" ".join(name) for name in table.columns]
        print(f"\n{ONE_HOT.name}, training: MB kept for backward, ms\n{table.to_markdown()}")
    print("\nmicroseconds from the call to the launch of the kernel, which a stub replaces")
    print(host if isinstance(host, str) else pandas.DataFrame(host).to_markdown(index=False))
    table = pandas.DataFrame(targets(frame, [] if isinstance(host, str) else host))
    print(f"\ntargets\n{table.to_markdown(index=False, floatfmt='.2f')}")


def targets(frame: Any, host: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each target, what was measured, and whether it was reached."""
    ours = frame[(frame.provider == "fusedrnn") & (frame["case"] != RAGGED.name)]
    training = ours[ours["pass"] == "training"]
    is_short = ours.ms * ours.x < 0.2
    one_hot = training[(training["case"] == ONE_HOT.name) & (training.cell == "lstm")]
    lengths = frame[(frame.provider == "fusedrnn lengths") & (frame["pass"] == "training")]
    table = []
    for target, wanted, values, reduce in (
        ("forward and training, least", 0.95, ours[~is_short].x, min),
        ("calls under 0.2 ms, least", 0.85, ours[is_short].x, min),
        ("GRU training, geometric mean", 1.6, training[training.cell == "gru"].x, geomean),
        ("RNN training, geometric mean", 1.3, training[training.cell == "rnn"].x, geomean),
        ("one-hot LSTM training", 1.3, one_hot.x, min),
        ("lengths beside packed, training, least", 3.0, lengths.x, min),
    ):
        if len(values):
            value = reduce(values)
            table.append((target, f">= {wanted}", value, value >= wanted))
    for name, most in (("forward", 60), ("backward", 80)):
        if host:
            value = max(row[f"{name} us"] for row in host)
            table.append((f"host, {name}, us", f"<= {most}", value, value <= most))
    names = ("target", "wanted", "measured", "reached")
    return [dict(zip(names, row, strict=True)) for row in table]


def host_time(calls: int) -> list[dict[str, Any]] | str:
    """Returns Python's part of a call for each cell, or a sentence that says why there is none."""
    # Kernels take CPU tensors only if Triton interprets, which is chosen when it is imported.
    command = [sys.executable, "-m", "bench.host", str(calls)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    if child.returncode:
        return f"not measured: {(child.stderr.strip() or 'no message').splitlines()[-1]}"
    return json.loads(child.stdout)
