"""``python -m bench --cases``: every provider on every case; docs/benchmarking.md is the protocol.

A block of cases goes through four stages, each for all its cases before the next: gate, warm up,
memory, time. So nothing is compiled, tuned or first allocated while something else is timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import torch

from . import plots
from .cases import EVERY_CELL, Workload
from .gate import Gate
from .imdb import Corpus
from .providers import PROVIDERS, TORCH, absent, peer_versions
from .report import clock_cell, environment, header, ms_text, number_cell
from .results import Results, Row
from .run import Settings, Subject, enter_times, judged
from .timing import Call, Times, WallClock, captured, interleaved, warm

CELLS = EVERY_CELL
#: Values of inputs and outputs that a block of cases holds at a time: 1 GB in fp32.
BLOCK = 2**28
_MODE_HEAD = f"{'x':>5} {'device':>6} {'floor':>6}"
HEAD = (
    f"{'case':<14} {'cell':<4} {'provider':<20} {'gate':>8} {'error':>5} "
    f"{'forward ms':>19} {_MODE_HEAD} {'fw+bw ms':>19} {_MODE_HEAD} {'kept':>6} {'peak':>6}"
)
LEGEND = """\
gate: the largest error as a part of the allowed one; error: the largest of output and final states
against torch.nn in fp64. ms: wall time, median and 20th-80th percentile over interleaved rounds; x:
median over the rounds of torch.nn's time / this one's, in this run. device: ms of the replay of a
CUDA graph. floor: ms that our own plan takes at least, modelled, not measured. "-": there is none,
as on the CPU. kept: MB that autograd keeps for backward; peak: MB of CUDA memory of forward and
backward."""


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
        at: Callable[[str], object] = lambda provider: None,
    ):
        """Gates everybody.

        Args:
            workload, cell, settings, providers, corpus: the case, and who takes part.
            at: told whose code runs next; ``""``, if everybody's.
        """
        self.at = at
        self.subject = Subject(workload, cell, settings, corpus)
        self.rows: dict[str, Row] = {}
        self.complaints: list[str] = []
        self.calls: dict[str, dict[str, Call]] = {"fw": {}, "fwbw": {}}
        gate = Gate(workload, cell, self.subject.weights, self.subject.gate_input())
        for provider in providers:
            at(provider)
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
        at("")

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

        def warmed(provider: str) -> None:
            for calls in self.calls.values():
                warm({provider: calls[provider]} if provider in calls else {})

        self._each(warmed)

    def measure_memory(self) -> None:
        def measured(provider: str) -> None:
            if provider in self.calls["fwbw"] and provider != "jax":  # which torch does not see
                self.rows[provider].kept_mb = self.subject.kept_mb(provider)
                if self.subject.settings.device.type == "cuda":
                    self.rows[provider].peak_mb = self.subject.peak_mb(provider)

        self._each(measured)

    def _each(self, work: Callable[[str], None]) -> None:
        for provider in [name for name, row in self.rows.items() if row.has_numbers]:
            self.at(provider)
            try:
                work(provider)
            except Exception as error:
                row = self.rows[provider] = self._without(provider, "failed", error)
                self.complaints.append(f"{row.workload} {row.cell} {provider}: {row.note}")
                self.drop(provider)
        self.at("")

    def time(self) -> None:
        settings = self.subject.settings
        limits = {"seconds": settings.seconds, "least": settings.least_rounds}
        for mode, calls in self.calls.items():
            clock = WallClock(settings.device)
            taken = interleaved(calls, settings.device, clock=clock, warmed=True, **limits)  # type: ignore[arg-type]
            self._enter(mode, "ms", taken)
            for provider, times in taken.items():
                self.rows[provider].rounds = times.rounds
            if settings.device.type == "cuda":
                self._replayed(mode, limits)

    def _replayed(self, mode: str, limits: dict) -> None:
        """Device time. A call that no graph can hold has none, and a note says why."""
        device = self.subject.settings.device
        replays = {}
        for provider, call in self.calls[mode].items():
            row = self.rows[provider]
            self.at(provider)
            try:
                replays[provider] = captured(call, device)
            except RuntimeError as error:
                note = f"no graph of {mode}: {str(error).splitlines()[0]}"
                row.note = "; ".join(filter(None, (row.note, note)))
        self.at("")
        self._enter(mode, "device_ms", interleaved(replays, device, **limits))

    def _enter(self, mode: str, clock: str, taken: dict[str, Times]) -> None:
        """Into the rows; without torch.nn there are no ratios."""
        for provider, times in taken.items():
            enter_times(self.rows[provider], mode, times, clock)
            if TORCH not in taken:
                setattr(self.rows[provider], f"{mode}_{clock.removesuffix('ms')}speedup", None)


def values_of(workload: Workload) -> int:
    """Values of input and outputs that are held for a case."""
    width = workload.I + 2 * workload.layers * (1 + workload.bidirectional) * workload.H
    return workload.T * workload.B * width


def blocks(workloads: Sequence[Workload]) -> Iterator[list[Workload]]:
    """Consecutive cases that fit into memory together."""
    block: list[Workload] = []
    size = 0
    for workload in workloads:
        values = len(CELLS) * values_of(workload)
        if block and size + values > BLOCK:
            yield block
            block, size = [], 0
        block.append(workload)
        size += values
    yield block


Guard = Callable[[int, str], AbstractContextManager[object]]


def measured(
    prepare: Sequence[Callable[[], Prepared]],
    end: float = float("inf"),
    gating: float = float("inf"),
    guard: Guard = lambda case, stage: nullcontext(),
) -> Iterator[tuple[int, Prepared]]:
    """All cases gated, then all warmed, then memory, and only then the first is timed.

    Nothing is begun after ``end`` (of ``time.monotonic``). As a gate without a time is worth
    little, no case but the first is gated in the second half of what is left.

    Args:
        prepare: gates a case, each.
        end: when the last may begin.
        gating: seconds after which no further case is gated.
        guard: is entered around each stage of each case; a case whose exception it keeps to itself
            goes no further.

    Yields:
        Each case that was timed, and its number.
    """
    begun = time.monotonic()
    half = min((begun + end) / 2, begun + gating)
    made: dict[int, Prepared] = {}
    for case, gated in enumerate(prepare):
        if case and time.monotonic() > half:
            break
        with guard(case, "gate"):
            made[case] = gated()
    for stage in ("warm", "measure_memory"):
        for case in list(made):
            if time.monotonic() > end:
                break
            prepared = made.pop(case)
            with guard(case, stage):
                getattr(prepared, stage)()
                made[case] = prepared
    for case in sorted(made):  # what is not warm by now comes after the end
        if time.monotonic() > end:
            break
        prepared, timed = made.pop(case), False
        with guard(case, "time"):
            prepared.time()
            timed = True
        if timed:
            yield case, prepared


def measure_block(
    block: Sequence[Workload],
    settings: Settings,
    providers: Sequence[str],
    corpus: Corpus | None,
    end: float = float("inf"),
) -> Iterator[Prepared]:
    """Every workload of a block by every cell, in the stages of ``measured``."""
    prepare = [
        partial(Prepared, w, c, settings, providers, corpus) for w, c in product(block, CELLS)
    ]
    return (prepared for _, prepared in measured(prepare, end))


def who(device: torch.device) -> dict[str, dict[str, str]]:
    """For environment.json: the peers' versions, and who is absent and why."""
    out = {name: reason for name in PROVIDERS if (reason := absent(name, device))}
    return {"peers": peer_versions(), "absent": out}


def roll(found: dict[str, dict[str, str]]) -> str:
    """What ``who`` found, in lines under the header."""
    peers = ", ".join(f"{name} {version}" for name, version in found["peers"].items())
    lines = [f"absent   {name}: {reason}" for name, reason in found["absent"].items()]
    return "\n".join([f"peers    {peers or 'none'}", *lines])


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
    here = who(settings.device)
    env = environment(settings.device, corpus.source if corpus else "random numbers") | here
    results = Results(folder, env)
    print(f"{header(env)}\n{roll(here)}")
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
    start = f"{row.workload:<14} {row.cell:<4} {row.provider:<20} {gate:>8} "
    if not row.has_numbers:
        return (start + row.note)[: len(HEAD)]
    cells = [number_cell(row.error, ".0e", 5)]
    for mode in ("fw", "fwbw"):
        ms, p20, p80, x, device, floor = (
            getattr(row, f"{mode}_{field}")
            for field in ("ms", "ms_p20", "ms_p80", "speedup", "device_ms", "floor_ms")
        )
        cells += [clock_cell(ms, p20, p80), number_cell(x, ".2f", 5)]
        cells += [_small(device), _small(floor)]
    return f"{start}{' '.join(cells)} {_small(row.kept_mb)} {_small(row.peak_mb)}"


def _small(value: float | None) -> str:
    """A number in six places, or that there is none."""
    if value is None:
        return f"{'-':>6}"
    return f"{value:>6.3f}" if value < 1 else f"{ms_text(value):>6}"
