"""Predicts the time of one step of a compiled kernel from its SASS, without a GPU.

All warps of one SM run one turn of the kernel's loop, again and again: four in-order schedulers
issue one instruction a cycle each, by the stall counts and scoreboards that the compiler wrote;
pipes are finite; a barrier joins the warps of a program. ``docs/predicted.md`` compares the
predictions with published times, and lists what the model leaves out.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from .latencies import Timings
from .sass import NO_BOARD, Instruction, kind_of

SCHEDULERS = 4  # of an SM
#: The load of a counter that other programs add to; what they exchange is loaded in wider pieces.
POLL = "LDG.E.STRONG.GPU"
TURNS, WARM = 12, 6  # turns of the loop to simulate, of which the first are not counted


class Cost(NamedTuple):
    """The cost of one instruction of a warp on its SM."""

    pipe: str
    busy: float = 0.0  # cycles of the pipe of its sub-core
    latency: float = 0.0  # until the result is there; 0 where the stall counts say it
    kind: str = ""  # the name of the wait for it
    unit: float = 0.0  # cycles of the SM's load/store unit
    read: float = 6.0  # cycles until the operands are read


def cost(one: Instruction, sm: Timings) -> Cost:
    """Returns the cost of an instruction; a global load hits L2."""
    name, kind = one.name, kind_of(one.name)
    if kind.startswith(("shared", "global", "spill")):
        return _memory_cost(name, kind, sm)
    halves = 2 if ".WIDE" in name or ".HI" in name else 1
    late = {"R2UR": sm.r2ur_latency, "ULDC": 12.0, "UR2UP": 12.0}
    mufu = Cost("mufu", sm.mufu, sm.mufu_latency, "MUFU")
    return {
        "tensor core": Cost("tensor", sm.hmma, sm.hmma_latency, "tensor"),
        "MUFU": mufu,
        "conversion": mufu,
        "barrier": Cost("barrier"),
        "fence": Cost("control", 0.0, 2.0, "fence"),  # its time is part of the hop
        "shuffle": Cost("memory", sm.address, sm.shuffle_latency, "shuffle", 1.0, 9.0),
        "constant": Cost("constant", 2.0, sm.constant_latency, "constant"),
        "special register": Cost("control", 0.0, sm.special_latency, "special register"),
        "FMA unit": Cost("fma", sm.fma),
        "integer multiply": Cost("imad", sm.imad * halves),
        "uniform": Cost("uniform", sm.uniform, late.get(name.partition(".")[0], 0.0), "uniform"),
        "control": Cost("control"),
    }.get(kind, Cost("alu", sm.alu))


def _memory_cost(name: str, kind: str, sm: Timings) -> Cost:
    bits = re.search(r"\.[US]?(8|16|64|128)\b", name)
    moved = 4 * int(bits[1]) if bits else 128  # bytes of a warp
    if kind.startswith("shared"):
        beats, latency, read = max(1.0, moved / sm.shared_bytes), sm.lds_latency, 9.0
        if name.startswith(("LDSM", "STSM")):  # of one, two or four matrices
            beats = float(name[-1]) if name.endswith((".2", ".4")) else 1.0
        if name.startswith("LDSM"):
            latency = sm.ldsm_latency
        if name.startswith("ST"):
            read = sm.sts_read + 2 * (beats - 1)
        return Cost("memory", sm.address, latency + beats - 1, "shared memory", beats, read)
    beats, what, latency = max(2.0, moved / sm.global_bytes), "global memory", sm.l2
    if name == POLL:
        what = "hop between programs"
    elif kind == "spill":
        what, latency = "local memory", sm.l1
    return Cost("memory", sm.address, latency + beats - 2, what, beats, 11.0 + beats)


class Span(NamedTuple):
    """The time in which a warp issued an instruction, or waited before it."""

    warp: int
    begin: float
    end: float
    cause: str
    line: str  # of the source


class Prediction(NamedTuple):
    """The predicted time of one step in steady state."""

    cycles: float
    mhz: float
    warps: int  # on the SM
    instructions: float  # of one warp in a step
    barriers: float  # in a step
    steps: int  # in the turns that count
    spans: list[Span]  # of these turns
    begin: float  # of these turns, by the clock of the spans

    @property
    def us(self) -> float:  # microseconds
        return self.cycles / self.mhz

    def spent(self, *by: str) -> list[tuple[Any, ...]]:
        """Returns the cycles of a mean warp in a step by these fields of its spans, most first."""
        found: dict[Any, float] = defaultdict(float)
        for span in self.spans:
            found[tuple(getattr(span, name) for name in by)] += span.end - span.begin
        share = 1 / self.steps / self.warps
        return sorted(((n * share, *key) for key, n in found.items()), reverse=True)

    def report(self) -> str:
        """Returns the prediction as text: where the cycles go, and the three longest waits."""
        waits = [each for each in self.spent("cause", "line") if each[1] != "issuing"]
        return "\n".join([
            f"predicted {self.cycles:.0f} cycles = {self.us:.3f} us a step at {self.mhz:.0f} MHz; "
            f"{self.warps} warps, {self.instructions:.0f} instructions, {self.barriers:g} barriers",
            "cycles of a mean warp:",
            *(f"  {n:7.0f} {100 * n / self.cycles:4.0f} %  {cause}"
              for n, cause in self.spent("cause") if n >= 0.5),
            "longest waits by cause and source line, in cycles:",
            *(f"  {n:7.1f}  {cause:24}  {line}" for n, cause, line in waits[:3]),
        ])  # fmt: skip


@dataclass(eq=False)  # warps in the same state are still two
class _Warp:
    number: int
    at: int = 0  # index into the trace
    issued: float = -1.0  # when the last instruction was
    ready: float = 0.0  # when the next one may, by the stall count
    barrier: float = 0.0  # when its barrier opens; infinite before the last warp arrives
    #: When each scoreboard is released, and what it waits for; the last one stands for none.
    boards: list[tuple[float, str]] = field(default_factory=lambda: [(0.0, "")] * (NO_BOARD + 1))
    in_order: float = 0.0  # shared memory returns results in order
    ends: list[float] = field(default_factory=lambda: [0.0])  # of its turns


class _Core:
    """One scheduler with its pipes and its warps."""

    def __init__(self, warps: list[_Warp], sm: Timings) -> None:
        self.warps, self.sm = warps, sm
        self.latest = self.next = warps[-1]
        self.due = 0.0  # when it issues for ``next``
        self.pipes: dict[str, float] = defaultdict(float)  # when each is free
        self.queue = [0.0] * sm.queue  # when the latest memory instructions start

    def pipe_of(self, cost: Cost) -> tuple[str, float]:
        """Returns the pipe of an instruction, and when that lets it issue."""
        pipe, ahead = cost.pipe, 0.0
        if pipe == "memory":
            return pipe, self.queue[0]
        if pipe == "mufu":
            ahead = self.sm.mufu  # one may wait in front of it
        elif pipe == "fma" and (self.sm.fma_pipes == 1 or self.pipes["fma"] > self.pipes["imad"]):
            pipe = "imad"  # of the two for FMA the one that is free first
        return pipe, self.pipes[pipe] - ahead


class _Sm:
    """The warps of the program on one SM, which run the turns of a loop."""

    def __init__(self, path: Sequence[Instruction], sm: Timings, warps: int) -> None:
        self.path, self.sm = path, sm
        self.costs = [cost(one, sm) for one in path]
        self.waits = [[b for b in range(6) if one.wait >> b & 1] for one in path]
        self.team = [_Warp(n) for n in range(warps)]
        groups = [self.team[s::SCHEDULERS] for s in range(SCHEDULERS)]
        self.cores = [_Core(group, sm) for group in groups if group]
        self.unit = self.gate = 0.0  # when the load/store and the barrier unit are free
        self.published = 0.0  # when the program last added to its counter
        self.spans: list[Span] = []
        for core in self.cores:
            self.choose(core)

    def choose(self, core: _Core) -> None:
        """Chooses when a scheduler issues next and from which warp, the latest or the youngest."""
        stay = core.latest if self.path[core.latest.at - 1].stay else None
        core.due, _, _, core.next = min(
            (max(self.limits(core, warp))[0], warp is not stay, -warp.number, warp)
            for warp in core.warps
        )

    def limits(self, core: _Core, warp: _Warp) -> Iterator[tuple[float, str]]:
        """Yields until when a warp waits before its next instruction, and what for."""
        what = self.costs[warp.at]
        yield warp.issued + 1, "issuing"
        yield warp.ready, "fixed latency"
        yield warp.barrier, "barrier"
        yield max((warp.boards[board] for board in self.waits[warp.at]), default=(0.0, ""))
        yield core.pipe_of(what)[1], f"pipe: {what.pipe}"
        yield core.latest.issued + 1, "another warp issued"

    def issue(self, core: _Core) -> None:
        """Issues the instruction that a scheduler has chosen."""
        warp, now = core.next, core.due
        one, what = self.path[warp.at], self.costs[warp.at]
        clock, line = warp.issued, one.line or f"{one.address:#06x}"
        for when, cause in self.limits(core, warp) if len(warp.ends) > WARM else ():
            if when > clock:
                self.spans.append(Span(warp.number, clock, when, cause, line))
                clock = when
        pipe, _ = core.pipe_of(what)
        start = max(now + 2 * (pipe == "memory"), core.pipes[pipe])
        done, read = start + what.latency, now + what.read
        if what.busy:
            core.pipes[pipe] = start + what.busy
        if pipe == "memory":
            core.queue = [*core.queue[1:], start]
            at_unit = max(start + 2, self.unit)
            self.unit = at_unit + what.unit
            done, read = at_unit - 4 + what.latency, start - 2 + what.read
        if one.name.startswith("RED"):
            self.published = start
        elif one.name == POLL:  # the partners publish when this program does
            done = max(done, self.published + self.sm.hop_us * self.sm.mhz)
        if what.kind in ("shared memory", "shuffle"):
            done = warp.in_order = max(done, warp.in_order)
        kind = what.kind or what.pipe
        written, read_by = (done, f"wait: {kind}"), (read, f"wait: operands read ({kind})")
        warp.boards[one.write] = max(warp.boards[one.write], written)
        warp.boards[one.read] = max(warp.boards[one.read], read_by)
        warp.issued, warp.ready = now, now + max(1, one.stall)
        core.latest = warp
        opened = what.pipe == "barrier" and self.arrive(warp, now)
        warp.at = (warp.at + 1) % len(self.path)
        if warp.at == 0:
            warp.ends.append(now)
            is_done = len(warp.ends) > TURNS
            warp.ready = float("inf") if is_done else max(warp.ready, now + self.sm.branch)
        for each in self.cores if opened else [core]:
            self.choose(each)

    def arrive(self, warp: _Warp, now: float) -> bool:
        """Lets a warp arrive at a barrier; returns True if it was the last one."""
        self.gate = max(now, self.gate) + self.sm.arrive
        warp.barrier = float("inf")
        if any(each.barrier < warp.barrier for each in self.team):
            return False
        for each in self.team:
            each.barrier = self.gate + self.sm.barrier
        return True


def predict(path: Sequence[Instruction], sm: Timings, warps: int, steps: int = 1) -> Prediction:
    """Predicts the time of one step of a kernel of which an SM runs one program of some warps.

    ``path`` is one turn of its loop, see :func:`trace`, which makes ``steps`` steps.
    """
    replay = _Sm(path, sm, warps)
    while (core := min(replay.cores, key=attrgetter("due"))).due < float("inf"):
        replay.issue(core)
    begin, end = (max(warp.ends[turn] for warp in replay.team) for turn in (WARM, TURNS))
    counted = (TURNS - WARM) * steps
    barriers = sum(each.pipe == "barrier" for each in replay.costs) / steps
    size = warps, len(path) / steps, barriers, counted
    return Prediction((end - begin) / counted, sm.mhz, *size, replay.spans, begin)
