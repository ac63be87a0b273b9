"""A lower bound for the time of one step, from the figures of the chip: modelled, not measured.

A step of a recurrence cannot be faster than the slowest of five: four throughputs (matrix units,
shared memory, special-function units, L2) and the chain of dependent mma instructions, which runs
beside them. To that comes what cannot overlap: operands through shared memory, activations, and
the hop from one program's store to another's load.

Figures of sm_90 (H100, H200) by source: 24 cycles from mma to dependent mma, 63 % of the tensor
peak within reach of mma.sync, L2 latency 263 cycles (Luo et al., arXiv 2402.13499); 16
special-function operations and 128 shared-memory bytes a cycle and SM (NVIDIA's tables); 0.65 us
from a releasing add to the acquiring poll that sees it, 1.3 us for a kernel in a graph (public
probes of an H100). sm_80 has its own clock and peaks; other chips are modelled as sm_90.
"""

from __future__ import annotations

from typing import NamedTuple

from .spec import CellSpec

MMA_LATENCY = 24  # cycles
#: Dependent mma instructions of a step of schedule cooperative, at most.
LONGEST_CHAIN = 8
ACTIVATIONS = 150  # cycles of one sigmoid after another, then tanh of c
ROUND_TRIP = 100  # cycles from registers through shared memory into the operand of an mma
SPECIALS_A_CYCLE = 16
SHARED_BYTES_A_CYCLE = 128


class Speeds(NamedTuple):
    """What one architecture does in a microsecond."""

    cycles: float  # of the clock, i.e. MHz
    flops: dict[str, float]  # of one SM, by kind of product
    l2_bytes: float  # of the whole chip
    l2_latency: float  # microseconds
    hop: float  # microseconds from release to acquire
    launch: float  # microseconds a kernel


_SM_90 = {"16-bit": 4.5e6, "tf32": 2.26e6, "tf32x3": 0.75e6, "ieee": 0.45e6}
_SM_80 = {"16-bit": 2.9e6, "tf32": 1.45e6, "tf32x3": 0.48e6, "ieee": 0.18e6}
SPEEDS = {
    "sm_90": Speeds(1755.0, _SM_90, 5.5e6, 0.15, 0.65, 1.3),
    "sm_80": Speeds(1410.0, _SM_80, 4.4e6, 0.19, 0.65, 1.6),
}


class Launch(NamedTuple):
    """The sizes of one launch of schedule resident or cooperative, in one direction."""

    spec: CellSpec
    kind: str  # of products: "16-bit", "tf32", "tf32x3" or "ieee"
    forward: bool
    layers: int
    rows: int  # sequences of a program
    units: int  # hidden units of a program
    chunks: tuple[tuple[int, int, int], ...]  # of the sum over H: start, pieces, columns of each
    folded: int  # dots that share an accumulator, 0: all
    partners: int  # programs that share a batch tile, with those of other layers and directions
    tiles: int  # batch tiles at once
    rounds: int  # of batch tiles, one after the other
    exchanges: bool  # programs read what others wrote


class Floors(NamedTuple):
    """Microseconds of one step of the whole batch, by what bounds it."""

    products: float  # matrix units of the busiest SM
    shared: float  # weights from shared memory to the matrix units
    specials: float  # exponentials and reciprocals
    l2: float  # what all programs read through L2
    mma: float  # the longest chain of dependent mma instructions
    chain: float  # operands through shared memory, activations
    sync: float  # handing h or dgates to the other programs, or launching

    @property
    def step(self) -> float:
        return max(self[:5]) + self.chain + self.sync

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in self._asdict().items() if value)
        return f"{self.step:.2f} us a step ({parts})"


def dependent_mma(launch: Launch) -> tuple[int, ...]:
    """Counts the longest chain of mma instructions of each product of a step.

    The compiler makes one accumulator of a sum of dots, or one of every ``folded`` of them: forward
    of all chunks, backward of all gates of a phase, too. Backward in a wavefront has one more
    product, with all gates of the layer above.
    """
    deep = 16 if launch.kind == "16-bit" else 8  # columns of one instruction
    each = [-(-width // deep) for _, _, width in launch.chunks]
    gates = [len(phase) for phase in launch.spec.phases]
    if not launch.forward and launch.layers > 1:
        gates.append(launch.spec.gates)
    if launch.kind == "tf32x3":  # three products of one pair, whose result is added
        return (3 * max(each),) * len(gates)
    if launch.forward:
        return (_longest(each, launch.folded),) * len(gates)
    # With several gates each chunk has its own accumulator; they are added at the end.
    return tuple(_longest([max(each)] * n if n > 1 else each, launch.folded) for n in gates)


def _longest(each: list[int], folded: int) -> int:
    n = folded or len(each)
    return max(sum(each[i : i + n]) for i in range(0, len(each), n))


def dots_per_accumulator(launch: Launch) -> int:
    """Returns how many dots of a sum may share an accumulator, 0 for all: see LONGEST_CHAIN."""
    if max(dependent_mma(launch)) <= LONGEST_CHAIN:
        return 0
    deep = 16 if launch.kind == "16-bit" else 8
    return max(1, LONGEST_CHAIN // max(-(-width // deep) for _, _, width in launch.chunks))


def floors_on_chip(launch: Launch, arch: str) -> Floors:
    """The floors of a launch that keeps its weights on the chip, all rounds together."""
    spec, speeds = launch.spec, SPEEDS.get(arch, SPEEDS["sm_90"])
    itemsize = 2 if launch.kind == "16-bit" else 4
    columns = sum(pieces * width for _, pieces, width in launch.chunks)
    operands = 2 if launch.layers > 1 else 1  # a layer above the first projects its own input
    weights = spec.gates * launch.units * columns * operands
    read = launch.rows * columns * itemsize * operands * (1 if launch.forward else spec.gates)
    chains, phases = dependent_mma(launch), len(spec.phases)
    specials = launch.rows * launch.units * spec.specials[not launch.forward]
    programs = launch.partners * launch.tiles
    one = Floors(
        products=2 * max(launch.rows, 16) * weights / speeds.flops[launch.kind],
        shared=weights * itemsize / SHARED_BYTES_A_CYCLE / speeds.cycles,
        specials=specials / SPECIALS_A_CYCLE / speeds.cycles,
        l2=programs * read / speeds.l2_bytes if launch.exchanges else 0.0,
        mma=MMA_LATENCY * sum(chains) / speeds.cycles,
        chain=(ROUND_TRIP * len(chains) + ACTIVATIONS) / speeds.cycles,
        sync=phases * (speeds.hop + speeds.l2_latency) if launch.exchanges else 0.0,
    )
    return Floors(*(launch.rounds * floor for floor in one))


def floors_stepwise(
    spec: CellSpec, kind: str, itemsize: int, sizes: tuple[int, int, int], sms: int, arch: str,
    forward: bool,
) -> Floors:  # fmt: skip
    """The floors of a GEMM a phase and direction and a launch a phase; sizes are H, B and D."""
    speeds, (H, B, D) = SPEEDS.get(arch, SPEEDS["sm_90"]), sizes
    weights = spec.gates * H * H * D
    specials = B * H * D * spec.specials[not forward]
    return Floors(
        products=2 * B * weights / (speeds.flops[kind] * sms),
        shared=0.0,
        specials=specials / SPECIALS_A_CYCLE / speeds.cycles / sms,
        l2=weights * itemsize / speeds.l2_bytes,
        mma=0.0,
        chain=0.0,
        sync=len(spec.phases) * (D + 1) * speeds.launch,
    )


def cudnn_step(cell: str, dtype: str, H: int, B: int, chains: int, needs_grad: bool) -> float:
    """Returns the microseconds of a step of cuDNN as others report them; nothing is measured.

    The lower ends of reports for cuDNN 8 as torch drives it on A100 and H100, in 16 bits or tf32.
    ``chains``: the layers, one after the other; directions run side by side.
    """
    persists = cell == "lstm" and dtype == "float16" and chains == 1 and B % 8 == 0
    if H <= 64:
        forward, backward = 0.6, 1.0
    elif H <= 128:
        forward, backward = 2.0, 2.0
    elif persists and H % 128 == 0 and H <= 1024 and B <= 128:
        forward, backward = 2.0, 3.1
    else:
        forward, backward = 6.5, 9.0
    return (forward + backward * needs_grad) * chains
