"""The loop over cases: gate, times, training, a line of the table, rows on disk."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import DEFAULT_FOLDER, report
from .cases import EVERY_CELL, Workload, cut_down
from .data import load
from .gate import Gate
from .measure import PASSES, BenchmarkCase, Settings, in_fresh_processes, interleaved, on_cuda
from .models import Model, Training, train
from .progress import progress, say
from .providers import PROVIDERS, TORCH, build

Rows = dict[tuple[str, str], dict[str, Any]]  # by provider and pass


def run(
    options: argparse.Namespace, plan: Sequence[tuple[Workload, Sequence[str]]],
    cells: Sequence[str] = EVERY_CELL, trains: bool = False, processes: int = 0,
    gate_only: bool = False,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Measures the providers of each workload, by every cell of ``cells`` that it has.

    Each case is timed in some new ``processes``, with 0 in this one.

    Returns:
        The rows of all cases, and the exit code: 1 if a result was wrong or a provider failed.
    """
    started = time.monotonic()
    if options.quick:
        plan = [(cut_down(workload), providers) for workload, providers in plan]
    times = (1e-3, 1) if options.quick else (0.3 if processes else 0.7, 3)
    settings = Settings(torch.device(options.device), options.seed, *times)
    corpus = None
    if needed := max((max(w.train, w.test) for w, _ in plan), default=0):
        corpus = load(options.imdb, options.download, options.seed, needed)
    env = report.environment(settings.device, corpus.source if corpus else "random, series")
    results = report.Results(options.out or DEFAULT_FOLDER, env, options.resume)
    done = results.done()
    print(report.head(env, trains, options.quick), flush=True)
    every: list[dict[str, Any]] = []
    work = [(w, who, cell) for w, who in plan for cell in w.cells if cell in cells]
    for workload, providers, cell in progress(work, lambda w: f"{w[0].name} {w[2]}"):
        if time.monotonic() - started > 60 * options.minutes:
            say(f"--minutes ended before {workload.name} {cell}")
            break
        if (workload.name, cell) in done:
            continue
        begun = {"case": workload.name, "cell": cell}  # a resumed run skips what ended the process
        report.append(results.folder / "begun.csv", begun, [begun])
        case = BenchmarkCase.of(workload, cell, settings, corpus)
        rows, trainings = gated(case, providers), {}
        if not gate_only:
            alone = case._replace(examples=None, start=None), rows, settings
            if processes:
                rows = middle(in_fresh_processes(processes, timed, *alone))
            else:
                rows = timed(*alone)
            trainings = trained(case, able(rows, "training"), settings) if trains else {}
        results.add(rows.values(), trainings)
        every += rows.values()
        say("\n".join(report.lines(rows, trainings)))
    print(report.LEGEND)
    print(f"{time.monotonic() - started:.0f} s; CSV in {results.folder}", flush=True)
    planned = {(workload.name, cell) for workload, _, cell in work}
    code = 0
    for row in report.read(results.folder / "results.csv"):  # also of the run that is continued
        if row["gate"] in ("red", "failed") and (row["case"], row["cell"]) in planned:
            name = " ".join(row[key] for key in ("case", "cell", "provider", "pass"))
            print(f"{name}: {row['gate']}, {row['note']}", file=sys.stderr)
            code = 1
    return every, code


@contextmanager
def guarded(row: dict[str, Any]) -> Iterator[None]:
    """Writes into a provider's row why it has no numbers, instead of raising."""
    try:
        yield
    except NotImplementedError as error:
        row |= {"gate": "refused", "note": str(error).partition("\n")[0]}
    except Exception as error:  # other implementations may fail in any way
        if "CUDA error" in str(error):  # no later call of this process would work
            raise
        note = f"{type(error).__name__}: {error}".partition("\n")[0]
        row |= {"gate": "failed", "note": note}


def gated(case: BenchmarkCase, providers: Sequence[str]) -> Rows:
    """Returns a row for each provider and pass, with the verdict of the gate."""
    rows: Rows = {}
    gate, w = Gate(case), case.workload
    common = {
        "case": w.name, "cell": case.cell, "dtype": w.dtype, "T": w.T, "B": w.B, "I": w.I, "H": w.H,
        "layers": w.layers, "directions": 1 + w.bidirectional,
        "layout": "packed" if w.ragged else "padded", "precision": case.precision(),
    }  # fmt: skip
    for provider in providers:
        for mode in PASSES[: 1 if PROVIDERS[provider].step else 2]:
            row = rows[provider, mode] = common | {"pass": mode, "provider": provider}
            with guarded(row):
                told = case.explain(provider, mode)
                row["backend"] = told.backend if told else ""
                row["plan"] = "; ".join(told.layers).replace("\n", " ") if told else ""
                if provider.startswith(TORCH):
                    row["gate"] = "reference"
                    continue
                # The gate differentiates more than training does, so the backend is named.
                by_name = f"fusedrnn {row['backend']}" if mode == "training" else provider
                judged = by_name if provider == "fusedrnn" and by_name in PROVIDERS else provider
                row |= gate.judge(judged, backward=mode == "training")
    return rows


def able(rows: Rows, mode: str) -> list[str]:
    """Returns the providers whose pass may be timed."""
    return [p for (p, m), row in rows.items() if m == mode and row["gate"] in ("reference", "ok")]


def timed(case: BenchmarkCase, rows: Rows, settings: Settings) -> Rows:
    """Adds times and memory to the rows of the providers that passed the gate."""
    for mode in PASSES:
        calls = {}
        for provider in able(rows, mode):
            with guarded(rows[provider, mode]), PROVIDERS[provider].context():
                calls[provider] = case.call(provider, mode)
                calls[provider]()
        calls = {provider: calls[provider] for provider in able(rows, mode)}
        for provider, taken in interleaved(calls, settings).items():
            row = rows[provider, mode]
            row |= taken if TORCH in calls else taken | {"x": None}
            if mode == "training":
                row["kept_mb"] = case.kept_mb(provider)
            if settings.device.type == "cuda":
                with PROVIDERS[provider].context():
                    row |= on_cuda(calls[provider])
    return rows


def middle(runs: Sequence[Rows]) -> Rows:
    """Returns each row of the process with the median ratio, and the range of the ratios."""
    rows = {}
    for key in runs[0]:
        ordered = sorted((run[key] for run in runs), key=lambda row: row.get("x") or 0.0)
        ends = {"x_low": ordered[0].get("x"), "x_high": ordered[-1].get("x")}
        rows[key] = ordered[len(ordered) // 2] | ends
    return rows


def trained(
    case: BenchmarkCase, providers: Sequence[str], settings: Settings
) -> dict[str, Training]:
    """Trains the workload's model by each provider, from the same start."""
    trainings, workload, device = {}, case.workload, settings.device
    steps = workload.gpu_steps if device.type == "cuda" else workload.steps
    for provider in providers:
        model = Model(build(provider, case.cell, workload), workload).to(device)
        model.load_state_dict(case.start or {})
        with PROVIDERS[provider].context():
            trainings[provider] = train(model, workload, case.examples, steps, settings.seed)
    return trainings
