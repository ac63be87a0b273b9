"""Compares the predicted time of a call on a GPU with the time that cuDNN is published to need.

``predicted.csv`` has cycles of a step of compiled kernels (``predict.py`` makes it),
``published.csv`` microseconds of a step of cuDNN with their sources. ``floor_us`` is a lower bound
of a step, from the figures of the chip. Nothing was measured here.
"""

import csv
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .latencies import TIMINGS, Timings
from .problem import Chip, Plan, Problem

PREDICTED = Path(__file__).with_name("predicted.csv")
PUBLISHED = Path(__file__).with_name("published.csv")
#: Ours is chosen up to this share of cuDNN's time: a prediction is good to 20 %.
MARGIN = 0.8
#: The chip of the table whose cycles stand for those of an architecture; others as sm_90.
FAMILIES = {"sm_80": "sm_80"}
FAMILIES |= dict.fromkeys(("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), "sm_86")
RAGGED = 1.2  # times a dense step, assumed; most in RNNs, whose steps are short
#: From call to launch, of each pass. Assumed: `python -m bench host` measures about as much with a
#: driver that launches nothing; what a real launch adds, some us, was never measured.
HOST_US = (75.0, 90.0)
START_US = 5.0  # of a kernel: its launch and the load of W_hh
MEMORY = 1.5e6  # bytes a microsecond, an A100's
ACTIVATIONS = 150  # cycles of one sigmoid after another, then tanh of c
ROUND_TRIP = 100  # cycles from registers through shared memory into the operand of an mma
L2_BYTES = 24  # a cycle and SM: 5.5 TB/s of an H100
LAUNCH_US = 1.3  # from kernel to kernel in a CUDA graph, on an H100


class Verdict(NamedTuple):
    """The expected microseconds of a call, forward and, with gradients, backward."""

    ours: float | None  # None: not predicted
    theirs: float | None  # of torch's operator; None: published nowhere
    sources: tuple[str, str]

    @property
    def favours_ours(self) -> bool:
        return self.ours is not None and (self.theirs or 0.0) * MARGIN >= self.ours

    def __str__(self) -> str:
        times = (f"{us / 1000:.3g} ms" if us else "no figure" for us in self[:2])
        ours, theirs = (f"{us}, {source}" for us, source in zip(times, self.sources, strict=True))
        return f"the kernels {ours}; torch's operator {theirs}"


@lru_cache
def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a table, with numbers as such."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: float(v) if v.replace(".", "").isdigit() else v for name, v in line.items()}
            for line in csv.DictReader(file)
        ]


def judge(problem: Problem, plans: tuple[Plan, ...], chip: Chip, T: int, I: int) -> Verdict:
    """Returns the expected times of a call of the stack ``problem`` with T steps of I features."""
    both, figure = _products_us(problem, chip, T, I), find_figure(problem, I)
    theirs, source = None, "published nowhere"
    if figure:  # persistent kernels run directions side by side, as far as is known
        times = problem.layers * (problem.directions if figure["algorithm"] == "standard" else 1)
        step = figure["forward"] + figure["backward"] * problem.needs_grad
        theirs, source = both + T * times * step, figure["source"]
    ours = both + sum(HOST_US[: 1 + problem.needs_grad])
    for plan in plans:
        if (line := find_line(problem, plan, chip)) is None:
            unknown = f"not predicted for schedule {plan.schedule} on {chip.name}"
            return Verdict(None, theirs, (unknown, source))
        ours += _launch_us(problem, plan, chip, line, T)
        predicted = f"predicted: {line['chip']}'s cycles at {chip.mhz:.0f} MHz"
    return Verdict(ours, theirs, (predicted, source))


def find_line(p: Problem, plan: Plan, chip: Chip) -> dict[str, Any] | None:
    """Returns the line of the next larger H of the same schedule, None if there is none."""
    family, cell = FAMILIES.get(chip.arch, "sm_90"), p.cell.replace("relu", "tanh")
    wanted = {"chip": family, "cell": cell, "products": p.kind(chip), "schedule": plan.schedule}
    found = (n for n in read(PREDICTED) if wanted.items() <= n.items())
    larger = (n for n in found if p.hidden_size <= n["H"] and n["layers"] <= plan.layers)
    return min(larger, key=lambda line: (line["H"], -line["layers"]), default=None)


def _launch_us(p: Problem, plan: Plan, chip: Chip, line: dict[str, Any], T: int) -> float:
    """Forward and backward of one plan, all its programs one wave after the other."""
    total, sm, together = 0.0, TIMINGS[line["chip"]], plan.schedule == "cooperative"
    hop_us = sm.hop_us * together  # it does not grow with what a program computes
    for side, tiles in (("fw", plan.forward), ("bw", plan.backward)):
        if tiles is None:
            continue
        # A wavefront's upper layers multiply by W_ih, too.
        larger = 2.0 if plan.layers > line["layers"] == 1 else 1.0
        larger *= max(1.0, tiles.block_b / line[f"{side}_rows"])
        larger *= max(1.0, tiles.block_h / line[f"{side}_units"])
        larger *= RAGGED if p.ragged else 1.0
        groups = -(-p.batch // tiles.block_b)
        waves = -(-groups // tiles.at_once) if together else -(-groups * p.directions // chip.sms)
        us = hop_us + (line[f"{side}_cycles"] - hop_us * sm.mhz) / chip.mhz * larger
        total += waves * ((T + plan.layers - 1) * us + START_US)
    return total


def _products_us(p: Problem, chip: Chip, T: int, I: int) -> float:
    """The GEMMs over all steps, which both sides need."""
    rows, units, width = T * p.batch, p.hidden_size, p.spec.gates * p.hidden_size * p.directions
    columns = I + (p.layers - 1) * p.directions * units
    work, moved = 2 * rows * width * columns, rows * (columns + 2 * p.layers * width)
    if p.needs_grad:  # two GEMMs for W_ih, one for W_hh
        work, moved = 3 * work + 2 * rows * width * units * p.layers, 3 * moved
    speed = chip.sms * chip.mhz * flops_a_cycle(p.kind(chip), chip.timings)
    return max(work / speed, moved * p.dtype.itemsize / MEMORY)


def find_figure(p: Problem, I: int) -> dict[str, Any] | None:
    """Returns the published step of cuDNN, by the algorithm that torch takes (``RNN.cpp``).

    Algorithms are PERSIST_STATIC_SMALL_H, PERSIST_STATIC and STANDARD; a figure holds from its H
    up to that of the next line; "fp32" has tf32 products.
    """
    cell, H = "rnn" if p.cell.startswith("rnn") else p.cell, p.hidden_size
    precision = {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}.get(p.dtype)
    if precision is None or (precision == "fp32" and p.precision != "tf32"):
        return None
    algorithm = "standard"
    # In bf16 a step at H = 64 is published at 12 us (0z5a/flashrnn): no persistent kernel.
    if not p.ragged and precision != "bf16":
        alone = (cell, precision, p.layers, p.directions) == ("lstm", "fp16", 1, 1)
        if (384 if cell == "rnn" else 192) >= H:
            algorithm = "small"
        elif alone and H % 128 == I % 128 == p.batch % 8 == 0 and H <= 1024 and p.batch <= 128:
            algorithm = "static"
    found = (n for n in read(PUBLISHED) if (n["cell"], n["algorithm"]) == (cell, algorithm))
    smaller = (n for n in found if n["precision"] in (precision, "any") and n["H"] <= H)
    return max(smaller, key=lambda line: line["H"], default=None)


def floor_us(plan: Plan, p: Problem, chip: Chip, direction: str) -> float:
    """Returns the least time of a step of the whole batch in a launch, all its rounds together.

    The slowest of four throughputs (matrix units, shared memory, special-function units, L2) and
    what cannot overlap: launches, or operands through shared memory, activations, and the hop from
    one program's store to another's load.
    """
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
