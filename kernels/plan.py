"""Chooses the schedule and the tiles of a layer from its sizes and the limits of the chip.

A pure function: it neither imports triton nor touches a device. A choice comes from ``MEASURED``
if a GPU was measured on exactly this problem, else from ``model.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from .limits import (
    LARGEST_H,
    LARGEST_SLICE,
    holds_slice,
    k_chunks,
    padded_units,
    resident_bytes,
    slice_bytes,
)
from .model import Floors, dots_per_accumulator, floors_of
from .problem import (  # noqa: F401, re-exported
    CHIPS,
    Chip,
    KernelFailed,
    LaunchRefused,
    NoPlan,
    Problem,
    Tiles,
    chip_of,
    give_up,
    refuse_cooperation,
)


class Measured(NamedTuple):
    """A plan of one layer that a GPU preferred, with microseconds of a step in that run."""

    schedule: str
    forward: Tiles
    backward: Tiles | None
    us: float
    torch_us: float  # of torch.nn in the same process
    where: str  # the GPU's full name and the date

    def __str__(self) -> str:
        return f"{self.us:.2f} us a step (torch.nn {self.torch_us:.2f}), measured on {self.where}"


@dataclass(frozen=True)
class Plan:
    """One launch of ``layers`` layers, or in schedule stepwise one a step, with its tiles."""

    schedule: str  # a name in SCHEDULES
    forward: Tiles
    backward: Tiles | None
    layers: int = 1
    floors: tuple[Floors, ...] = ()  # of a step forward and, if planned, backward
    measured: Measured | None = None  # None: the model's choice

    @property
    def step(self) -> float:
        """Microseconds of one step of the whole batch, forward and backward, modelled."""
        return sum(floors.step for floors in self.floors)

    def describe(self) -> str:
        """Returns the plan in one line, as ``explain`` prints it."""
        parts = [f"forward {self.forward}"]
        if self.backward:
            parts.append(f"backward {self.backward}")
        if self.layers > 1:
            parts.append(f"{self.layers} layers as a wavefront")
        names = ("forward at least", "backward at least")
        parts += [f"{n} {floors}" for n, floors in zip(names, self.floors, strict=False)]
        source = self.measured or "modelled, not measured"
        return f"{self.schedule}: {'; '.join(parts)} ({source})"


#: By architecture, number of SMs and problem; ``python -m bench cases`` has such times. Each must
#: be one of ``candidates``.
MEASURED: dict[tuple[str, int, Problem], Measured] = {}

#: Forget what was decided by another planner; ``forced`` calls them.
CACHES: list[Callable[[], object]] = []
_forced: Callable[[Problem, Chip], tuple[Plan, ...]] | None = None


@contextmanager
def forced(planner: Callable[[Problem, Chip], tuple[Plan, ...]]) -> Iterator[None]:
    """Within the context ``plan_stack`` is ``planner``; for tests and benchmarks."""
    before = _forced
    try:
        _use(planner)
        yield
    finally:
        _use(before)


def _use(planner: Callable[[Problem, Chip], tuple[Plan, ...]] | None) -> None:
    global _forced
    _forced = planner
    for forget in CACHES:
        forget()


def plan_stack(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
    """Plans the launches of a stack of ``problem.layers`` layers, from the first layer up.

    Each layer by itself, or as many as the chip holds as a wavefront, whichever the model finds
    faster.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    failed = dict(chip.failed).get((problem.cell, problem.hidden_size, problem.dtype))
    if reason := chip.unsupported or failed:
        raise NoPlan(reason)
    return (_forced or _plan_stack)(problem, chip)


@lru_cache(maxsize=4096)
def _plan_stack(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
    best = (plan(problem._replace(layers=1), chip),) * problem.layers
    if problem.layers > 1 and problem.directions == 1 and not problem.layer_by_layer:
        waves = _wavefront(problem, chip)
        if waves and sum(p.step for p in waves) < sum(p.step for p in best):
            return waves
    return best


@lru_cache(maxsize=4096)
def plan(problem: Problem, chip: Chip) -> Plan:
    """Plans one layer: as measured on such a chip, else resident, cooperative or stepwise.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    found = MEASURED.get((chip.arch, chip.sms, problem))
    if found and (chip.cooperates or found.schedule != "cooperative"):
        best = _with_floors(found.schedule, found.forward, found.backward, problem, chip)
        return replace(best, measured=found)
    refused = []
    for schedule in SCHEDULES.values():
        try:
            return schedule(problem, chip)
        except NoPlan as reason:
            refused.append(reason)
    raise NoPlan("; ".join(dict.fromkeys(map(str, refused))))


def candidates(problem: Problem, chip: Chip) -> Iterator[Plan]:
    """Yields every plan of one layer within the limits, the model's choice of a schedule first."""
    for name, schedule in SCHEDULES.items():
        try:
            best = schedule(problem, chip)
        except NoPlan:
            continue
        yield best
        pairs: list[tuple[Tiles, ...]] = []
        if name == "resident":  # fewer warps or more rows would spill
            rows, warps = best.forward.block_b, best.forward.num_warps
            for r, w in product((8, 16), (2, 4, 8)):
                if chip.warp_size // 4 <= r <= rows and warps <= w:
                    pairs.append((replace(best.forward, block_b=r, num_warps=w),) * 2)
        elif name == "cooperative":
            sides = (_slices(problem, chip, forward) for forward in (True, False))
            pairs = list(product(*([tiles for *_, tiles in side] for side in sides)))
        others = {_with_floors(name, one, two, problem, chip) for one, two in pairs} - {best}
        yield from sorted(others, key=lambda other: (other.step, str(other)))


def _wavefront(problem: Problem, chip: Chip) -> tuple[Plan, ...] | None:
    """All layers in groups as large as the chip holds, or None."""
    waves: list[Plan] = []
    rest = problem.layers
    while rest:
        for layers in range(rest, 0, -1):
            try:
                waves.append(cooperative(problem._replace(layers=layers), chip))
            except NoPlan:
                continue
            break
        else:
            return None
        rest -= waves[-1].layers
    return tuple(waves)


@lru_cache(maxsize=4096)
def resident_nvidia(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *resident* with W_hh in the registers of one program.

    Raises:
        NoPlan: W_hh is too large, or the chip does not have these products.
    """
    spec, kind, H = problem.spec, problem.kind(chip), problem.hidden_size
    if chip.warp_size != 32 or not chip.concurrent:
        raise NoPlan("schedule resident_nvidia runs on NVIDIA's GPUs alone")
    if kind not in ("16-bit", "tf32"):
        raise NoPlan(f"schedule resident_nvidia has no products in {kind}")
    largest = LARGEST_H[kind][spec.gates]
    if largest < H:
        raise NoPlan(
            f"schedule resident_nvidia holds W_hh in registers, which for {problem.cell} in {kind} "
            f"ends at H={largest}; H is {H}"
        )
    units, itemsize = padded_units(H), problem.dtype.itemsize
    # Two programs of 8 rows on an SM are faster than one of 16, for which a full program has no
    # registers anyway.
    few = -(-problem.batch // 8) * problem.directions <= 2 * chip.sms
    block_b = 8 if few or units * spec.gates * itemsize > 512 else 16
    shared = 2 * max(spec.gates, 2) * block_b * units * itemsize
    tiles = Tiles(block_b, units, min(8, units // 16), 255, "tf32", shared)
    return _with_floors("resident_nvidia", tiles, tiles, problem, chip)


@lru_cache(maxsize=4096)
def resident(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *resident*: one program holds W_hh.

    Raises:
        NoPlan: W_hh is too large, or the dtype has no products.
    """
    spec, kind, amd = problem.spec, problem.kind(chip), chip.warp_size == 64
    if kind not in LARGEST_H:
        raise NoPlan(f"schedule resident has no products of {problem.dtype}")
    H, largest = problem.hidden_size, LARGEST_H[kind][spec.gates] // (2 if amd else 1)
    if largest < H:
        raise NoPlan(
            f"schedule resident holds W_hh in one program, which for {problem.cell} in {kind} "
            f"ends at H={largest}; H is {H}"
        )
    # Two warps cut a 16-wide tile into the 8 columns of an mma; wider ones keep more warps busy.
    units, wide = padded_units(H), kind != "16-bit"
    num_warps = 2 if units == 16 else 4 if amd or units <= (32 if wide else 64) else 8
    # Latency, not occupancy: half the rows halve the special-function work of a step, as long as
    # there are SMs for twice the programs. The three products of tf32x3, or ragged rows in fp32,
    # leave no registers for 16; AMD has no matrix instruction for fewer.
    few = -(-problem.batch // 8) * problem.directions <= chip.sms
    scarce = kind == "tf32x3" or (problem.ragged and wide)
    block_b = 16 if amd else 8 if few or scarce else 16
    shared = resident_bytes(kind, spec.gates, units, block_b)
    if shared > chip.shared_bytes:
        raise NoPlan(
            f"schedule resident needs {shared:,} bytes of shared memory for {problem.cell} in "
            f"{kind} at H={H}; {chip.name} has {chip.shared_bytes:,}"
        )
    precision = kind if wide else "ieee"  # 16-bit operands are multiplied exactly
    tiles = Tiles(block_b, units, num_warps, None if amd else 255, precision, shared)
    return _with_floors("resident", tiles, tiles, problem, chip)


@lru_cache(maxsize=4096)
def cooperative(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *cooperative*: of the slices that fit, the fastest by the model.

    Raises:
        NoPlan: no slice of W_hh fits, or the programs cannot exchange h.
    """
    kind = problem.kind(chip)
    if not chip.cooperates:
        raise NoPlan(f"{chip.name} has refused a cooperative launch")
    if chip.warp_size == 64:
        raise NoPlan(f"schedule cooperative needs NVIDIA's tensor cores, which {chip.name} lacks")
    if kind not in LARGEST_SLICE:
        raise NoPlan(f"schedule cooperative has no products in {kind}")
    if problem.layers > 1 and problem.directions > 1:
        raise NoPlan("a wavefront has one direction; the other needs the whole layer below")
    best = []
    for forward in (True, False):
        fitting = list(_slices(problem, chip, forward))
        if not fitting:
            raise NoPlan(
                f"schedule cooperative found no slices of W_hh that {chip.name} holds on its "
                f"{chip.sms} SMs for {problem.cell} in {kind} at H={problem.hidden_size}"
            )
        best.append(min(fitting, key=lambda found: found[:3])[-1])
    return _with_floors("cooperative", best[0], best[1], problem, chip)


def _slices(problem: Problem, chip: Chip, forward: bool) -> Iterator[tuple[float, int, int, Tiles]]:
    """Everything that fits: its modelled time, its size for ties, and the tiles."""
    H, L, gates = problem.hidden_size, problem.layers, problem.spec.gates
    kind = problem.kind(chip)
    chunks = k_chunks(H, kind)
    columns = sum(pieces * width for _, pieces, width in chunks)
    for units, rows in product((8, 16, 32, 64), (16, 32)):
        programs = -(-H // units) * problem.directions * L  # of a batch tile
        shared = slice_bytes(kind, gates, L, units, rows, columns)
        if (
            programs > chip.sms
            or (units < H and not chip.concurrent)
            or shared > chip.shared_bytes
            or not holds_slice(kind, gates, L, problem.ragged, units, rows, columns)
        ):
            continue
        at_once = max(1, min(-(-problem.batch // rows), chip.sms // programs))
        precision = kind if kind != "16-bit" else "ieee"
        tiles = Tiles(rows, units, 8, 255, precision, shared, chunks, at_once)
        tiles = replace(tiles, folded=dots_per_accumulator(problem, kind, tiles, forward))
        floors = floors_of("cooperative", problem, chip, tiles, forward)
        yield floors.step, rows, units, tiles


def stepwise(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *stepwise*: a library GEMM and one fused elementwise launch a step.

    Raises:
        NoPlan: the dtype is none of float64, float32, float16 and bfloat16.
    """
    if problem.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise NoPlan(f"no schedule computes in {problem.dtype}")
    # 512 elements, of rows as long as a cache line where H is. With 4 warps fp64 would spill. A
    # tile may change hands between threads through shared memory, at 8 bytes an element.
    units = min(64, 1 << (problem.hidden_size - 1).bit_length())
    tiles = Tiles(512 // units, units, 8, None, "ieee", 4096)
    return _with_floors("stepwise", tiles, tiles, problem, chip)


#: In the order in which they are asked.
SCHEDULES: dict[str, Callable[[Problem, Chip], Plan]] = {
    "resident_nvidia": resident_nvidia,
    "resident": resident,
    "cooperative": cooperative,
    "stepwise": stepwise,
}


def _with_floors(
    schedule: str, forward: Tiles, backward: Tiles | None, problem: Problem, chip: Chip
) -> Plan:
    """A plan with its modelled times, and without backward where none is needed."""
    backward = backward if problem.needs_grad else None
    floors = (
        floors_of(schedule, problem, chip, tiles, is_forward)
        for tiles, is_forward in ((forward, True), (backward, False))
        if tiles
    )
    return Plan(schedule, forward, backward, problem.layers, tuple(floors))
