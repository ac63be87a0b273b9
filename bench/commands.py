"""The commands that run the loop over cases: demo and its parts, ragged, cases, cpu."""

import argparse
from statistics import geometric_mean
from typing import Any

import torch

from . import UserError, cases, references
from .host import cell_lines
from .measure import in_fresh_processes
from .providers import PROVIDERS, TORCH, absent
from .report import COLUMNS
from .run import run

#: Who is measured on the CPU beside torch.nn, where it is not fusedrnn alone.
SPECIAL = {
    cases.ONE_HOT: ("fusedrnn", "fusedrnn torch", "fusedrnn recompute"),
    cases.CHARACTER: ("fusedrnn", "fusedrnn stream"),
    cases.RAGGED: ("fusedrnn lengths",),
}


def demo(options: argparse.Namespace) -> int:
    """Compares results, speed and training of fusedrnn with torch.nn on IMDB and the series."""
    plan = [(w, (TORCH, "fusedrnn")) for w in cases.TRAINED if options.command in ("demo", w.group)]
    return run(options, plan, cases.CELLS, trains=True)[1]


def ragged(options: argparse.Namespace) -> int:
    """Compares sequences of different lengths: padded, packed, and with ``lengths``."""
    return run(
        options, [(cases.RAGGED, (TORCH, "torch.nn padded", "fusedrnn", "fusedrnn lengths"))]
    )[1]


def on_cases(options: argparse.Namespace) -> int:
    """Gates and times the providers on the cases, and prints the published times of these."""
    if options.names is None:
        for w in cases.every_case():
            print(f"{w.name:<28} {w.group:<12} {w.shape} {w.dtype} {', '.join(w.cells)}")
        return 0
    workloads, device = cases.named(options.names), torch.device(options.device)
    cells = options.cells.split(",") if options.cells else cases.EVERY_CELL
    wanted = [TORCH, *(options.providers.split(",") if options.providers else PROVIDERS)]
    for kind, names, known in (("provider", wanted, PROVIDERS), ("cell", cells, cases.EVERY_CELL)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"there is no {kind} {unknown[0]!r}; there are {', '.join(known)}")
    reasons = {name: absent(name, device) for name in wanted}
    print("".join(f"absent   {name}: {why}\n" for name, why in reasons.items() if why), end="")
    who = [name for name, why in reasons.items() if not why]
    plan = [(w, [name for name in who if applies(name, w)]) for w in workloads]
    _, code = run(options, plan, cells, gate_only=options.gate_only)
    if published := [w.name for w in workloads if w.group in ("kernelbench", "deepbench")]:
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        print("\n".join(["", references.HEADER, *references.lines(published, gpu)]))
    return code


def applies(provider: str, workload: cases.Workload) -> bool:
    """Returns False where a provider would only repeat another one."""
    entry = PROVIDERS[provider]
    return (not entry.layout or workload.ragged) and (not entry.step or workload.T == 1)


def cpu(options: argparse.Namespace) -> int:
    """Measures all cases, and prints the geometric means.

    Each case is timed in new processes, because times depend on the heap and on which CPUs a
    process gets. The row is that of the process in the middle.
    """
    options.device = "cpu"
    workloads = (
        cases.named(options.only) if options.only else (*cases.LESSONS, cases.LONG, cases.RAGGED)
    )
    plan = [(w, (TORCH, *SPECIAL.get(w, ("fusedrnn",)))) for w in workloads]
    rows, code = run(options, plan, processes=1 if options.quick else 3)
    summary(rows)
    if not options.only:
        print("", *in_fresh_processes(1, cell_lines)[0], sep="\n")
    return code


def summary(rows: list[dict[str, Any]]) -> None:
    import pandas

    frame = pandas.DataFrame(rows, columns=COLUMNS).dropna(subset=["x"])
    groups = frame[frame.provider == "fusedrnn"].groupby(["cell", "pass"], sort=False)
    table = groups.x.agg(["min", geometric_mean, "count"]).reset_index()
    print(f"\ntorch.nn's time / fusedrnn's\n{table.to_markdown(index=False, floatfmt='.2f')}")
