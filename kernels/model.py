"""How long one step must take at least: the physical floors of a plan, in microseconds.

Arithmetic on the chip's figures and no measurement: everything it says is *modelled*. A step of a
recurrence cannot be faster than the slowest of five: four throughputs (matrix units, shared
memory, special-function units, L2) and the chain of dependent mma instructions, which runs while
they do. To that comes what is strictly one after the other: operands through shared memory,
activations, and the hop from one program's store to another's load.

Figures of sm_90 (H100, H200), by source: 24 cycles from mma to dependent mma, 63 % of the tensor
peak within reach of mma.sync, L2 latency 263 cycles (Luo et al., arXiv 2402.13499); 16
special-function operations and 128 shared-memory bytes a cycle and SM (NVIDIA's tables); 0.65 us
from a releasing add to the acquiring poll that sees it, 1.3 us for a kernel node of a graph
(public probes of an H100). sm_80 has its own clocks and peaks and the hop of sm_90; other chips
have no figures of their own yet and are modelled as sm_90.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .spec import SPECS

if TYPE_CHECKING:
    from .plan import Chip, Problem, Tiles

MMA_LATENCY = 24  # cycles
#: Dependent mma of a step of schedule cooperative: of 8 the latency is 0.11 us, of a hop 0.65.
LONGEST_CHAIN = 8
ACTIVATIONS = 150  # cycles of one sigmoid after another, then tanh of c
ROUND_TRIP = 100  # cycles from registers through shared memory into the operand of an mma
SPECIALS_A_CYCLE = 16
SHARED_BYTES_A_CYCLE = 128
#: Microseconds of the host for one launch from Python: others' kernels of two to three launches a
#: step, bound by the host, are reported at 20 us and more a step.
HOST_LAUNCH = 8.0


class Speeds(NamedTuple):
    """What one architecture does in a microsecond."""

    cycles: float  # of the clock, i.e. MHz
    flops: dict[str, float]  # of one SM, by kind of product
    l2_bytes: float  # of the whole chip
    l2_latency: float  # microseconds
    hop: float  # microseconds from release to acquire
    launch: float  # microseconds a kernel in a graph


SPEEDS = {
    "sm_90": Speeds(
        1755.0,
        {"16-bit": 4.5e6, "tf32": 2.26e6, "tf32x3": 0.75e6, "ieee": 0.45e6},
        5.5e6, 0.15, 0.65, 1.3,
    ),
    "sm_80": Speeds(
        1410.0,
        {"16-bit": 2.9e6, "tf32": 1.45e6, "tf32x3": 0.48e6, "ieee": 0.18e6},
        4.4e6, 0.19, 0.65, 1.6,
    ),
}  # fmt: skip


class Floors(NamedTuple):
    """Microseconds of one step of the whole batch, by what bounds it."""

    products: float  # matrix units of the busiest SM
    shared: float  # weights from shared memory to the matrix units
    specials: float  # exponentials and reciprocals
    l2: float  # what all programs read through L2
    mma: float  # the longest chain of dependent mma instructions
    chain: float  # operands through shared memory, activations
    sync: float  # handing h or dgates to the other programs

    @property
    def step(self) -> float:
        return max(self[:5]) + self.chain + self.sync

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in self._asdict().items() if value)
        return f"{self.step:.2f} us a step ({parts})"


def batch_tiles(B: int, rows: int, members: int) -> int:
    """How many tiles of ``rows`` sequences there are, none with sequences of two members."""
    return members * -(-(B // members) // rows)


def kind_of(problem: Problem, chip: Chip) -> str:
    """How operands are multiplied: ``"16-bit"``, ``"tf32"``, ``"tf32x3"`` or ``"ieee"``."""
    if problem.dtype.itemsize == 2:
        return "16-bit"
    # The precision is of fp32 alone, and MIOpen has no tf32.
    return "ieee" if problem.dtype.itemsize == 8 or chip.warp_size == 64 else problem.precision


def dependent_mma(
    problem: Problem, kind: str, tiles: Tiles, layers: int, direction: str
) -> tuple[int, ...]:
    """For each product of a step the longest chain of mma instructions as it is compiled.

    The compiler makes of a sum of products one accumulator, or one of every ``tiles.folded`` of
    them: forward of all chunks or blocks of H, backward of all gates of a phase as well. Backward
    in a wavefront has a product more, with all gates of the layer above; forward that of the layer
    below falls into the hop.
    """
    spec, each = SPECS[problem.cell], _mma_of_chunks(kind, tiles)
    gates = [len(phase) for phase in spec.phases]
    if direction == "backward" and layers > 1:
        gates.append(spec.gates)
    if kind == "tf32x3":  # three products of one pair are a chain, and what they give is added
        return (3 * max(each),) * len(gates)
    if direction == "forward" or (len(each) > 1 and not tiles.k_chunks):
        return (_folded(each, tiles),) * len(gates)
    # Of several gates each chunk has an accumulator of its own; they are added at the end.
    return tuple(_folded([max(each)] * n if n > 1 else each, tiles) for n in gates)


def dots_folded(problem: Problem, kind: str, tiles: Tiles, direction: str) -> int:
    """How many dots of a sum may share an accumulator, 0 for all: those of no longer chain."""
    chains = dependent_mma(problem, kind, tiles, problem.layers, direction)
    if max(chains) <= LONGEST_CHAIN:
        return 0
    return max(1, LONGEST_CHAIN // max(_mma_of_chunks(kind, tiles)))


def _mma_of_chunks(kind: str, tiles: Tiles) -> list[int]:
    """How deep the dot of each chunk or block of H is, in mma instructions of one piece."""
    cut = [width for *_, width in tiles.k_chunks or tiles.blocks]
    return [-(-width // (16 if kind == "16-bit" else 8)) for width in cut]


def _folded(each: list[int], tiles: Tiles) -> int:
    """The longest chain of dots that are ``each`` so deep, added in their order."""
    n = tiles.folded or len(each)
    return max(sum(each[i : i + n]) for i in range(0, len(each), n))


def floors_on_chip(
    problem: Problem, chip: Chip, tiles: Tiles, layers: int, direction: str
) -> Floors:
    """Of the schedules that hold their weights: resident, and cooperative if there are chunks.

    For all rounds of batch tiles together.
    """
    spec, speeds, kind = SPECS[problem.cell], _speeds(chip), kind_of(problem, chip)
    forward, itemsize = direction == "forward", problem.dtype.itemsize
    together = bool(tiles.k_chunks)
    units = sum(width for _, width in tiles.blocks)
    columns = sum(n * width for _, n, width in tiles.k_chunks) if together else units
    operands = 2 if layers > 1 else 1  # a layer above the first projects its own input
    weights = spec.gates * units * columns * operands
    rows = max(tiles.block_b, 16)  # an mma has no fewer
    at_once, rounds = batch_tiles(problem.batch, tiles.block_b, problem.members), 1
    if together:
        rounds = -(-at_once // tiles.at_once)
        at_once = min(at_once, tiles.at_once)
    partners = -(-problem.hidden_size // units) if together else 1
    programs = partners * at_once * problem.directions * layers
    read = tiles.block_b * columns * itemsize * (1 if forward else spec.gates) * operands
    phases = len(spec.phases)
    chains = dependent_mma(problem, kind, tiles, layers, direction)
    specials = tiles.block_b * units * spec.specials[not forward]
    one = Floors(
        products=2 * rows * weights / speeds.flops[kind],
        shared=weights * itemsize / SHARED_BYTES_A_CYCLE / speeds.cycles,
        specials=specials / SPECIALS_A_CYCLE / speeds.cycles,
        l2=programs * read / speeds.l2_bytes if together else 0.0,
        mma=MMA_LATENCY * sum(chains) / speeds.cycles,
        chain=(ROUND_TRIP * len(chains) + ACTIVATIONS) / speeds.cycles,
        sync=phases * (speeds.hop + speeds.l2_latency) if together else 0.0,
    )
    return Floors(*(rounds * floor for floor in one))


def floors_stepwise(problem: Problem, chip: Chip, direction: str) -> Floors:
    """A GEMM for each phase and direction and a launch for each phase, all as nodes of a graph."""
    spec, speeds, kind = SPECS[problem.cell], _speeds(chip), kind_of(problem, chip)
    H, D = problem.hidden_size, problem.directions
    weights = spec.gates * H * H * D
    specials = problem.batch * H * D * spec.specials[direction != "forward"]
    phases = len(spec.phases)
    return Floors(
        products=2 * problem.batch * weights / (speeds.flops[kind] * chip.sms),
        shared=0.0,
        specials=specials / SPECIALS_A_CYCLE / speeds.cycles / chip.sms,
        l2=problem.members * weights * problem.dtype.itemsize / speeds.l2_bytes,
        mma=0.0,
        chain=0.0,
        sync=phases * (D + 1) * speeds.launch,
    )


def host_step(problem: Problem) -> float:
    """Microseconds that the host needs to launch a step of schedule stepwise without a graph."""
    return len(SPECS[problem.cell].phases) * (problem.directions + 1) * HOST_LAUNCH


def cudnn_step(problem: Problem) -> float | None:
    """Microseconds of a step of torch's operator, or None where nobody has reported any.

    The lower ends of what others report for cuDNN 8 as torch drives it, forward and backward, on
    A100 and H100; nothing measured here. Its layers are taken as one after the other, its
    directions as side by side.
    """
    H, halves = problem.hidden_size, problem.dtype.itemsize == 2
    if not halves and (problem.dtype.itemsize == 8 or problem.precision != "tf32"):
        return None
    persists = (
        problem.cell == "lstm"
        and str(problem.dtype) == "torch.float16"
        and problem.layers == problem.directions == 1
        and H % 128 == problem.input_size % 128 == problem.batch % 8 == 0
        and H <= 1024
        and problem.batch <= 128
    )
    if H <= 64:
        forward, backward = 0.6, 1.0
    elif H <= 128:
        forward, backward = 2.0, 2.0
    elif persists:
        forward, backward = 2.0, 3.1
    else:
        forward, backward = 6.5, 9.0
    return (forward + backward * problem.needs_grad) * problem.layers


def _speeds(chip: Chip) -> Speeds:
    return SPEEDS.get(chip.arch, SPEEDS["sm_90"])
