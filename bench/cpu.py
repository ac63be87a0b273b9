"""``python -m bench cpu``: speed and memory beside torch.nn on the CPU, and the targets.

The gate comes first. Then each case and cell is timed in new processes, because the times depend on
the state of the heap and on which CPUs a process gets; the row is that of the process in the middle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import UserError, report
from .cases import CHARACTER, EVERY_CELL, LESSONS, LONG, ONE_HOT, RAGGED, Workload, cut_down
from .host import measured as host_time
from .measure import PASSES, BenchmarkCase, Settings, in_fresh_process
from .providers import TORCH
from .run import WIDTHS, Rows, able, add_times, begin, case_lines, ended, gated

HELP = "all workloads on the CPU, in new processes (8 minutes)"
OPTIONS = ("imdb", "download", "out", "seed", "quick")
PROCESSES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", metavar="NAMES", help="only these of the cases, with commas")


def plan() -> list[tuple[Workload, tuple[str, ...]]]:
    """Returns the workloads and who is measured on each beside torch.nn."""
    more = {
        ONE_HOT: ("fusedrnn", "fusedrnn torch", "fusedrnn recompute"),
        CHARACTER: ("fusedrnn", "fusedrnn stream"),
        RAGGED: ("fusedrnn lengths",),
    }
    return [(w, (TORCH, *more.get(w, ("fusedrnn",)))) for w in (*LESSONS, LONG, RAGGED)]


def timed_alone(case: BenchmarkCase, rows: Rows, settings: Settings) -> Rows:
    """Returns the rows with times; runs in a process that has done nothing else."""
    for mode in PASSES:
        calls = {provider: case.call(provider, mode) for provider in able(rows, mode)}
        add_times(rows, mode, calls, settings)
    return rows


def middle(runs: Sequence[Rows]) -> Rows:
    """Returns of each row that of the process with the median ratio, and the range of the ratios."""
    found = {}
    for key in runs[0]:
        ordered = sorted((rows[key] for rows in runs), key=lambda row: row.get("x") or 0.0)
        ends = {"x_low": ordered[0].get("x"), "x_high": ordered[-1].get("x")}
        found[key] = ordered[len(ordered) // 2] | ends
    return found


def run(options: argparse.Namespace) -> int:
    """Measures all cases, and prints the tables and the targets."""
    started = time.monotonic()
    options.device = "cpu"
    wanted = plan()
    if options.cases:
        names = options.cases.split(",")
        unknown = set(names) - {w.name for w, _ in wanted}
        if unknown:
            raise UserError(
                f"there is no case {sorted(unknown)[0]!r} here; "
                f"there are {', '.join(w.name for w, _ in wanted)}"
            )
        wanted = [(w, who) for w, who in wanted if w.name in names]
    if options.quick:
        wanted = [(cut_down(w), who) for w, who in wanted]
    settings, corpus, results = begin(options, [w for w, _ in wanted])
    settings = settings if options.quick else settings._replace(seconds=0.3, least_rounds=2)
    print(f"\n{report.table_head(WIDTHS)}", flush=True)
    every: list[dict] = []
    complaints: list[str] = []
    for (workload, providers), cell in report.progress(
        [(pair, cell) for pair in wanted for cell in EVERY_CELL]
    ):
        case = BenchmarkCase.of(workload, cell, settings, corpus)
        rows, wrong = gated(case, providers)
        alone = case._replace(examples=None, start=None)
        count = 1 if options.quick else PROCESSES
        rows = middle([in_fresh_process(timed_alone, alone, rows, settings) for _ in range(count)])
        for provider in able(rows, "training"):
            rows[provider, "training"]["kept_mb"] = case.kept_mb(provider)
        results.add(rows.values())
        for line in case_lines(rows):
            report.say(report.table_line(line, WIDTHS))
        every += rows.values()
        complaints += wrong
    summary(every, host_time(20 if options.quick else 1000))
    return ended(complaints, results, started)


def summary(rows: list[dict], host: list[dict[str, Any]] | str) -> None:
    """Prints geometric means, what recomputing costs, the host's time, and the targets."""
    import pandas

    frame = pandas.DataFrame(rows)
    if "x" not in frame:
        return
    ours = frame[frame.provider.isin(["fusedrnn", "fusedrnn lengths"])]
    means = lessons(ours).groupby(["cell", "pass"], sort=False).x
    table = means.agg(least="min", geometric_mean=geomean, cases="count")
    print(f"\ntorch.nn's time / fusedrnn's\n{table.to_markdown(floatfmt='.2f')}")
    again = frame[(frame["case"] == ONE_HOT.name) & (frame["pass"] == "training")]
    memory = again.pivot(index="cell", columns="provider", values=["kept_mb", "ms"])
    if ("ms", "fusedrnn recompute") in memory:
        table = memory["kept_mb"].assign(
            time=memory["ms", "fusedrnn recompute"] / memory["ms", "fusedrnn torch"]
        )
        print(f"\n{ONE_HOT.name}: MB kept for backward, and the time of recomputing\n"
              f"{table.to_markdown(floatfmt='.2f')}")  # fmt: skip
    print("\nmicroseconds from the call to the kernel's launch, which is replaced by a stub")
    print(host if isinstance(host, str) else pandas.DataFrame(host).to_markdown(index=False))
    table = pandas.DataFrame(targets(ours, [] if isinstance(host, str) else host))
    print(f"\ntargets\n{table.to_markdown(index=False, floatfmt='.2f')}")


def geomean(values: Any) -> float:
    return float(torch.tensor(list(values)).log().mean().exp())


def lessons(frame: Any) -> Any:
    return frame[frame["case"].isin([w.name for w in (*LESSONS, LONG)])]


def targets(ours: Any, host: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each target, what was measured, and whether it was reached."""
    short = ours.ms * ours.x < 0.2
    training = ours[ours["pass"] == "training"]

    def of(cell: str) -> Any:
        return lessons(training[training.cell == cell]).x

    one_hot = training[(training["case"] == ONE_HOT.name) & (training.cell == "lstm")].x
    wanted = [
        ("lessons, forward and training, least", lessons(ours[~short]).x, min, 0.95),
        ("the same of calls under 0.2 ms, least", lessons(ours[short]).x, min, 0.85),
        ("GRU training, geometric mean", of("gru"), geomean, 1.6),
        ("RNN training, geometric mean", of("rnn"), geomean, 1.3),
        ("one-hot LSTM training", one_hot, min, 1.3),
        ("lengths beside packed, training, least", training[training["case"] == RAGGED.name].x,
         min, 3.0),
    ]  # fmt: skip
    found = [
        {"target": name, "wanted": f">= {least}", "found": reduce(values.dropna())}
        | {"reached": reduce(values.dropna()) >= least}
        for name, values, reduce, least in wanted
        if len(values.dropna())
    ]
    for name, most in (("forward", 60), ("backward", 80)):
        worst = max((row[f"{name} us"] for row in host), default=None)
        if worst is not None:
            found.append({"target": f"host, {name}, us", "wanted": f"<= {most}", "found": worst,
                          "reached": worst <= most})  # fmt: skip
    return found
