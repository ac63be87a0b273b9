"""Times several ways to do one thing, in turns, so that a machine's moods fall on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]
#: Enough to evict the L2 cache of every GPU there is (B200: 126 MB).
_FLUSH_BYTES = 256 << 20


class Times(NamedTuple):
    """Milliseconds over the rounds, and how many times as fast as the first contender."""

    p50: float
    p20: float
    p80: float
    speedup: float  # median over the rounds of first's time / this one's
    rounds: int


def interleaved(
    calls: dict[str, Call],
    device: torch.device,
    *,
    seconds: float,
    least: int = 3,
    most: int = 200,
    clock: Clock | None = None,
    warmed: bool = False,
) -> dict[str, Times]:
    """Times each call once a round, in rotating order, after one or two untimed rounds.

    Args:
        calls: what to time, by name; the first is the yardstick of the ratios.
        device: where the calls compute. On CUDA events take the time of one call behind a
            flush of the L2 cache, which also hides Python's part of a launch as a busy GPU would.
        seconds: stop after about so long, warm-up included.
        least, most: bounds of the number of rounds; ``least`` rounds are run whatever they take.
        clock: what takes the milliseconds of one call, if not the device's own.
        warmed: whether ``warm`` was called; then every round is timed.
    """
    clock = clock or (_CudaClock(device) if device.type == "cuda" else _cpu_clock)
    deadline = time.perf_counter() + seconds
    names = list(calls)
    if not warmed:
        warm(calls, deadline)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(most):
        if round_ >= least and time.perf_counter() > deadline:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock(calls[name]))
    return {name: _summary(samples[names[0]], taken) for name, taken in samples.items()}


def warm(calls: dict[str, Call], deadline: float | None = None) -> None:
    """Two untimed rounds; one, if the deadline (of ``perf_counter``) has passed after it."""
    for _ in range(2):
        for call in calls.values():
            call()
        if deadline is not None and time.perf_counter() > deadline:
            break  # slow calls: the second round would warm nothing


def _summary(yardstick: list[float], taken: list[float]) -> Times:
    ratios = [first / this for first, this in zip(yardstick, taken, strict=True)]
    return Times(
        median(taken), quantile(taken, 0.2), quantile(taken, 0.8), median(ratios), len(taken)
    )


def quantile(values: list[float], q: float) -> float:
    """The value at or below which a share of ``q`` lies, interpolated between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _cpu_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


class _CudaClock:
    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)


class WallClock:
    """From the call until its results are there, host included; on CUDA with a cold L2."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if cuda else None
        self.device = device

    def __call__(self, call: Call) -> float:
        if self.flush is None:
            return _cpu_clock(call)
        self.flush.zero_()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) * 1e3


def captured(call: Call, device: torch.device) -> Call:
    """The replay of a CUDA graph of one call: its device time has no host in it.

    Raises:
        RuntimeError: the call cannot be captured, because it waits for the device or allocates.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        call()
    return graph.replay
