"""A lower bound for the time of one step, from the figures of the chip: modelled, not measured.

A step of a recurrence cannot be faster than the slowest of four throughputs: matrix units, shared
memory, special-function units and loads from L2. To that comes what cannot overlap: launches, or
operands through shared memory, activations, and the hop from one program's store to another's load.
"""

from .latencies import Timings
from .problem import Chip, Plan, Problem

ACTIVATIONS = 150  # cycles of one sigmoid after another, then tanh of c
ROUND_TRIP = 100  # cycles from registers through shared memory into the operand of an mma
L2_BYTES = 24  # a cycle and SM: 5.5 TB/s of an H100
LAUNCH_US = 1.3  # from kernel to kernel in a CUDA graph, on an H100


def floor_us(plan: Plan, p: Problem, chip: Chip, direction: str) -> float:
    """Returns the floor of one step of the whole batch in a launch, all its rounds together."""
    tiles, forward = getattr(plan, direction), direction == "forward"
    sm, spec, itemsize = chip.timings, p.spec, p.dtype.itemsize
    phases, rows, units, H = len(spec.phases), tiles.block_b, tiles.block_h, p.hidden_size

    def slowest(products: int, elements: int, shared: int, from_l2: float) -> float:
        return max(
            2 * products / flops_a_cycle(p.kind(chip), sm),
            shared / sm.shared_bytes,
            elements * spec.specials[not forward] * sm.mufu / 128,
            from_l2 / L2_BYTES,
        )

    if plan.schedule == "stepwise":  # all SMs read the weights from L2
        weights, elements = spec.gates * H * H * p.directions, p.batch * H * p.directions
        cycles = slowest(p.batch * weights, elements, 0, weights * itemsize) / chip.sms
        return cycles / sm.mhz + LAUNCH_US * phases * (p.directions + 1)
    # Programs keep their weights; they exchange h or dgates if units are cut.
    cut, portable = plan.schedule == "cooperative", plan.schedule == "resident"
    weights = spec.gates * units * (H if cut else units) * min(plan.layers, 2)
    products = (max(rows, 16) if portable else rows) * weights
    read, hops, rounds = 0.0, 0.0, 1
    if cut:
        rounds = -(-p.batch // rows // tiles.at_once)
        groups = min(-(-p.batch // rows), tiles.at_once) * p.directions * plan.layers
        busy = groups * -(-H // units) / chip.sms  # the share of SMs
        read = busy * rows * H * itemsize * (1 if forward else spec.gates)
        hops = phases * (sm.hop_us + sm.l2 / sm.mhz)
    cycles = slowest(products, rows * units, weights * itemsize if portable else 0, read)
    return rounds * ((cycles + ROUND_TRIP * phases + ACTIVATIONS) / sm.mhz + hops)


def flops_a_cycle(kind: str, sm: Timings) -> float:
    """Returns the throughput of an SM: of ``mma``, or in ieee fp32 (and fp64) of FMA."""
    if kind in ("ieee", "fp64"):
        return 4 * 32 * 2 * sm.fma_pipes / sm.fma
    return 4 * 4096 / sm.hmma / {"16-bit": 1, "tf32": 2, "tf32x3": 6}[kind]
