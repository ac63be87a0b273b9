"""Predicts the time of one step of a compiled kernel from its SASS, without a GPU.

All warps of one SM run one turn of the kernel's loop, again and again: four in-order schedulers
issue one instruction a cycle each, by the stall counts and scoreboards that the compiler wrote;
pipes are finite; a barrier joins the warps of a program. ``docs/predicted.md`` compares the
predictions with published times, and lists what the model leaves out.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .latencies import MMA_RATIOS, Timings
from .sass import NO_BOARD, Instruction, kind_of

SCHEDULERS = 4  # of an SM
#: The load of a counter that other programs add to; what they exchange is loaded in wider pieces.
POLL = "LDG.E.STRONG.GPU"
TURNS, WARM = 12, 6  # turns of the loop to simulate, of which the first are not counted


def _sums() -> dict[str, float]:
    return defaultdict(float)


class Cost(NamedTuple):
    """The cost of one instruction of a warp on its SM."""

    pipe: str
    busy: float = 1.0  # cycles of the pipe of its sub-core
    latency: float = 0.0  # until the result is there; 0 where the stall counts say it
    kind: str = ""  # the name of the wait for it
    unit: float = 0.0  # cycles of the SM's load/store unit
    read: float = 6.0  # cycles until the operands are read


_SIZE = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def cost(one: Instruction, sm: Timings) -> Cost:
    """Returns the cost of an instruction; a global load hits L2."""
    name, kind = one.name, kind_of(one.name)
    if kind in ("shared load", "shared store"):
        return _shared_cost(name, sm)
    if kind in ("global load", "global store", "global atomic", "spill"):
        return _global_cost(name, sm)
    if kind == "tensor core":
        ratio = next((r for shape, r in MMA_RATIOS.items() if f".{shape}" in name), 1.0)
        return Cost("tensor", sm.hmma * ratio, sm.hmma_latency, "tensor")
    if kind == "integer multiply":
        return Cost("imad", sm.imad * (2 if ".WIDE" in name or ".HI" in name else 1))
    if kind == "uniform" and name.startswith("R2UR"):
        return Cost("uniform", sm.uniform, sm.r2ur_latency, "R2UR")
    if kind == "uniform":
        waits = name.startswith(("ULDC", "UR2UP"))
        return Cost("uniform", sm.uniform, 12.0 if waits else 0.0, "uniform")
    mufu = Cost("mufu", sm.mufu, sm.mufu_latency, "MUFU")
    return {
        "MUFU": mufu,
        "conversion": mufu,
        "barrier": Cost("barrier"),
        "fence": Cost("control", 1.0, 2.0, "fence"),  # its time is part of the hop
        "shuffle": Cost("memory", sm.address, sm.shuffle_latency, "shuffle", 1.0, 9.0),
        "constant": Cost("constant", 2.0, sm.constant_latency, "constant"),
        "special register": Cost("control", 2.0, sm.special_latency, "special register"),
        "FMA unit": Cost("fma", sm.fma),
        "control": Cost("control"),
    }.get(kind, Cost("alu", sm.alu))


def _width(name: str) -> int:
    """The bytes that a warp loads or stores."""
    size = _SIZE.search(name)
    return 32 * (_BYTES[size[1]] if size else 4)


def _shared_cost(name: str, sm: Timings) -> Cost:
    base, _, count = name.partition(".")[0], *name.rpartition(".")[1:]
    beats = max(1.0, _width(name) / sm.shared_bytes)
    if base in ("LDSM", "STSM"):
        beats = float(count) if count in ("2", "4") else 1.0
    late = {"LDSM": sm.ldsm_latency, "ATOMS": sm.shared_atomic_latency}
    read = sm.sts_read + 2 * (beats - 1) if base.startswith("ST") else 9.0
    latency = late.get(base, sm.lds_latency) + beats - 1
    return Cost("memory", sm.address, latency, "shared memory", beats, read)


def _global_cost(name: str, sm: Timings) -> Cost:
    beats = max(2.0, _width(name) / sm.global_bytes)
    kind, latency = "global memory", sm.l2
    if name == POLL:
        kind = "hop between programs"
    elif name.startswith(("LDL", "STL")):
        kind, latency = "local memory", sm.l1
    elif name.startswith("A"):
        kind, latency = "atomic", sm.atomic_latency
    elif name.startswith("R"):
        latency = 0.0
    return Cost("memory", sm.address, latency + beats - 2, kind, beats, 11.0 + beats)


@dataclass
class Prediction:
    """The predicted time of one step in steady state."""

    cycles: float
    mhz: float
    warps: int  # on the SM
    steps: int  # of the recurrence in one turn of the loop
    instructions: float  # of one warp in a step
    barriers: float  # in a step
    spent: dict[str, float]  # cycles of a mean warp, by what it did or waited for
    waits: list[tuple[float, str, str]]  # mean cycles, main cause and source line, longest first

    @property
    def us(self) -> float:  # microseconds
        return self.cycles / self.mhz

    def report(self, top: int = 8) -> str:
        """Returns the prediction as text: where the cycles go, and the lines that wait longest."""
        text = [
            f"predicted {self.cycles:.0f} cycles = {self.us:.3f} us a step at {self.mhz:.0f} MHz; "
            f"{self.warps} warps, {self.instructions:.0f} instructions, {self.barriers:g} barriers",
            "cycles of a mean warp:",
        ]
        for what, cycles in sorted(self.spent.items(), key=lambda item: (-item[1], item[0])):
            if cycles >= 0.5:
                text.append(f"  {cycles:7.0f} {100 * cycles / self.cycles:4.0f} %  {what}")
        text.append("longest waits by source line, in cycles:")
        text += [f"  {cycles:7.1f}  {cause:24}  {at}" for cycles, cause, at in self.waits[:top]]
        return "\n".join(text)


@dataclass(eq=False)  # warps in the same state are still two
class _Warp:
    at: int = 0  # index into the trace
    turns: int = 0
    issued: float = 0.0  # when the last instruction was
    ready: float = 0.0  # when the next one may, by the stall count
    stay: bool = True
    barrier: float = 0.0  # when its barrier opens; infinite before the last warp arrives
    boards: list[list[tuple[float, str]]] = field(default_factory=lambda: [[] for _ in range(6)])
    in_order: float = 0.0  # shared memory returns results in order
    spent: dict[str, float] = field(default_factory=_sums)
    ends: list[float] = field(default_factory=lambda: [0.0])  # of its turns


class _Core:
    """One scheduler with its pipes and its warps."""

    def __init__(self, warps: list[_Warp], sm: Timings) -> None:
        self.warps, self.sm = warps, sm
        self.latest: _Warp | None = None
        self.free = 0.0  # when the scheduler may issue again
        self.pipes = _sums()  # when each is free
        self.queue = [0.0] * sm.queue  # when the latest memory instructions start

    def pipe_of(self, cost: Cost) -> str:
        """Returns the pipe of an instruction: for FMA, of two the one that is free first."""
        if cost.pipe != "fma":
            return cost.pipe
        second = self.sm.fma_pipes == 2 and self.pipes["fma"] <= self.pipes["imad"]
        return "fma" if second else "imad"

    def pipe_free(self, cost: Cost) -> float:
        """Returns when an instruction may issue as far as its pipe is concerned."""
        pipe = self.pipe_of(cost)
        if pipe in ("barrier", "control"):
            return 0.0
        if pipe == "memory":
            return self.queue[0]
        return self.pipes[pipe] - self.sm.mufu * (pipe == "mufu")  # one may wait in front of it

    def occupy(self, cost: Cost, now: float) -> float:
        """Takes the pipe for an instruction that issues now; returns when it starts there."""
        pipe, start = self.pipe_of(cost), now
        if pipe in ("memory", "mufu", "tensor"):
            start = max(now + 2 * (pipe == "memory"), self.pipes[pipe])
        if pipe == "memory":
            self.queue = [*self.queue[1:], start]
        self.pipes[pipe] = start + cost.busy
        return start


class _Sm:
    """The warps of the program on one SM, which run the turns of a loop."""

    def __init__(self, path: Sequence[Instruction], sm: Timings, warps: int) -> None:
        self.path, self.sm = path, sm
        self.costs = [cost(one, sm) for one in path]
        self.waits = [[b for b in range(6) if one.wait >> b & 1] for one in path]
        self.team = [_Warp() for _ in range(warps)]
        groups = [self.team[s::SCHEDULERS] for s in range(SCHEDULERS)]
        self.cores = [_Core(group, sm) for group in groups if group]
        self.unit = self.gate = 0.0  # when the load/store and the barrier unit are free
        self.published = 0.0  # when the program last added to its counter
        self.arrived: dict[str, list[_Warp]] = defaultdict(list)
        self.causes: dict[str, dict[str, float]] = defaultdict(_sums)  # of waits, by source line

    def run(self) -> None:
        """Runs all warps, as often as ``TURNS`` says."""
        best = [self.next_issue(core) for core in self.cores]
        while (now := min(best)) < float("inf"):
            index = best.index(now)
            core = self.cores[index]
            able = [warp for warp in core.warps if self.earliest(core, warp) <= now]
            warp = core.latest if core.latest in able and core.latest.stay else able[-1]
            released = self.issue(core, warp, now)
            for other, each in enumerate(self.cores):
                if released or other == index:
                    best[other] = self.next_issue(each)
        if any(warp.turns < TURNS for warp in self.team):
            raise ValueError("deadlock: warps wait at a barrier that others never reach")

    def next_issue(self, core: _Core) -> float:
        return min(self.earliest(core, warp) for warp in core.warps)

    def boards(self, warp: _Warp) -> tuple[float, str]:
        """Returns when the scoreboards let the next instruction go, and what they wait for."""
        one = self.path[warp.at]
        until = (0.0, "")
        for board in self.waits[warp.at]:
            for each in warp.boards[board]:
                until = max(until, each, key=lambda pair: pair[0])
        if one.name.startswith("DEPBAR") and (match := re.search(r"SB(\d)", one.operands)):
            count = re.search(r",\s*0x([0-9a-f]+)", one.operands)
            left = int(count[1], 16) if count else 0
            pending = sorted(warp.boards[int(match[1])])
            if len(pending) > left:
                until = max(until, pending[len(pending) - left - 1], key=lambda pair: pair[0])
        return until

    def earliest(self, core: _Core, warp: _Warp) -> float:
        """Returns when a warp can issue its next instruction."""
        if warp.turns >= TURNS:
            return float("inf")
        pipe = core.pipe_free(self.costs[warp.at])
        return max(warp.ready, warp.barrier, self.boards(warp)[0], pipe, core.free)

    def account(self, core: _Core, warp: _Warp, now: float) -> None:
        """Adds the cycles since the warp's last instruction to what they were spent on."""
        if not WARM <= warp.turns < TURNS:
            return
        what, clock, one = self.costs[warp.at], warp.ready, self.path[warp.at]
        line = one.line or f"{one.address:#06x}"
        lost = {"fixed latency": max(0.0, clock - warp.issued - 1)}
        until, kind = self.boards(warp)
        for when, cause in (
            (warp.barrier, "barrier"),
            (until, f"wait: {kind}"),
            (core.pipe_free(what), f"pipe: {what.pipe}"),
            (now, "another warp issued"),
        ):
            if when > clock:
                lost[cause] = when - clock
                clock = when
        warp.spent["issuing"] += 1.0
        for cause, cycles in lost.items():
            warp.spent[cause] += cycles
            self.causes[line][cause] += cycles

    def issue(self, core: _Core, warp: _Warp, now: float) -> bool:
        """Issues the next instruction of a warp; returns True if that opened a barrier."""
        one, what = self.path[warp.at], self.costs[warp.at]
        self.account(core, warp, now)
        start = core.occupy(what, now)
        done, read = start + what.latency, now + what.read
        if what.unit:
            at_unit = max(start + 2, self.unit)
            self.unit = at_unit + what.unit
            done, read = at_unit - 4 + what.latency, start - 2 + what.read
        if one.name.startswith("RED"):
            self.published = start
        elif one.name == POLL:  # the partners publish when this program does
            done = max(done, self.published + self.sm.hop_us * self.sm.mhz)
        if what.kind in ("shared memory", "shuffle"):
            done = warp.in_order = max(done, warp.in_order)
        if one.write != NO_BOARD:
            warp.boards[one.write].append((done, what.kind or what.pipe))
        if one.read != NO_BOARD:
            warp.boards[one.read].append((read, f"operands read ({what.kind or what.pipe})"))
        warp.boards = [[each for each in board if each[0] > now] for board in warp.boards]
        warp.issued, warp.stay, warp.ready = now, one.stay, now + max(1, one.stall)
        core.free, core.latest = now + 1, warp
        opened = what.pipe == "barrier" and self.arrive(warp, one, now)
        warp.at += 1
        if warp.at == len(self.path):
            warp.at = 0
            warp.turns += 1
            warp.ends.append(now)
            warp.ready = max(warp.ready, now + self.sm.branch)
        return opened

    def arrive(self, warp: _Warp, one: Instruction, now: float) -> bool:
        """Lets a warp arrive at a barrier; returns True if it was the last one."""
        if one.name.startswith("BAR.ARV"):
            return False
        self.gate = max(now, self.gate) + self.sm.arrive
        key = one.operands.partition(",")[0]
        warp.barrier = float("inf")
        self.arrived[key].append(warp)
        if len(self.arrived[key]) < len(self.team):
            return False
        for each in self.arrived.pop(key):
            each.barrier = self.gate + self.sm.barrier
        return True


def predict(path: Sequence[Instruction], sm: Timings, warps: int, steps: int = 1) -> Prediction:
    """Predicts the time of one step of a kernel of which an SM runs one program.

    Args:
        path: one turn of its loop, see :func:`trace`.
        sm: the timings of the architecture.
        warps: warps of the program.
        steps: steps of the recurrence in one turn.

    Raises:
        ValueError: the warps deadlock at a barrier.
    """
    chip = _Sm(path, sm, warps)
    chip.run()
    warm_end, end = (max(warp.ends[turn] for warp in chip.team) for turn in (WARM, TURNS))
    counted = (TURNS - WARM) * steps
    share, spent = 1 / counted / warps, _sums()
    for warp in chip.team:
        for what, cycles in warp.spent.items():
            spent[what] += cycles * share
    waits = [
        (sum(causes.values()) * share, max(causes, key=causes.__getitem__), line)
        for line, causes in chip.causes.items()
    ]
    return Prediction(
        cycles=(end - warm_end) / counted,
        mhz=sm.mhz,
        warps=warps,
        steps=steps,
        instructions=len(path) / steps,
        barriers=sum(each.pipe == "barrier" for each in chip.costs) / steps,
        spent=spent,
        waits=sorted(waits, key=lambda each: (-each[0], each[2])),
    )
