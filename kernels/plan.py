"""Which schedule and which tiles, as a pure function of the problem and the chip.

Nothing here imports triton or touches a device: ``plan`` is a table of measurements
(``measured.py``) with a model behind it (``model.py``), and the tests compile what it returns for
every chip it knows. Whether a plan was measured or modelled stands in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from .chips import CHIPS, Chip, chip_of, refuse_cooperation  # noqa: F401, handed on
from .limits import (
    LARGEST_H,
    LARGEST_H_GFX,
    holds_in_registers,
    is_large,
    is_large_resident,
    operand_columns,
    projects_in_kernel,
    shared_bytes,
    slice_bytes,
)
from .measured import Cut, Measured, measured_cut
from .model import (
    Floors,
    batch_tiles,
    dots_folded,
    floors_on_chip,
    floors_stepwise,
    host_step,
    kind_of,
)
from .spec import SPECS, CellSpec

#: Steps of a stepwise loop in one CUDA graph. The copies around it are up to 12 launches, the steps
#: themselves at least 64; with more of them the buffers grow, and so does what T leaves over.
GRAPH_STEPS = 32


class NoPlan(Exception):  # noqa: N818, it is an answer and no error
    """No schedule takes the problem; the message is the reason, in one sentence."""


class LaunchRefused(RuntimeError):  # noqa: N818, as above
    """The device does not hold all programs of a cooperative launch at once; nothing has run."""


class Problem(NamedTuple):
    """What a plan depends on. T is missing on purpose: no binary and no choice depends on it."""

    cell: str
    input_size: int  # 0: the input has been projected
    hidden_size: int
    batch: int
    directions: int
    dtype: torch.dtype
    precision: str
    needs_grad: bool
    layers: int = 1
    proj_size: int = 0
    ragged: bool = False  # lengths, resets or packed input
    members: int = 1  # equal parts of the batch with weights of their own
    layer_by_layer: bool = False  # no wavefront: each layer's backward makes its gates again


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut: rows per program, blocks of H (start, width), and launch options."""

    block_b: int
    blocks: tuple[tuple[int, int], ...]
    num_warps: int
    max_registers: int | None  # a thread's; None where the compiler has no such option
    input_precision: str
    shared_bytes: int  # estimate, an upper bound of the compiler's figure
    # Of the cooperative schedule alone: how the sum over H is cut (start, pieces, columns of each),
    # how many batch tiles fit the chip at once, and how many dots share an accumulator (0: all).
    k_chunks: tuple[tuple[int, int, int], ...] = ()
    at_once: int = 1
    folded: int = 0

    def describe(self) -> str:
        widths = "+".join(str(width) for _, width in self.blocks)
        return f"{self.block_b} rows x {widths} units, {self.num_warps} warps"


@dataclass(frozen=True)
class Plan:
    """One launch, or in schedule stepwise T of them, forward and backward.

    ``i_blocks`` is empty when a library GEMM projects the input; ``layers`` are run by one launch;
    ``graph_steps`` of a stepwise loop are captured in one CUDA graph, 0 for none; ``members`` as of
    the problem.
    """

    schedule: str
    forward: Tiles
    backward: Tiles | None
    i_blocks: tuple[tuple[int, int], ...]
    layers: int = 1
    floors: tuple[Floors, ...] = ()  # of a step forward and, if planned, backward
    graph_steps: int = 0
    members: int = 1
    measured: Measured | None = None  # None: the model's choice

    @property
    def cut(self) -> Cut:
        """What of the plan a table of measurements can choose."""
        tiles = self.backward
        back = (tiles.block_b, tiles.blocks[0][1], tiles.num_warps) if tiles else (0, 0, 0)
        return Cut(
            self.schedule,
            *(self.forward.block_b, self.forward.blocks[0][1], self.forward.num_warps),
            *back,
            bool(self.i_blocks),
            self.graph_steps,
        )

    @property
    def step(self) -> float:
        """Microseconds of one step of the whole batch, forward and backward, modelled."""
        return sum(floors.step for floors in self.floors)

    def describe(self) -> str:
        parts = [f"forward {self.forward.describe()}"]
        if self.backward:
            parts.append(f"backward {self.backward.describe()}")
        parts.append(
            "input projected in the kernel" if self.i_blocks else "input projected by GEMM"
        )
        if self.layers > 1:
            parts.append(f"{self.layers} layers as a wavefront")
        if self.graph_steps:
            parts.append(f"CUDA graphs of {self.graph_steps} steps")
        names = ("forward at least", "backward at least")
        parts += [f"{n} {floors}" for n, floors in zip(names, self.floors, strict=False)]
        if self.measured is None:
            return f"{self.schedule}: " + "; ".join(parts) + " (modelled, not measured)"
        return f"{self.schedule}: " + "; ".join([*parts, str(self.measured)]) + " (floors modelled)"


def blocks_of(size: int, least: int = 16, most: int = 128) -> tuple[tuple[int, int], ...]:
    """Cuts ``size`` columns into power-of-two blocks, rounding up to ``least`` and no further.

    >>> blocks_of(160)
    ((0, 128), (128, 32))
    >>> blocks_of(33)
    ((0, 32), (32, 16))
    """
    padded = -(-size // least) * least
    blocks, start = [], 0
    while start < padded:
        width = min(most, 1 << ((padded - start).bit_length() - 1))
        blocks.append((start, width))
        start += width
    return tuple(blocks)


@lru_cache(maxsize=4096)
def plan_stack(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
    """The launches of a stack of ``problem.layers`` layers, from the first layer up.

    Each layer by itself, or as many as the chip holds as a wavefront: what the model finds faster.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    width = problem.directions * (problem.proj_size or problem.hidden_size)
    first, above = problem._replace(layers=1), problem._replace(input_size=width, layers=1)
    best = (plan(first, chip), *(plan(above, chip) for _ in range(problem.layers - 1)))
    apart = problem.layer_by_layer or problem.members > 1 or problem.directions > 1
    if problem.layers > 1 and not apart:
        waves = _wavefront(problem, chip)
        if waves and sum(p.step for p in waves) < sum(p.step for p in best):
            best = waves
    return best


@lru_cache(maxsize=4096)
def plan(problem: Problem, chip: Chip) -> Plan:
    """The schedule and tiles of one layer: measured if this problem was on this chip, or modelled.

    A measured choice must be one of ``candidates``: the table can prefer, but not overrule a limit.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    found = measured_cut(problem, chip)
    if found is not None:
        cut, source = found
        for candidate in candidates(problem, chip):
            if candidate.cut == cut:
                return replace(candidate, measured=source)
    return modelled(problem, chip)


@lru_cache(maxsize=4096)
def modelled(problem: Problem, chip: Chip) -> Plan:
    """The model's choice for one layer: resident, else cooperative, else stepwise.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    refused = []
    for schedule in (resident, cooperative):
        try:
            return schedule(problem, chip)
        except NoPlan as reason:
            refused.append(reason)
    try:
        return stepwise(problem, chip)
    except NoPlan as reason:
        raise NoPlan("; ".join(map(str, [*refused, reason]))) from None


def candidates(problem: Problem, chip: Chip) -> Iterator[Plan]:
    """Every plan of one layer that keeps all limits, the model's best of each schedule first.

    Resident: rows of a program, its warps, and who projects the input. Cooperative: slices and rows
    of each direction, in the order of their modelled times. Stepwise: with CUDA graphs and without.
    """
    for schedule, variants in (
        (resident, _resident_variants),
        (cooperative, _cooperative_variants),
        (stepwise, _stepwise_variants),
    ):
        try:
            best = schedule(problem, chip)
        except NoPlan:
            continue
        yield best
        for other in variants(best, problem, chip):
            if other.cut != best.cut:
                yield _with_floors(other, problem, chip)


def _resident_variants(best: Plan, problem: Problem, chip: Chip) -> Iterator[Plan]:
    """Never fewer warps or more rows than the model has: full registers would spill."""
    tiles = best.forward
    for rows, warps in product((8, 16) if chip.warp_size == 32 else (16,), (2, 4, 8)):
        if rows <= tiles.block_b and warps >= tiles.num_warps:
            forward, backward = (
                side and replace(side, block_b=rows, num_warps=warps)
                for side in (best.forward, best.backward)
            )
            assert forward is not None
            yield replace(best, forward=forward, backward=backward)
            if best.i_blocks:
                yield replace(best, forward=forward, backward=backward, i_blocks=())


def _cooperative_variants(best: Plan, problem: Problem, chip: Chip) -> Iterator[Plan]:
    sides = [("forward", best.forward), ("backward", best.backward)][: 1 + problem.needs_grad]
    choices = [
        [tiles for *_, tiles in sorted(_cooperative_tiles(problem, chip, direction), key=_by_model)]
        for direction, _ in sides
    ]
    # Neighbours first: a sum of ranks, and not all backward tiles of the first forward ones.
    for ranks in sorted(product(*(range(len(choice)) for choice in choices)), key=sum):
        forward, *backward = (choice[rank] for choice, rank in zip(choices, ranks, strict=True))
        yield replace(best, forward=forward, backward=backward[0] if backward else None)


def _by_model(found: tuple[float, int, int, Tiles]) -> tuple[float, int, int]:
    return found[:3]


def _stepwise_variants(best: Plan, problem: Problem, chip: Chip) -> Iterator[Plan]:
    yield replace(best, graph_steps=0)
    if chip.concurrent:
        yield replace(best, graph_steps=GRAPH_STEPS)


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


def _spec_of(problem: Problem) -> CellSpec:
    spec = SPECS.get(problem.cell)
    if spec is None:
        raise NoPlan(f"no kernel knows the cell {problem.cell!r}; known are {', '.join(SPECS)}")
    return spec


def _need_dots(problem: Problem) -> None:
    if problem.proj_size:
        raise NoPlan("only schedule stepwise has a projection of h (proj_size > 0)")
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NoPlan(
            f"products in the kernels are of float32, float16 or bfloat16, not {problem.dtype}"
        )


@lru_cache(maxsize=4096)
def resident(problem: Problem, chip: Chip) -> Plan:
    """Tiles for the schedule *resident*, or NoPlan."""
    spec = _spec_of(problem)
    _need_dots(problem)
    amd = chip.warp_size == 64
    wide = problem.dtype == torch.float32
    kind = kind_of(problem, chip)
    precision = kind if wide else "ieee"  # 16-bit operands are multiplied exactly
    largest = LARGEST_H_GFX[kind] if amd else LARGEST_H[kind][spec.gates]
    H = problem.hidden_size
    if largest < H:
        raise NoPlan(
            f"schedule resident holds W_hh in one program, which for {problem.cell} in {kind} "
            f"ends at H={largest}; H is {H}"
        )

    # Two warps cut a 16-wide tile into the 8 columns of an mma; wider ones keep more warps busy.
    # Below 32 columns a tile would be computed by several warps at once, hence no 16 in between.
    blocks = blocks_of(H, least=16 if H <= 16 else 32)
    padded = sum(width for _, width in blocks)
    num_warps = 2 if padded == 16 else 4 if amd or padded <= (32 if wide else 64) else 8
    # Latency, not occupancy: half the rows halve the special-function work of a step (10 per unit
    # and row for an LSTM), as long as there are SMs for twice the programs. The three products of
    # tf32x3, or ragged rows or members in fp32, leave no registers for 16; gfx942 has no matrix
    # instruction for fewer.
    few = batch_tiles(problem.batch, 8, problem.members) * problem.directions <= chip.sms
    more = problem.ragged or problem.members > 1
    scarce = precision == "tf32x3" or (more and wide)
    block_b = 16 if amd else 8 if few or scarce else 16

    i_blocks: tuple[tuple[int, int], ...] = ()
    if problem.input_size and projects_in_kernel(problem.input_size, padded, kind):
        i_blocks = blocks_of(problem.input_size)

    def tiles(direction: str, columns: int) -> Tiles:
        large = is_large_resident(kind, spec.gates, padded, direction, chip.arch)
        shared = shared_bytes(spec.gates, padded, columns, block_b, wide, precision)
        registers = None if amd or large else 255
        return Tiles(block_b, blocks, num_warps, registers, precision, shared)

    forward = tiles("forward", padded + sum(width for _, width in i_blocks))
    backward = tiles("backward", padded)
    if forward.shared_bytes > chip.shared_bytes and i_blocks:
        i_blocks, forward = (), tiles("forward", padded)
    if forward.shared_bytes > chip.shared_bytes:
        raise NoPlan(
            f"schedule resident needs {forward.shared_bytes:,} bytes of shared memory for "
            f"{problem.cell} in {kind} at H={H}; {chip.name} has {chip.shared_bytes:,}"
        )
    planned = Plan("resident", forward, backward, i_blocks, members=problem.members)
    return _with_floors(planned, problem, chip)


@lru_cache(maxsize=4096)
def cooperative(problem: Problem, chip: Chip) -> Plan:
    """Tiles for the schedule *cooperative*, or NoPlan: of those that fit, the fastest by model."""
    spec = _spec_of(problem)
    _need_dots(problem)
    if spec.rowwise:
        raise NoPlan(f"schedule cooperative cuts a row of H, over which {problem.cell} reduces")
    if not chip.cooperates:
        raise NoPlan(f"{chip.name} has refused a cooperative launch")
    kind = kind_of(problem, chip)
    if chip.warp_size == 64:
        raise NoPlan(
            f"schedule cooperative multiplies in batches, which Triton does not give to the matrix "
            f"units of {chip.name}"
        )
    if kind == "ieee":
        raise NoPlan(
            "schedule cooperative has no tiles for fp32 in ieee, which tensor cores do not multiply"
        )
    if problem.layers > 1 and problem.directions > 1:
        raise NoPlan("a wavefront has one direction; the other needs the whole layer below")
    best = []
    for direction in ("forward", "backward"):
        fitting = list(_cooperative_tiles(problem, chip, direction))
        if not fitting:
            raise NoPlan(
                f"schedule cooperative found no slices of W_hh that {chip.name} holds on its "
                f"{chip.sms} SMs for {problem.cell} in {kind} at H={problem.hidden_size}"
            )
        best.append(min(fitting)[-1])
    forward, backward = best
    planned = Plan("cooperative", forward, backward, (), problem.layers, members=problem.members)
    return _with_floors(planned, problem, chip)


def _cooperative_tiles(
    problem: Problem, chip: Chip, direction: str
) -> Iterator[tuple[float, int, int, Tiles]]:
    """Everything that fits: its modelled time, for ties its size, and the tiles."""
    H, kind = problem.hidden_size, kind_of(problem, chip)
    gates, wide = SPECS[problem.cell].gates, problem.dtype == torch.float32
    most = operand_columns(kind, gates, problem.layers, direction, H, problem.ragged)
    chunks = k_chunks(H, kind, most)
    columns = sum(pieces * width for _, pieces, width in chunks)
    for units, rows in product((8, 16, 32, 64, 128), (16, 32)):
        partners = -(-H // units)
        groups = partners * problem.directions * problem.layers
        shared = slice_bytes(problem, kind, units, rows, columns)
        if (
            groups > chip.sms
            or (partners > 1 and not chip.concurrent)
            or shared > chip.shared_bytes
            or not holds_in_registers(
                kind, gates, problem.layers, problem.ragged, direction, units, rows, columns
            )
        ):
            continue
        at_once = max(1, min(batch_tiles(problem.batch, rows, problem.members), chip.sms // groups))
        large = is_large(kind, gates, units, chunks, direction, problem.ragged)
        registers, precision = None if large else 255, kind if wide else "ieee"
        tiles = Tiles(rows, ((0, units),), 8, registers, precision, shared, chunks, at_once)
        tiles = replace(tiles, folded=dots_folded(problem, kind, tiles, direction))
        floors = floors_on_chip(problem, chip, tiles, problem.layers, direction)
        yield floors.step, rows, units, tiles


def k_chunks(H: int, kind: str, most: int) -> tuple[tuple[int, int, int], ...]:
    """Cuts H columns into chunks of equally many pieces: (start, pieces, columns of a piece).

    8 pieces, one for each warp, or 4 where that saves much padding. With fewer pieces several warps
    would compute the same. ``most``: how many columns 8 pieces hold together.

    >>> k_chunks(1024, "16-bit", 1024)
    ((0, 8, 128),)
    >>> k_chunks(192, "16-bit", 1024)
    ((0, 4, 32), (128, 4, 16))
    """
    saves = -H % 128 != -H % 64 and 4 * (-H % 128) > H
    pieces = 4 if saves and 2 * H <= most else 8
    most = most * pieces // 8
    # Unequal chunks of fp32 spill above 512; equal ones pad H = 768 to 1024.
    least = most if kind != "16-bit" and most < H else 16 * pieces
    blocks = blocks_of(H, least, most)
    if len(blocks) > 2 and H <= most:  # three unequal ones spill 24 to 80 bytes
        pieces, blocks = 8, ((0, most),)
    return tuple((start, pieces, width // pieces) for start, width in blocks)


def stepwise(problem: Problem, chip: Chip) -> Plan:
    """Tiles for the schedule *stepwise*, or NoPlan."""
    spec = _spec_of(problem)
    if problem.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise NoPlan(f"no schedule computes in {problem.dtype}")
    if spec.rowwise:
        raise NoPlan(f"schedule stepwise cuts a row of H, over which {problem.cell} reduces")
    if problem.proj_size and problem.ragged:
        raise NoPlan("schedule stepwise projects h (proj_size > 0) of dense sequences only")
    tiles = stepwise_tiles(problem.hidden_size)
    planned = Plan("stepwise", tiles, tiles, (), members=problem.members)
    planned = _with_floors(planned, problem, chip)
    # A graph costs copies in and out of its buffers, and where the chip is the slower one the host
    # runs ahead of it anyway. Packed steps have sizes of their own, and no graph.
    is_host_bound = planned.floors[0].step < host_step(problem)
    graph_steps = GRAPH_STEPS if is_host_bound and chip.concurrent else 0
    return replace(planned, graph_steps=graph_steps)


def stepwise_tiles(H: int) -> Tiles:
    """512 elements, of rows as long as a cache line where H is. With 4 warps fp64 would spill.

    A tile may change hands between threads through shared memory, once 8 bytes an element.
    """
    width = min(64, 1 << (H - 1).bit_length())
    return Tiles(512 // width, ((0, width),), 8, None, "ieee", 4096)


def _with_floors(plan: Plan, problem: Problem, chip: Chip) -> Plan:
    """The plan with its modelled times, and without backward where none is needed."""
    sides = [("forward", plan.forward), ("backward", plan.backward)][: 1 + problem.needs_grad]
    floors = []
    for direction, tiles in sides:
        if plan.schedule == "stepwise" or tiles is None:
            floors.append(floors_stepwise(problem, chip, direction))
        else:
            floors.append(floors_on_chip(problem, chip, tiles, plan.layers, direction))
    backward = plan.backward if problem.needs_grad else None
    return replace(plan, backward=backward, floors=tuple(floors))
