"""A lower bound for the time of one step, from the figures of the chip: modelled, not measured.

A step of a recurrence cannot be faster than the slowest of four throughputs: matrix units, shared
memory, special-function units and loads from L2. To that comes what cannot overlap: operands
through shared memory, activations, and the hop from one program's store to another's load.
"""

from .latencies import TIMINGS, Timings
from .problem import Chip, Plan, Problem, Tiles

ACTIVATIONS = 150  # cycles of one sigmoid after another, then tanh of c
ROUND_TRIP = 100  # cycles from registers through shared memory into the operand of an mma
LONGEST_CHAIN = 8  # dependent mma instructions of a step of schedule cooperative, at most
LAUNCH_US = 1.3  # from kernel to kernel in a CUDA graph, on an H100


def step_us(plan: Plan, problem: Problem, chip: Chip) -> float:
    """Returns the floor of a step, forward and, if planned, backward, in microseconds."""
    sides = ((plan.forward, True), (plan.backward, False))
    return sum(floor_us(plan.schedule, problem, chip, tiles, f) for tiles, f in sides if tiles)


def floor_us(schedule: str, problem: Problem, chip: Chip, tiles: Tiles, forward: bool) -> float:
    """Returns the floor of one step of the whole batch, all its rounds together."""
    sm = TIMINGS.get(chip.arch, TIMINGS["sm_90"])
    if schedule == "stepwise":
        return _gemms(problem, chip, sm, forward) / sm.mhz + LAUNCH_US * (
            len(problem.spec.phases) * (problem.directions + 1)
        )
    return _on_chip(schedule, problem, chip, sm, tiles, forward)


def _on_chip(
    schedule: str, p: Problem, chip: Chip, sm: Timings, tiles: Tiles, forward: bool
) -> float:
    """Programs that keep their weights; they exchange h or dgates if units are cut."""
    gluon, cut = schedule.endswith("_nvidia"), schedule.startswith("cooperative")
    rows, units, itemsize, phases = tiles.block_b, tiles.block_h, p.dtype.itemsize, p.spec.phases
    columns = p.hidden_size if cut else units
    weights = p.spec.gates * units * columns * (2 if p.layers > 1 else 1)
    read = rows * columns * itemsize * (1 if forward else p.spec.gates)
    throughputs = (
        2 * (rows if gluon else max(rows, 16)) * weights / flops_a_cycle(p.kind(chip), sm),
        0 if gluon else weights * itemsize / sm.shared_bytes,  # W_hh, or it is in registers
        rows * units * p.spec.specials[not forward] * sm.mufu / 128,
        read / sm.global_bytes if cut else 0,
    )
    cycles = max(throughputs) + ROUND_TRIP * len(phases) + ACTIVATIONS
    hops = len(phases) * (sm.hop_us + sm.l2 / sm.mhz) if cut else 0.0
    rounds = -(-p.batch // rows // tiles.at_once) if cut else 1
    return rounds * (cycles / sm.mhz + hops)


def _gemms(p: Problem, chip: Chip, sm: Timings, forward: bool) -> float:
    """Cycles of a step whose weights are read from L2 by all SMs."""
    weights = p.spec.gates * p.hidden_size**2 * p.directions
    specials = p.batch * p.hidden_size * p.directions * p.spec.specials[not forward]
    throughputs = (
        2 * p.batch * weights / flops_a_cycle(p.kind(chip), sm),
        specials * sm.mufu / 128,
        weights * p.dtype.itemsize / sm.global_bytes,
    )
    return max(throughputs) / chip.sms


def flops_a_cycle(kind: str, sm: Timings) -> float:
    """Returns the throughput of an SM: of ``mma``, or in ieee fp32 (and fp64) of FMA."""
    if kind in ("ieee", "fp64"):
        return 4 * 32 * 2 * sm.fma_pipes / sm.fma
    return 4 * 4096 / sm.hmma / {"16-bit": 1, "tf32": 2, "tf32x3": 6}[kind]


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
