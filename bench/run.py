"""The loop over cases: gate, times, training, a line of the table, rows on disk."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import DEFAULT_FOLDER, UserError, report
from .cases import CELLS, EVERY_CELL, RAGGED, TRAINED, Workload, cut_down, named
from .data import load
from .gate import Gate
from .measure import PASSES, BenchmarkCase, Call, Settings, graph_ms, in_fresh_process, interleaved
from .models import MODELS
from .providers import PROVIDERS, TORCH, absent, build, matmul_fp32
from .report import Results
from .train import Training, train

OPTIONS = ("device", "out", "seed", "quick")  # of ragged; the main job has all
Rows = dict[tuple[str, str], dict[str, Any]]  # by provider and pass
Plan = Sequence[tuple[Workload, Sequence[str]]]  # workloads, each with its providers


def run(
    options: Any,
    plan: Plan,
    cells: Sequence[str] = EVERY_CELL,
    *,
    trains: bool = False,
    processes: int = 0,
) -> tuple[list[dict[str, Any]], int]:
    """Measures every provider on its workloads, by every cell.

    Args:
        options: of the command line.
        plan: who is measured on what.
        cells: only these of each workload.
        trains: whether torch.nn and fusedrnn are trained too.
        processes: how many new processes time each case; 0 times it in this process.

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
        reviews = min(2 * needed, 25_000)  # drawn from twice as many, as from the real file
        corpus = load(options.imdb, download=options.download, seed=options.seed, reviews=reviews)
    env = report.environment(settings.device, corpus.source if corpus else "random, series")
    results = Results(options.out or DEFAULT_FOLDER, env, options.resume)
    done = _begun(results) if options.resume else set()
    print(f"{report.header(env, options.quick)}\n{report.head(trains)}", flush=True)
    table = report.main_lines if trains else report.case_lines
    every: list[dict[str, Any]] = []
    complaints: list[str] = []
    work = [(w, who, cell) for w, who in plan for cell in w.cells if cell in cells]
    for workload, providers, cell in report.progress(work):
        if time.monotonic() - started > 60 * (options.minutes or float("inf")):
            report.say(f"--minutes ended before {workload.name} {cell}")
            break
        if (workload.name, cell) in done:
            continue
        results.begin(workload.name, cell)
        case = BenchmarkCase.of(workload, cell, settings, corpus)
        rows, trainings = gated(case, providers, complaints), {}
        if not options.gate_only:
            alone = case._replace(examples=None, start=None), rows, settings
            if processes:
                rows = middle([in_fresh_process(timed, *alone) for _ in range(processes)])
            else:
                rows = timed(*alone)
            trainings = trained(case, able(rows, "training"), settings) if trains else {}
        failed = [row["note"] for row in rows.values() if row["gate"] == "failed"]
        complaints += [f"{workload.name} {cell}: {note}" for note in failed]
        results.add(rows.values(), trainings)
        every += rows.values()
        for line in table(rows, trainings):
            report.say(line)
    print(f"\n{report.LEGENDS[trains]}")
    print(f"{time.monotonic() - started:.0f} s; CSV in {results.folder}", flush=True)
    print("".join(f"{line}\n" for line in complaints), end="", file=sys.stderr)
    return every, 1 if complaints else 0


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
        note = f"{row['provider']}: {type(error).__name__}: {error}"
        row |= {"gate": "failed", "note": note.partition("\n")[0]}


def gated(case: BenchmarkCase, providers: Sequence[str], complaints: list[str]) -> Rows:
    """Returns a row for each provider and pass; adds a line for each tensor that is wrong."""
    rows: Rows = {}
    gate = Gate(case)
    for provider in providers:
        for mode in PASSES[: 1 if PROVIDERS[provider].step else 2]:
            row = rows[provider, mode] = report.row_of(case, mode, provider)
            with guarded(row):
                told = case.explain(provider, mode)
                loop = told and told.backend == "torch"
                row["backend"] = told.backend if told else ""
                row["plan"] = "; ".join(told.layers).replace("\n", " ") if told else ""
                fp32 = case.x.device.type == "cuda" and case.x.dtype == torch.float32
                precision = (matmul_fp32 if loop else PROVIDERS[provider].fp32)() if fp32 else ""
                row["precision"] = precision
                if provider.startswith(TORCH):
                    row["gate"] = "reference"
                    continue
                # The gate differentiates more than training does, so the backend is named.
                by_name = f"fusedrnn {row['backend']}" if mode == "training" else provider
                judged = by_name if provider == "fusedrnn" and by_name in PROVIDERS else provider
                verdict = gate.judge(judged, precision, backward=mode == "training")
                row |= {"gate": "ok" if verdict.ok else "red", "share": verdict.share}
                row["error"] = verdict.error
                name = f"{case.workload.name} {case.cell} {provider} {mode}"
                complaints += [f"{name}: {line}" for line in verdict.failures]
    return rows


def able(rows: Rows, mode: str) -> list[str]:
    """Returns the providers whose pass may be timed."""
    return [p for (p, m), row in rows.items() if m == mode and row["gate"] in ("reference", "ok")]


def timed(case: BenchmarkCase, rows: Rows, settings: Settings) -> Rows:
    """Adds times and memory to the rows of the providers that passed the gate."""
    cuda = settings.device.type == "cuda"
    for mode in PASSES:
        calls: dict[str, Call] = {}
        for provider in able(rows, mode):
            with guarded(rows[provider, mode]):
                calls[provider] = case.call(provider, mode)
                calls[provider]()
        calls = {provider: calls[provider] for provider in able(rows, mode)}
        device, seconds, least = settings.device, settings.seconds, settings.least_rounds
        times = interleaved(calls, device, seconds=seconds, least=least) if calls else {}
        for provider, taken in times.items():
            row = rows[provider, mode]
            row |= {"ms": taken.p50, "p20": taken.p20, "p80": taken.p80, "rounds": taken.rounds}
            row["x"] = taken.x if TORCH in calls else None
            if mode == "training":
                row["kept_mb"] = case.kept_mb(provider)
                row["peak_mb"] = case.peak_mb(provider) if cuda else None
            try:
                row["device_ms"] = graph_ms(calls[provider]) if cuda else None
            except RuntimeError as error:
                row["note"] = f"not captured in a CUDA graph: {error}".partition("\n")[0]
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
    trainings = {}
    for provider in providers:
        workload, device = case.workload, settings.device
        model = MODELS[workload.task](build(provider, case.cell, workload), workload)
        model.load_state_dict(case.start or {})
        steps = workload.gpu_steps if device.type == "cuda" else workload.steps
        with PROVIDERS[provider].context():
            trainings[provider] = train(
                model.to(device), workload, case.examples, steps, device, settings.seed
            )
    return trainings


def _begun(results: Results) -> set[tuple[str, str]]:
    """Returns the cases of a folder; those that ended a process get a row that says so."""
    with open(results.folder / "results.csv", newline="") as file:
        done = {(row["case"], row["cell"]) for row in csv.DictReader(file)}
    path = results.folder / "begun.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    begun = {(line.split()[0], line.split()[1]) for line in lines}
    note = {"gate": "failed", "note": "its process ended"}
    results.add({"case": case, "cell": cell} | note for case, cell in sorted(begun - done))
    return done | begun


def main_job(options: argparse.Namespace) -> int:
    """Compares results, speed and training of fusedrnn with torch.nn on IMDB and the series."""
    plan = [(w, (TORCH, "fusedrnn")) for w in TRAINED if options.command in (None, w.group)]
    return run(options, plan, CELLS, trains=True)[1]


def cases_job(options: argparse.Namespace) -> int:
    """Gates and times every provider on the named cases.

    Raises:
        UserError: there is no such case or provider.
    """
    workloads, device = named(options.names), torch.device(options.device)
    wanted = (options.providers or "all").split(",")
    wanted = list(PROVIDERS) if "all" in wanted else [TORCH, *wanted]
    for name in wanted:
        if name not in PROVIDERS:
            raise UserError(f"there is no provider {name!r}; there are {', '.join(PROVIDERS)}")
        if reason := absent(name, device):
            print(f"absent   {name}: {reason}")
    who = [name for name in dict.fromkeys(wanted) if not absent(name, device)]
    plan = [(w, [name for name in who if _applies(name, w)]) for w in workloads]
    _, code = run(options, plan, (options.cells or "lstm,gru,rnn").split(","))
    if published := [w.name for w in workloads if w.group in ("kernelbench", "deepbench")]:
        from . import references

        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        print("\n".join(["", references.HEADER, *references.lines(published, gpu)]))
    return code


def _applies(provider: str, workload: Workload) -> bool:
    """Returns False where a provider would only repeat another one."""
    entry = PROVIDERS[provider]
    return (not entry.layout or workload.ragged) and (not entry.step or workload.T == 1)


def ragged_job(options: argparse.Namespace) -> int:
    """Compares sequences of different lengths: padded, packed, and with ``lengths``."""
    plan = [(RAGGED, (TORCH, "torch.nn padded", "fusedrnn", "fusedrnn lengths"))]
    return run(options, plan)[1]
