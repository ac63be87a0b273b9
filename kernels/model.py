"""A lower bound for the time of one step, from the figures of the chip: modelled, not measured.

A step of a recurrence cannot be faster than the slowest of four throughputs: matrix units, shared
memory, special-function units and loads from L2. To that comes what cannot overlap: operands
through shared memory, activations, and the hop from one program's store to another's load.
"""

from .latencies import TIMINGS, Timings
from .problem import Chip, Problem, Tiles

ACTIVATIONS = 150  # cycles of one sigmoid after another, then tanh of c
ROUND_TRIP = 100  # cycles from registers through shared memory into the operand of an mma
L2_BYTES = 24  # a cycle and SM: 5.5 TB/s of an H100
LAUNCH_US = 1.3  # from kernel to kernel in a CUDA graph, on an H100


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
    gluon, cut = schedule != "resident", schedule == "cooperative"
    rows, units, itemsize, phases = tiles.block_b, tiles.block_h, p.dtype.itemsize, p.spec.phases
    columns = p.hidden_size if cut else units
    weights = p.spec.gates * units * columns * (2 if p.layers > 1 else 1)
    groups = min(-(-p.batch // rows), tiles.at_once) * p.directions * p.layers
    busy = groups * -(-p.hidden_size // units) / chip.sms  # the share of SMs
    read = busy * rows * columns * itemsize * (1 if forward else p.spec.gates)
    throughputs = (
        2 * (rows if gluon else max(rows, 16)) * weights / flops_a_cycle(p.kind(chip), sm),
        0 if gluon else weights * itemsize / sm.shared_bytes,  # W_hh, or it is in registers
        rows * units * p.spec.specials[not forward] * sm.mufu / 128,
        read / L2_BYTES if cut else 0,
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
        weights * p.dtype.itemsize / L2_BYTES,
    )
    return max(throughputs) / chip.sms


def flops_a_cycle(kind: str, sm: Timings) -> float:
    """Returns the throughput of an SM: of ``mma``, or in ieee fp32 (and fp64) of FMA."""
    if kind in ("ieee", "fp64"):
        return 4 * 32 * 2 * sm.fma_pipes / sm.fma
    return 4 * 4096 / sm.hmma / {"16-bit": 1, "tf32": 2, "tf32x3": 6}[kind]
