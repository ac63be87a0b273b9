"""The commands that gate and time cases in one process: the main job, ``--cases``, ``ragged``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import DEFAULT_FOLDER, UserError, report
from .cases import CELLS, RAGGED, TRAINED, Workload, cut_down, named
from .data import Corpus, load
from .gate import Gate
from .measure import PASSES, BenchmarkCase, Call, Settings, interleaved
from .models import MODELS
from .providers import PROVIDERS, TORCH, absent, build, matmul_fp32
from .report import Results, environment, header, row_of
from .train import metric_name, train

Rows = dict[tuple[str, str], dict[str, Any]]  # by provider and pass
WIDTHS = {"case": 22, "cell": 4, "provider": 20, "gate": 10, "forward": 24, "training": 24}


def corpus_for(workloads: Sequence[Workload], options: Any) -> Corpus | None:
    """Returns reviews if a workload needs them; twice as many generated ones as it draws."""
    needed = max((2 * max(w.train, w.test) for w in workloads if w.vocabulary), default=0)
    if not needed:
        return None
    reviews = min(needed, 25_000)
    return load(options.imdb, download=options.download, seed=options.seed, reviews=reviews)


def gated(case: BenchmarkCase, providers: Sequence[str]) -> tuple[Rows, list[str]]:
    """Returns a row for each provider and pass, and a line for each tensor that is wrong."""
    rows: Rows = {}
    complaints: list[str] = []
    gate = Gate(case)
    for provider in providers:
        for mode in ("forward",) if PROVIDERS[provider].step else PASSES:
            row = rows[provider, mode] = row_of(case.workload, case.cell, mode, provider)

            def judge(provider: str = provider, mode: str = mode, row: dict = row) -> None:
                told = case.explain(provider, mode)
                row["backend"] = told.backend if told else ""
                row["plan"] = "; ".join(told.layers).replace("\n", " ") if told else ""
                row["precision"] = _precision(case, provider, told)
                if provider.startswith(TORCH):
                    row["gate"] = "reference"
                    return
                # The gate differentiates more than training does, so the backend is named.
                by_name = f"fusedrnn {row['backend']}"
                auto = provider == "fusedrnn" and mode == "training" and by_name in PROVIDERS
                judged = by_name if auto else provider
                found = gate.judge(judged, row["precision"], backward=mode == "training")
                row |= {"gate": "ok" if found.ok else "red", "share": found.share}
                row["error"] = found.error
                name = f"{case.workload.name} {case.cell} {provider} {mode}"
                complaints.extend(f"{name}: {line}" for line in found.failures)

            _guarded(judge, row, complaints)
    return rows, complaints


def _guarded(work: Callable[[], None], row: dict, complaints: list[str]) -> bool:
    """Runs a provider's code; writes why it has no numbers into its row."""
    try:
        work()
        return True
    except NotImplementedError as error:
        row |= {"gate": "refused", "note": str(error).partition("\n")[0]}
    except Exception as error:  # other implementations may fail in any way
        if "CUDA error" in str(error):  # no later call of this process would work
            raise
        row |= {"gate": "failed", "note": f"{type(error).__name__}: {error}".partition("\n")[0]}
        complaints.append(f"{row['case']} {row['cell']} {row['provider']}: {row['note']}")
    return False


def _precision(case: BenchmarkCase, provider: str, told: Any) -> str:
    """Returns how a provider multiplies fp32 on CUDA, else ``""``."""
    if case.x.device.type == "cpu" or case.x.dtype != torch.float32:
        return ""
    loop = told is not None and told.backend == "torch"
    return matmul_fp32() if loop else getattr(told, "precision", None) or PROVIDERS[provider].fp32()


def able(rows: Rows, mode: str) -> list[str]:
    """Returns the providers whose pass may be timed."""
    return [p for (p, m), row in rows.items() if m == mode and row["gate"] in ("reference", "ok")]


def timed(case: BenchmarkCase, rows: Rows, settings: Settings, complaints: list[str]) -> None:
    """Adds times and memory to the rows of the providers that passed the gate."""
    for mode in PASSES:
        calls: dict[str, Call] = {}
        for provider in able(rows, mode):

            def prepare(provider: str = provider, mode: str = mode) -> None:
                call = case.call(provider, mode)
                call()
                calls[provider] = call

            _guarded(prepare, rows[provider, mode], complaints)
        add_times(rows, mode, calls, settings)
        for provider in calls if mode == "training" else ():
            row = rows[provider, mode]
            row["kept_mb"] = case.kept_mb(provider)
            if settings.device.type == "cuda":
                row["peak_mb"] = case.peak_mb(provider)


def add_times(rows: Rows, mode: str, calls: dict[str, Call], settings: Settings) -> None:
    device, limits = settings.device, {"seconds": settings.seconds, "least": settings.least_rounds}
    times = interleaved(calls, device, **limits) if calls else {}  # type: ignore[arg-type]
    for provider, found in times.items():
        row = rows[provider, mode]
        row |= {"ms": found.p50, "p20": found.p20, "p80": found.p80, "rounds": found.rounds}
        row["x"] = found.x if TORCH in calls else None
        if device.type == "cuda":
            try:
                alone = {provider: calls[provider]}
                graphs = interleaved(alone, device, seconds=0.02, least=1, graph=True)
                row["device_ms"] = graphs[provider].p50
            except RuntimeError as error:
                row["note"] = f"not captured in a CUDA graph: {str(error).partition(chr(10))[0]}"


def trained(case: BenchmarkCase, providers: Sequence[str], settings: Settings) -> list[dict]:
    """Trains the model of a workload by each provider; returns lines of training.csv and losses."""
    workload, examples = case.workload, case.examples
    found: list[dict] = []
    for provider in providers:
        rnn = build(provider, case.cell, workload)
        model = MODELS[workload.task](rnn, workload)
        model.load_state_dict(case.start)
        steps = workload.steps_on(settings.device)
        with PROVIDERS[provider].context():
            result = train(
                model.to(settings.device), workload, examples, steps, settings.device, settings.seed
            )
        first = found[0]["losses"] if found else result.losses
        apart = max(abs(a - b) for a, b in zip(result.losses, first, strict=True))
        found.append({
            "case": workload.name, "cell": case.cell, "provider": provider, "steps": steps,
            "final_loss": result.final_loss, "difference": apart, "metric": metric_name(workload),
            "test": result.metric, "losses": result.losses,
        })  # fmt: skip
    return found


def begin(options: Any, workloads: Sequence[Workload]) -> tuple[Settings, Corpus | None, Results]:
    """Loads the data, begins the folder, and prints the header."""
    settings, corpus = Settings.of(options), corpus_for(workloads, options)
    env = environment(settings.device, corpus.source if corpus else "random numbers, series")
    resume = getattr(options, "resume", False)
    results = Results(options.out or DEFAULT_FOLDER, env, resume)
    print(header(env) + ("\nquick    tiny sizes: the times mean nothing" if options.quick else ""))
    return settings, corpus, results


def pairs(
    workloads: Sequence[Workload], cells: Sequence[str], minutes: float | None
) -> Iterator[tuple[Workload, str]]:
    """Yields workloads and cells behind a progress bar, none after ``minutes``."""
    end = time.monotonic() + 60 * (minutes or float("inf"))
    every = [(w, cell) for w in workloads for cell in w.cells if cell in cells]
    bar = report.progress(every)
    for workload, cell in bar:
        if time.monotonic() > end:
            report.say(f"{len(every)} cases were asked for; --minutes ended before {workload.name}")
            return
        if hasattr(bar, "set_description"):
            bar.set_description(f"{workload.name} {cell}")
        yield workload, cell


def ended(complaints: Sequence[str], results: Results, started: float) -> int:
    """Prints the end of a run; returns 1 if there are complaints."""
    print(f"\n{time.monotonic() - started:.0f} s; CSV in {results.folder}", flush=True)
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if complaints else 0


def main_job(options: argparse.Namespace) -> int:
    """Compares results, speed and training of fusedrnn with torch.nn on IMDB and the series."""
    started = time.monotonic()
    group = getattr(options, "group", None)
    workloads = [w for w in TRAINED if group in (None, w.group)]
    workloads = [cut_down(w) for w in workloads] if options.quick else workloads
    settings, corpus, results = begin(options, workloads)
    complaints: list[str] = []
    print(f"\n{report.table_head()}", flush=True)
    for workload, cell in pairs(workloads, CELLS, options.minutes):
        case = BenchmarkCase.of(workload, cell, settings, corpus)
        rows, wrong = gated(case, (TORCH, "fusedrnn"))
        timed(case, rows, settings, wrong)
        trainings = trained(case, able(rows, "training"), settings)
        results.add(rows.values())
        for line in trainings:
            losses = enumerate(line.pop("losses"))
            keys = {name: line[name] for name in ("case", "cell", "provider")}
            results.add(({**keys, "step": s, "loss": x} for s, x in losses), "losses.csv")
        results.add(trainings, "training.csv")
        report.say(report.table_line(report.main_line(list(rows.values()), trainings)))
        complaints += wrong
    print(f"\n{report.LEGEND}")
    return ended(complaints, results, started)


def chosen(names: str | None, device: torch.device) -> tuple[str, ...]:
    """Returns the providers of ``--providers``, torch.nn first; prints those that are absent.

    Raises:
        UserError: a name is unknown.
    """
    wanted = list(PROVIDERS) if names in (None, "all") else [TORCH, *names.split(",")]
    for name in wanted:
        if name not in PROVIDERS:
            raise UserError(f"there is no provider {name!r}; there are {', '.join(PROVIDERS)}")
    reasons = {name: absent(name, device) for name in dict.fromkeys(wanted)}
    for name, reason in reasons.items():
        if reason:
            print(f"absent   {name}: {reason}")
    return tuple(name for name, reason in reasons.items() if not reason)


def run_cases(options: argparse.Namespace) -> int:
    """Gates and times every provider on the named cases."""
    started = time.monotonic()
    workloads = named(options.cases)
    names = [w.name for w in workloads if w.group in ("kernelbench", "deepbench")]
    workloads = tuple(map(cut_down, workloads)) if options.quick else workloads
    providers = chosen(options.providers, torch.device(options.device))
    settings, corpus, results = begin(options, workloads)
    done = _begun(results) if options.resume else set()
    complaints: list[str] = []
    print(f"\n{report.table_head(WIDTHS)}", flush=True)
    for workload, cell in pairs(workloads, workload_cells(options), options.minutes):
        if (workload.name, cell) in done:
            continue
        with open(results.folder / "begun.txt", "a") as file:
            file.write(f"{workload.name} {cell}\n")
        case = BenchmarkCase.of(workload, cell, settings, corpus)
        rows, wrong = gated(case, [p for p in providers if _applies(p, workload)])
        if not options.gate_only:
            timed(case, rows, settings, wrong)
        results.add(rows.values())
        for line in case_lines(rows):
            report.say(report.table_line(line, WIDTHS))
        complaints += wrong
    print(
        "\ngate: the largest error as a part of what is allowed; forward, training: milliseconds, and"
    )
    print("how many times as fast as torch.nn, which is given a PackedSequence if lengths differ.")
    if names:
        from . import references

        gpu = torch.cuda.get_device_name() if settings.device.type == "cuda" else None
        print("\n".join(["", references.HEADER, *references.lines(names, gpu)]))
    return ended(complaints, results, started)


def workload_cells(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(options.cells.split(",")) if getattr(options, "cells", None) else (*CELLS, "rnn")


def _applies(provider: str, workload: Workload) -> bool:
    """Returns False where a provider would only repeat another one."""
    entry = PROVIDERS[provider]
    return (not entry.layout or workload.ragged) and (not entry.step or workload.T == 1)


def _begun(results: Results) -> set[tuple[str, str]]:
    """Returns the cases of a folder; those that ended a process get a row that says so."""
    import csv

    with open(results.folder / "results.csv", newline="") as file:
        done = {(row["case"], row["cell"]) for row in csv.DictReader(file)}
    path = results.folder / "begun.txt"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    begun = {(line.split()[0], line.split()[1]) for line in lines}
    results.add(
        {"case": case, "cell": cell, "gate": "failed", "note": "its process ended"}
        for case, cell in sorted(begun - done)
    )
    return done | begun


def case_lines(rows: Rows) -> Iterator[dict[str, str]]:
    """Yields a line of the table for each provider."""
    for provider in dict.fromkeys(p for p, _ in rows):
        passes = [rows[provider, mode] for mode in PASSES if (provider, mode) in rows]
        first, shares = passes[0], [r["share"] for r in passes if "share" in r]
        gate = next((r["gate"] for r in passes if r["gate"] != "ok"), "ok")
        cells = {"case": first["case"], "cell": first["cell"], "provider": provider}
        cells["gate"] = f"{gate} {max(shares):.2f}" if shares else gate
        for mode in PASSES:
            row = rows.get((provider, mode), {})
            speed = (
                f"{report.ms_text(row['ms'])} ms" if row.get("ms") else row.get("note", "-")[:24]
            )
            cells[mode] = f"{speed}, {row['x']:.2f}x" if row.get("x") else speed
        yield cells


def run_ragged(options: argparse.Namespace) -> int:
    """Compares sequences of different lengths: padded, packed, and with ``lengths``."""
    options.cases, options.providers = RAGGED.name, "torch.nn padded,fusedrnn,fusedrnn lengths"
    return run_cases(options)
