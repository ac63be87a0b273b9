"""A lower bound for the time of one step, from the figures of the chip: modelled, not measured.

A step of a recurrence cannot be faster than the slowest of five: four throughputs (matrix units,
shared memory, special-function units, L2) and the chain of dependent mma instructions, which runs
beside them. To that comes what cannot overlap: operands through shared memory, activations, and
the hop from one program's store to another's load.

Figures of sm_90 (H100, H200) by source: 24 cycles from mma to dependent mma, 63 % of the tensor
peak within reach of mma.sync, L2 latency 263 cycles (Luo et al., arXiv 2402.13499); 16
special-function operations and 128 shared-memory bytes a cycle and SM (NVIDIA's tables); 0.65 us
from a releasing add to the acquiring poll that sees it, 1.3 us from kernel to kernel (public
probes of an H100). sm_80 has its own clock and peaks; other chips are modelled as sm_90.
"""

from typing import NamedTuple

import torch

from .problem import Chip, Floors, Problem, Tiles

MMA_LATENCY = 24  # cycles
LONGEST_CHAIN = 8  # dependent mma instructions of a step of schedule cooperative, at most
ACTIVATIONS = 150  # cycles of one sigmoid after another, then tanh of c
ROUND_TRIP = 100  # cycles from registers through shared memory into the operand of an mma
SPECIALS_A_CYCLE = 16
SHARED_BYTES_A_CYCLE = 128


class Speeds(NamedTuple):
    """The throughput of one architecture in a microsecond."""

    cycles: float  # of the clock, i.e. MHz
    flops: dict[str, float]  # of one SM, by kind of product
    l2_bytes: float  # of the whole chip
    l2_latency: float  # microseconds
    hop: float  # microseconds from release to acquire
    launch: float  # microseconds a kernel


_SM_90 = {"16-bit": 4.5e6, "tf32": 2.26e6, "tf32x3": 0.75e6, "ieee": 0.45e6, "fp64": 0.45e6}
_SM_80 = {"16-bit": 2.9e6, "tf32": 1.45e6, "tf32x3": 0.48e6, "ieee": 0.18e6, "fp64": 0.18e6}
SPEEDS = {
    "sm_90": Speeds(1755.0, _SM_90, 5.5e6, 0.15, 0.65, 1.3),
    "sm_80": Speeds(1410.0, _SM_80, 4.4e6, 0.19, 0.65, 1.6),
}


def dependent_mma(problem: Problem, kind: str, tiles: Tiles, forward: bool) -> tuple[int, ...]:
    """Counts the longest chain of mma instructions of each product of a step.

    The compiler makes one accumulator of a sum of dots, or one of every ``folded`` of them: forward
    of all chunks, backward of all gates of a phase, too. Backward in a wavefront has one more
    product, with all gates of the layer above.
    """
    each = _mma_of_chunks(kind, tiles)
    gates = [len(phase) for phase in problem.spec.phases]
    if not forward and problem.layers > 1:
        gates.append(problem.spec.gates)
    if kind == "tf32x3":  # three products of one pair, whose result is added
        return (3 * max(each),) * len(gates)
    if forward:
        return (_longest(each, tiles.folded),) * len(gates)
    # With several gates each chunk has its own accumulator; they are added at the end.
    return tuple(_longest([max(each)] * n if n > 1 else each, tiles.folded) for n in gates)


def dots_per_accumulator(problem: Problem, kind: str, tiles: Tiles, forward: bool) -> int:
    """Returns how many dots of a sum may share an accumulator, 0 for all: see LONGEST_CHAIN."""
    if max(dependent_mma(problem, kind, tiles, forward)) <= LONGEST_CHAIN:
        return 0
    return max(1, LONGEST_CHAIN // max(_mma_of_chunks(kind, tiles)))


def _mma_of_chunks(kind: str, tiles: Tiles) -> list[int]:
    """Returns the depth of the dot of each chunk of H, in mma instructions of one piece."""
    deep = 16 if kind == "16-bit" else 8  # columns of one instruction
    return [-(-width // deep) for *_, width in tiles.k_chunks or ((0, 1, tiles.block_h),)]


def _longest(each: list[int], folded: int) -> int:
    n = folded or len(each)
    return max(sum(each[i : i + n]) for i in range(0, len(each), n))


def floors_of(schedule: str, problem: Problem, chip: Chip, tiles: Tiles, forward: bool) -> Floors:
    """The floors of a step of a plan, all rounds of batch tiles together."""
    speeds = SPEEDS.get(chip.arch, SPEEDS["sm_90"])
    if schedule == "stepwise":
        return _from_memory(problem, chip, speeds, forward)
    return _on_chip(problem, chip, speeds, tiles, forward)


def _on_chip(p: Problem, chip: Chip, speeds: Speeds, tiles: Tiles, forward: bool) -> Floors:
    """Programs that keep their weights; they exchange h or dgates if the sum over H is cut."""
    spec, kind, together = p.spec, p.kind(chip), bool(tiles.k_chunks)
    rows, units, itemsize = tiles.block_b, tiles.block_h, p.dtype.itemsize
    columns = sum(pieces * width for _, pieces, width in tiles.k_chunks) or units
    operands = 2 if p.layers > 1 else 1  # a layer above the first projects its own input
    weights = spec.gates * units * columns * operands
    batch_tiles, rounds, partners = -(-p.batch // rows), 1, 1
    if together:
        rounds, partners = -(-batch_tiles // tiles.at_once), -(-p.hidden_size // units)
        batch_tiles = min(batch_tiles, tiles.at_once)
    programs = partners * batch_tiles * p.directions * p.layers
    read = rows * columns * itemsize * operands * (1 if forward else spec.gates)
    chains, hop = dependent_mma(p, kind, tiles, forward), speeds.hop + speeds.l2_latency
    one = Floors(
        products=2 * max(rows, 16) * weights / speeds.flops[kind],  # an mma has 16 rows
        shared=weights * itemsize / SHARED_BYTES_A_CYCLE / speeds.cycles,
        specials=rows * units * spec.specials[not forward] / SPECIALS_A_CYCLE / speeds.cycles,
        l2=programs * read / speeds.l2_bytes if together else 0.0,
        mma=MMA_LATENCY * sum(chains) / speeds.cycles,
        chain=(ROUND_TRIP * len(chains) + ACTIVATIONS) / speeds.cycles,
        sync=len(spec.phases) * hop if together else 0.0,
    )
    return Floors(*(rounds * floor for floor in one))


def _from_memory(p: Problem, chip: Chip, speeds: Speeds, forward: bool) -> Floors:
    """A GEMM a phase and direction, and a launch a phase."""
    H, D = p.hidden_size, p.directions
    weights = p.spec.gates * H * H * D
    specials = p.batch * H * D * p.spec.specials[not forward]
    return Floors(
        products=2 * p.batch * weights / (speeds.flops[p.kind(chip)] * chip.sms),
        specials=specials / SPECIALS_A_CYCLE / speeds.cycles / chip.sms,
        l2=weights * p.dtype.itemsize / speeds.l2_bytes,
        sync=len(p.spec.phases) * (D + 1) * speeds.launch,
    )


def cudnn_step(problem: Problem) -> float | None:
    """Microseconds of a step of cuDNN as others report them, None where there is no report.

    The lower ends of reports for cuDNN 8 as torch drives it on A100 and H100, in 16 bits or tf32;
    nothing is measured. Layers run one after the other, directions side by side.
    """
    p, H = problem, problem.hidden_size
    if p.dtype.itemsize == 8 or (p.dtype == torch.float32 and p.precision != "tf32"):
        return None
    persists = (
        p.cell == "lstm" and p.dtype == torch.float16 and p.layers == p.directions == 1
        and H % 128 == p.batch % 8 == 0 and H <= 1024 and p.batch <= 128
    )  # fmt: skip
    if H <= 64:
        forward, backward = 0.6, 1.0
    elif H <= 128:
        forward, backward = 2.0, 2.0
    elif persists:
        forward, backward = 2.0, 3.1
    else:
        forward, backward = 6.5, 9.0
    return (forward + backward * p.needs_grad) * p.layers
