"""Chooses the schedule and the tiles of a layer from its sizes and the limits of the chip.

A pure function: it neither imports triton nor touches a device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from itertools import product
from operator import itemgetter

import torch

from .limits import largest_h, resident_bytes, slice_needs
from .problem import CACHES, CHIPS, Chip, NoPlan, Plan, Problem, Tiles, chip_of, forget  # noqa: F401
from .spec import SPECS

#: Of a step of schedule cooperative: bytes a cycle from L2 to all SMs, and cycles of the rest, as
#: predicted: barriers, the wait, the cell.
L2, REST = 3100, 450
#: Times a layer's step: the predicted step of layers that share a launch (``predicted.csv``).
WAVEFRONT = 1.5

_forced: Callable[[Problem, Chip], tuple[Plan, ...]] | None = None


@contextmanager
def forced(planner: Callable[[Problem, Chip], tuple[Plan, ...]]) -> Iterator[None]:
    """Within the context ``plan_stack`` is ``planner``; for tests and benchmarks."""
    global _forced
    before, _forced = _forced, planner
    forget()
    try:
        yield
    finally:
        _forced = before
        forget()


def plan_stack(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
    """Plans the launches of a stack of ``problem.layers`` layers, from the first layer up.

    Each layer by itself, or as many as the chip holds as a wavefront, where that is faster.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    failed = dict(chip.failed).get((problem.cell, problem.hidden_size, problem.dtype))
    if reason := chip.unsupported or failed:
        raise NoPlan(reason)
    return (_forced or _plan_stack)(problem, chip)


@lru_cache(maxsize=4096)
def _plan_stack(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
    one, L = plan(problem._replace(layers=1), chip), problem.layers
    shared = L > 1 and problem.directions == 1 and not problem.layer_by_layer
    if shared and one.schedule == "cooperative":  # in the others a layer takes less than a hop
        waves = _wavefronts(problem, L, chip)
        if sum(_steps(each, problem.batch) for each in waves) < L * _steps(one, problem.batch):
            return waves
    return (one,) * L


def _wavefronts(problem: Problem, L: int, chip: Chip) -> tuple[Plan, ...]:
    """L layers in groups as large as the chip holds; a single layer fits."""
    for layers in range(L, 0, -1):
        with suppress(NoPlan):
            first = cooperative(problem._replace(layers=layers), chip)
            return first, *_wavefronts(problem, L - layers, chip)
    return ()


def _steps(plan: Plan, batch: int) -> float:
    """The time of a step of a plan, in those of one layer and round."""
    rounds = -(-batch // (plan.forward.block_b * plan.forward.at_once))
    return rounds * (WAVEFRONT if plan.layers > 1 else 1)


@lru_cache(maxsize=4096)
def plan(problem: Problem, chip: Chip) -> Plan:
    """Plans one layer by the first schedule that takes it.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    if problem.cell not in SPECS:
        raise NoPlan(f"no kernel knows the cell {problem.cell!r}; known are {', '.join(SPECS)}")
    refused = []
    for schedule in SCHEDULES.values():
        try:
            return schedule(problem, chip)
        except NoPlan as reason:
            refused.append(reason)
    raise NoPlan("; ".join(dict.fromkeys(map(str, refused))))


def _needs_nvidia(schedule: str, problem: Problem, chip: Chip) -> None:
    if chip.warp_size != 32 or not chip.concurrent:
        raise NoPlan(f"schedule {schedule} runs on NVIDIA's GPUs alone")
    if problem.kind(chip) not in ("16-bit", "tf32"):
        raise NoPlan(f"schedule {schedule} has no products in {problem.kind(chip)}")


def _all_units(schedule: str, problem: Problem, chip: Chip) -> int:
    """The units of a program that holds all of W_hh: H, padded to a power of two."""
    kind, cell, H = problem.kind(chip), problem.cell, problem.hidden_size
    if kind == "fp64":
        raise NoPlan(f"schedule {schedule} has no products of {problem.dtype}")
    largest = largest_h(kind, problem.spec.gates) // (2 if chip.warp_size == 64 else 1)
    if largest < H:
        raise NoPlan(
            f"schedule {schedule} holds W_hh in one program, which for {cell} in {kind} ends at "
            f"H={largest}; H is {H}"
        )
    return max(16, 1 << (H - 1).bit_length())


def resident_nvidia(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *resident* with W_hh in the registers of one program."""
    _needs_nvidia("resident_nvidia", problem, chip)
    spec, itemsize = problem.spec, problem.dtype.itemsize
    units = _all_units("resident_nvidia", problem, chip)
    # Two programs of 8 rows on an SM are faster than one of 16, for which a full program has no
    # registers anyway, and half a one of ragged rows.
    few = -(-problem.batch // 8) * problem.directions <= 2 * chip.sms
    most = 256 if problem.ragged else 512
    block_b = 8 if few or units * spec.gates * itemsize > most else 16
    shared = 2 * max(spec.gates, 2) * block_b * units * itemsize
    # Four warps keep an SM busy: with 8 units each they waste half of a product's rows.
    warps = units // 8 if units <= 32 else min(8, units // 16)
    return _made("resident_nvidia", problem, Tiles(block_b, units, warps, 255, "tf32", shared))


def resident(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *resident*: one program holds W_hh."""
    units, amd = _all_units("resident", problem, chip), chip.warp_size == 64
    spec, kind = problem.spec, problem.kind(chip)
    # Two warps cut a 16-wide tile into the 8 columns of an mma; wider ones keep more warps busy.
    wide = kind != "16-bit"
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
            f"{kind} at H={problem.hidden_size}; {chip.name} has {chip.shared_bytes:,}"
        )
    precision = kind if wide else "ieee"  # 16-bit operands are multiplied exactly
    tiles = Tiles(block_b, units, num_warps, None if amd else 255, precision, shared)
    return _made("resident", problem, tiles)


def cooperative(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *cooperative*: of the slices that fit, the fastest by the model."""
    if failed := dict(chip.failed).get("cooperative"):
        raise NoPlan(failed)
    _needs_nvidia("cooperative", problem, chip)
    if problem.layers > 1 and problem.directions > 1:
        raise NoPlan("a wavefront has one direction; the other needs the whole layer below")
    sides = (True, False)[: 1 + problem.needs_grad]
    fitting = [list(_slices(problem, chip, forward)) for forward in sides]
    if not all(fitting):
        raise NoPlan(
            f"schedule cooperative found no slices of W_hh that {chip.name} holds on its "
            f"{chip.sms} SMs for {problem.cell} in {problem.kind(chip)} at H={problem.hidden_size}"
        )
    best = (min(found, key=itemgetter(0))[1] for found in fitting)
    return _made("cooperative", problem, *best)


def _slices(problem: Problem, chip: Chip, forward: bool) -> Iterator[tuple[float, Tiles]]:
    """Yields every slice that fits: the estimated cycles of a step, and the tiles."""
    sm, L = chip.timings, problem.layers
    for units, rows, warps, halved in product((8, 16, 32, 64), (8, 16, 32), (4, 8), (False, True)):
        programs = -(-problem.hidden_size // units) * problem.directions * L  # of a batch tile
        tiles = -(-problem.batch // rows)
        at_once = min(tiles, chip.sms // programs)
        sizes = Tiles(rows, units, warps, 255, "tf32", 0, at_once, halved)
        if not at_once or not (needs := slice_needs(problem, chip, forward, sizes)):
            continue
        # Loads, products and sums follow each other; the hop and the rest of a step are the same
        # for all slices, but not for all rounds.
        read = max(needs.read_bytes / sm.global_bytes, at_once * programs * needs.read_bytes / L2)
        products = needs.mma * -(-warps // 4) * sm.hmma
        shared = 2 * needs.shared_bytes / sm.shared_bytes
        waits = len(problem.spec.phases) * (sm.hop_us * sm.mhz + sm.l2 * (1 + halved) + REST)
        cycles = -(-tiles // at_once) * (waits + read + products + shared)
        yield cycles, replace(sizes, shared_bytes=needs.shared_bytes)


def stepwise(problem: Problem, chip: Chip) -> Plan:
    """Plans schedule *stepwise*: a library GEMM and one fused elementwise launch a step."""
    if problem.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise NoPlan(f"no schedule computes in {problem.dtype}")
    # 512 elements, of rows as long as a cache line where H is. With 4 warps fp64 would spill. A
    # tile may change hands between threads through shared memory, at 8 bytes an element.
    units = min(64, 1 << (problem.hidden_size - 1).bit_length())
    return _made("stepwise", problem, Tiles(512 // units, units, 8, None, "ieee", 4096))


#: In the order in which they are asked. Each raises NoPlan, with the reason as its message.
SCHEDULES: dict[str, Callable[[Problem, Chip], Plan]] = {
    "resident_nvidia": resident_nvidia,
    "resident": resident,
    "cooperative": cooperative,
    "stepwise": stepwise,
}


def _made(schedule: str, problem: Problem, *tiles: Tiles) -> Plan:
    """A plan of tiles for both directions, or for each; without backward where none is needed."""
    backward = tiles[-1] if problem.needs_grad else None
    return Plan(schedule, tiles[0], backward, problem.layers)
