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
from .sass import NO_BOARD, Instruction

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
_GLOBAL = ("LDG", "LD", "STG", "ST", "LDL", "STL", "ATOMG", "ATOM", "RED", "REDG")
_FMA = re.compile(r"F(ADD|MUL|FMA|SWZADD|ADD2|MUL2|FMA2|ADD32I|MUL32I|FMA32I)\b|H(FMA|ADD|MUL)2")
_CONVERSION = re.compile(r"(I2F|F2I|F2F|FRND|I2I|POPC|FLO|BREV)\b")
_CONTROL = re.compile(
    r"(BRA|BRX|BSSY|BSYNC|BREAK|WARPSYNC|NOP|EXIT|CALL|RET|YIELD|DEPBAR|NANOSLEEP|BMOV|PREEXIT|"
    r"ACQBULK|ELECT|SETCTAID|KILL|RPCMOV|USETMAXREG)\b"
)


def cost(one: Instruction, sm: Timings) -> Cost:
    """Returns the cost of an instruction; a global load hits L2."""
    name, base = one.name, one.name.partition(".")[0]
    if memory := _memory_cost(name, base, sm):
        return memory
    if base == "MUFU" or _CONVERSION.match(name):
        return Cost("mufu", sm.mufu, sm.mufu_latency, "MUFU")
    if base == "BAR":
        return Cost("barrier")
    if re.match(r"[HIBQD]MMA\b", name):
        ratio = next((r for shape, r in MMA_RATIOS.items() if f".{shape}" in name), 1.0)
        return Cost("tensor", sm.hmma * ratio, sm.hmma_latency, "tensor")
    if _FMA.match(name):
        return Cost("fma", sm.fma)
    if base.startswith("IMAD") or base == "IMUL":
        return Cost("imad", sm.imad * (2 if ".WIDE" in name or ".HI" in name else 1))
    if _CONTROL.match(name):
        return Cost("control")
    if base == "R2UR":
        return Cost("uniform", sm.uniform, sm.r2ur_latency, "R2UR")
    if base.startswith("U"):
        return Cost("uniform", sm.uniform, 12.0 if base in ("ULDC", "UR2UP") else 0.0, "uniform")
    return Cost("alu", sm.alu)


def _memory_cost(name: str, base: str, sm: Timings) -> Cost | None:
    """Returns the cost of an instruction that loads, stores, exchanges or fences, else None."""
    size = _SIZE.search(name)
    width = 32 * (_BYTES[size[1]] if size else 4)  # bytes of a warp
    if base in ("LDSM", "STSM", "LDS", "STS", "ATOMS"):
        beats = max(1.0, width / sm.shared_bytes)
        if base in ("LDSM", "STSM"):
            count = name.rpartition(".")[2]
            beats = float(count) if count in ("2", "4") else 1.0
        late = {"LDSM": sm.ldsm_latency, "ATOMS": sm.shared_atomic_latency}
        read = sm.sts_read + 2 * (beats - 1) if base.startswith("ST") else 9.0
        latency = late.get(base, sm.lds_latency) + beats - 1
        return Cost("memory", sm.address, latency, "shared memory", beats, read)
    if base in _GLOBAL:
        beats = max(2.0, width / sm.global_bytes)
        kind, late_of = "global memory", sm.l2
        if name == POLL:
            kind = "hop between programs"
        if base in ("LDL", "STL"):
            kind, late_of = "local memory", sm.l1
        elif base.startswith("A"):
            kind, late_of = "atomic", sm.atomic_latency
        elif base.startswith("R"):
            late_of = 0.0
        return Cost("memory", sm.address, late_of + beats - 2, kind, beats, 11.0 + beats)
    if base in ("SHFL", "REDUX", "MOVM", "MATCH"):
        return Cost("memory", sm.address, sm.shuffle_latency, "shuffle", 1.0, 9.0)
    if base in ("MEMBAR", "ERRBAR", "CCTL", "FENCE", "CGAERRBAR"):
        return Cost("control", 1.0, 2.0, "fence")  # its time is part of the hop between programs
    if base in ("LDC", "LDCU"):
        return Cost("constant", 2.0, sm.constant_latency, "constant")
    if base in ("S2R", "S2UR", "B2R"):
        return Cost("control", 2.0, sm.special_latency, "special register")
    return None


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

    def __init__(self, warps: list[_Warp]) -> None:
        self.warps = warps
        self.latest: _Warp | None = None
        self.free = 0.0  # when the scheduler may issue again
        self.pipes = _sums()  # when each is free
        self.queue: list[float] = []  # when the latest memory instructions start

    def pipe_free(self, cost: Cost, sm: Timings) -> float:
        """Returns when an instruction may issue as far as its pipe is concerned."""
        if cost.pipe in ("barrier", "control"):
            return 0.0
        if cost.pipe == "memory":
            return self.queue[-sm.queue] if len(self.queue) >= sm.queue else 0.0
        if cost.pipe == "mufu":
            return self.pipes["mufu"] - sm.mufu  # one may wait in front of the pipe
        if cost.pipe == "fma" and sm.fma_pipes == 2:
            return min(self.pipes["imad"], self.pipes["fma"])
        return self.pipes["imad" if cost.pipe == "fma" else cost.pipe]

    def occupy(self, cost: Cost, now: float, sm: Timings) -> float:
        """Takes the pipe for an instruction that issues now; returns when it starts there."""
        pipe, start = cost.pipe, now
        if pipe == "fma":
            second = sm.fma_pipes == 2 and self.pipes["fma"] <= self.pipes["imad"]
            pipe = "fma" if second else "imad"
        elif pipe == "memory":
            start = max(now + 2, self.pipes[pipe])
            self.queue = [*self.queue[-sm.queue :], start]
        elif pipe in ("mufu", "tensor"):
            start = max(now, self.pipes[pipe])
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
        self.cores = [_Core(group) for group in groups if group]
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
        pipe = core.pipe_free(self.costs[warp.at], self.sm)
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
            (core.pipe_free(what, self.sm), f"pipe: {what.pipe}"),
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
        start = core.occupy(what, now, self.sm)
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
