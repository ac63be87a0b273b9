"""``python -m bench --cases``: every provider on every case; docs/benchmarking.md is the protocol.

A block of cases goes through four stages, each for all its cases before the next: gate, warm up,
memory, time. So nothing is compiled, tuned or first allocated while something else is timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch

from . import plots
from .cases import EVERY_CELL, Workload
from .gate import Gate
from .imdb import Corpus
from .providers import PROVIDERS, TORCH, absent, peer_versions
from .report import clock_cell, environment, header, number_cell
from .results import Results, Row
from .run import Settings, Subject, enter_times, judged
from .timing import Call, WallClock, captured, interleaved, warm

CELLS = EVERY_CELL
#: Values of inputs and outputs that a block of cases holds at a time: 1 GB in fp32.
BLOCK = 2**28
HEAD = (
    f"{'case':<15} {'cell':<4} {'provider':<20} {'gate':>8} {'error':>7} "
    f"{'forward ms':>19} {'x':>5} {'device':>7} {'fw+bw ms':>19} {'x':>5} {'device':>7} "
    f"{'kept MB':>8}"
)
LEGEND = """\
gate: the largest error as a part of the allowed one; error: the largest of output and final states
against torch.nn in fp64. ms: wall time, median and 20th-80th percentile over interleaved rounds; x:
median over the rounds of torch.nn's time / this one's, in this run. device: ms of the replay of a
CUDA graph, "-" on the CPU. kept: what autograd keeps for backward."""


class ProviderError(ValueError):
    """No provider has this name; the message is one sentence."""


class Prepared:
    """A workload and cell whose providers are gated: the rows, and what is to be timed."""

    def __init__(
        self,
        workload: Workload,
        cell: str,
        settings: Settings,
        providers: Sequence[str],
        corpus: Corpus | None = None,
    ):
        self.subject = Subject(workload, cell, settings, corpus)
        self.rows: dict[str, Row] = {}
        self.complaints: list[str] = []
        self.calls: dict[str, dict[str, Call]] = {"fw": {}, "fwbw": {}}
        gate = Gate(workload, cell, self.subject.weights, self.subject.gate_input())
        for provider in providers:
            try:
                row, failures = judged(gate, self.subject, provider)
                if row.has_numbers:
                    self._call(provider)
            except NotImplementedError as error:
                row, failures = self._without(provider, "refused", error), []
            except Exception as error:  # others' code: one that breaks must not end the rest
                row = self._without(provider, "failed", error)
                failures = [row.note]
                self.drop(provider)
            self.rows[provider] = row
            self.complaints += [f"{workload.name} {cell} {provider}: {line}" for line in failures]

    def _without(self, provider: str, gate: str, error: Exception) -> Row:
        note = f"{type(error).__name__}: {error}" if gate == "failed" else str(error)
        note = note.splitlines()[0]
        subject = self.subject
        return Row.of(subject.workload, subject.cell, provider, backend="", gate=gate, note=note)

    def _call(self, provider: str) -> None:
        modes = ("fw", "fwbw") if PROVIDERS[provider].backward else ("fw",)
        self.calls |= {
            m: {**self.calls[m], provider: self.subject.call(provider, m)} for m in modes
        }

    def drop(self, provider: str) -> None:
        for calls in self.calls.values():
            calls.pop(provider, None)

    def warm(self) -> None:
        """Compiles, tunes and allocates; a provider that breaks now is not timed."""
        for provider in list(self.rows):
            try:
                for calls in self.calls.values():
                    warm({provider: calls[provider]} if provider in calls else {})
            except Exception as error:
                row = self.rows[provider] = self._without(provider, "failed", error)
                self.complaints.append(f"{row.workload} {row.cell} {provider}: {row.note}")
                self.drop(provider)

    def measure_memory(self) -> None:
        for provider in self.calls["fwbw"]:
            if provider != "jax":  # whose memory torch does not see
                self.rows[provider].kept_mb = self.subject.kept_mb(provider)
                if self.subject.settings.device.type == "cuda":
                    self.rows[provider].peak_mb = self.subject.peak_mb(provider)

    def time(self) -> None:
        settings = self.subject.settings
        limits = {"seconds": settings.seconds, "least": settings.least_rounds}
        for mode, calls in self.calls.items():
            clock = WallClock(settings.device)
            taken = interleaved(calls, settings.device, clock=clock, warmed=True, **limits)  # type: ignore[arg-type]
            for provider, times in taken.items():
                enter_times(self.rows[provider], mode, times)
                self.rows[provider].rounds = times.rounds
            if settings.device.type == "cuda":
                self._replayed(mode, limits)

    def _replayed(self, mode: str, limits: dict) -> None:
        """Device time. A call that no graph can hold has none, and a note says why."""
        device = self.subject.settings.device
        replays = {}
        for provider, call in self.calls[mode].items():
            try:
                replays[provider] = captured(call, device)
            except RuntimeError as error:
                self.rows[provider].note = f"no graph of {mode}: {str(error).splitlines()[0]}"
        for provider, times in interleaved(replays, device, **limits).items():
            row = self.rows[provider]
            setattr(row, f"{mode}_device_ms", times.p50)
            if TORCH in replays:
                setattr(row, f"{mode}_device_speedup", times.speedup)


def blocks(workloads: Sequence[Workload]) -> Iterator[list[Workload]]:
    """Consecutive cases that fit into memory together."""
    block: list[Workload] = []
    size = 0
    for workload in workloads:
        width = workload.I + 2 * workload.layers * (1 + workload.bidirectional) * workload.H
        values = len(CELLS) * workload.T * workload.B * width
        if block and size + values > BLOCK:
            yield block
            block, size = [], 0
        block.append(workload)
        size += values
    yield block


def measure_block(
    block: Sequence[Workload],
    settings: Settings,
    providers: Sequence[str],
    corpus: Corpus | None,
    end: float = float("inf"),
) -> Iterator[Prepared]:
    """All of a block gated, then all warmed, then memory, and only then the first is timed.

    Nothing is begun after ``end`` (of ``time.monotonic``). As a gate without a time is worth
    little, no case but the first is gated in the second half of what is left.
    """
    half = (time.monotonic() + end) / 2
    made: list[Prepared] = []
    for workload, cell in product(block, CELLS):
        if made and time.monotonic() > half:
            break
        made.append(Prepared(workload, cell, settings, providers, corpus))
    for stage in (Prepared.warm, Prepared.measure_memory):
        for prepared in made:
            if time.monotonic() > end:
                break
            stage(prepared)
    for prepared in made:  # what is not warm by now comes after the end
        if time.monotonic() > end:
            break
        prepared.time()
        yield prepared


def chosen(names: str | None, device: torch.device) -> tuple[str, ...]:
    """The providers of ``--providers``, torch.nn first; ``all``, the default, is who can.

    Raises:
        ProviderError: a name is unknown.
    """
    wanted = (TORCH, *("all" if names is None else names).split(","))
    wanted = tuple(PROVIDERS) if "all" in wanted else wanted
    for name in wanted:
        if name not in PROVIDERS:
            raise ProviderError(f"there is no provider {name!r}: {', '.join(PROVIDERS)}")
    return tuple(dict.fromkeys(n for n in wanted if absent(n, device) is None))


def run(
    workloads: Sequence[Workload],
    providers: Sequence[str],
    settings: Settings,
    folder: Path,
    corpus: Corpus | None = None,
    minutes: float | None = None,
) -> int:
    """Prints the table and writes the folder; 1 if a gate was red or a provider broke.

    Raises:
        FolderError: the folder cannot be written.
    """
    device = settings.device
    out = {name: reason for name in PROVIDERS if (reason := absent(name, device))}
    env = environment(device, corpus.source if corpus else "random numbers")
    env |= {"peers": peer_versions(), "absent": out}
    results = Results(folder, env)
    peers = ", ".join(f"{name} {found}" for name, found in peer_versions().items())
    print(f"{header(env)}\npeers    {peers or 'none'}")
    for name, reason in out.items():
        print(f"absent   {name}: {reason}")
    print(f"\n{HEAD}\n{'-' * len(HEAD)}", flush=True)
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    complaints: list[str] = []
    done = 0
    for block in blocks(workloads):
        if time.monotonic() > end:
            break
        for prepared in measure_block(block, settings, providers, corpus, end):
            done += prepared.subject.cell == CELLS[-1]
            results.add(prepared.rows.values())
            complaints += prepared.complaints
            for row in prepared.rows.values():
                print(line(row), flush=True)
    print(f"\n{LEGEND}\n\n{done} of {len(workloads)} cases; {plots.draw(folder)}")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def line(row: Row) -> str:
    """One row of the table; where there are no numbers, the reason."""
    gate = "" if row.gate == "yardstick" else row.gate
    gate += f" {row.share:.2f}" if row.share is not None else ""
    start = f"{row.workload:<15} {row.cell:<4} {row.provider:<20} {gate:>8} "
    if not row.has_numbers:
        return (start + row.note)[: len(HEAD)]
    cells = [number_cell(row.error, ".0e", 7)]
    for mode in ("fw", "fwbw"):
        ms, p20, p80, x, device = (
            getattr(row, f"{mode}_{field}")
            for field in ("ms", "ms_p20", "ms_p80", "speedup", "device_ms")
        )
        cells += [clock_cell(ms, p20, p80), number_cell(x, ".2f", 5)]
        cells.append(f"{'-':>7}" if device is None else number_cell(device, ".3g", 7))
    return f"{start}{' '.join(cells)} {number_cell(row.kept_mb, '.3g', 8)}".rstrip()
