"""Compares the predicted time of a call on a GPU with the time that cuDNN is published to need.

``predicted.csv`` has cycles of a step of compiled kernels (``predict.py`` makes it),
``published.csv`` microseconds of a step of cuDNN with their sources. Nothing was measured here.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .latencies import TIMINGS
from .problem import Chip, Plan, Problem

PREDICTED = Path(__file__).with_name("predicted.csv")
PUBLISHED = Path(__file__).with_name("published.csv")
#: Ours is chosen up to this share of cuDNN's time: a prediction is good to 20 %.
MARGIN = 0.8
#: The chip of the table whose cycles stand for those of an architecture; others as sm_90.
FAMILIES = {"sm_80": "sm_80"} | dict.fromkeys(
    ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), "sm_86"
)
RAGGED = 1.15  # times a dense step
HOST_US = (60.0, 80.0)  # of the Python around a call, forward and backward
LAUNCH_US = 5.0  # of a kernel, with the load of W_hh
MEMORY = 1.5e6  # bytes a microsecond, an A100's


class Key(NamedTuple):
    """The first columns of a line of ``predicted.csv``."""

    chip: str
    cell: str
    products: str  # "16-bit" or "tf32"
    H: int
    layers: int  # of one launch


class Side(NamedTuple):
    """Forward or backward of one line; instructions, barriers and cycles are of one step."""

    rows: int
    units: int
    warps: int
    instructions: int
    barriers: float
    cycles: int
    spills: int  # bytes of a thread


class Step(NamedTuple):
    """A line of ``predicted.csv``."""

    key: Key
    schedule: str
    forward: Side
    backward: Side

    @staticmethod
    def heads() -> list[str]:
        sides = [f"{side}_{name}" for side in ("fw", "bw") for name in Side._fields]
        return [*Key._fields, "schedule", *sides]

    def cells(self) -> list[str]:
        """Returns the line as text, in the order of :meth:`heads`."""
        values = [*self.key, self.schedule, *self.forward, *self.backward]
        return [f"{value:g}" if isinstance(value, float) else str(value) for value in values]


class Figure(NamedTuple):
    """A line of ``published.csv``: microseconds of a step of one layer."""

    cell: str
    precision: str  # "fp16", "fp32" (with tf32 products) or "any"
    algorithm: str  # cuDNN's: PERSIST_STATIC_SMALL_H, PERSIST_STATIC or STANDARD
    H: int  # the figure holds from here up to the next line's
    forward: float
    backward: float
    source: str


class Verdict(NamedTuple):
    """The expected times of a call, forward and, with gradients, backward."""

    ours: float | None  # microseconds
    theirs: float | None  # of torch's operator
    sources: tuple[str, str]  # of both figures, or why there is none

    @property
    def favours_ours(self) -> bool:
        return self.ours is not None and (self.theirs or 0.0) * MARGIN >= self.ours

    def __str__(self) -> str:
        times = (f"{us / 1000:.3g} ms" if us else "no figure" for us in (self.ours, self.theirs))
        ours, theirs = (f"{us}, {source}" for us, source in zip(times, self.sources, strict=True))
        return f"the kernels {ours}; torch's operator {theirs}"


@lru_cache
def read_steps() -> dict[Key, Step]:
    """Returns the shipped table of predicted steps."""
    steps = {}
    for chip, cell, products, H, layers, schedule, *numbers in _lines(PREDICTED):
        key = Key(chip, cell, products, int(H), int(layers))
        values = [float(n) if i % 7 == 4 else int(n) for i, n in enumerate(numbers)]
        steps[key] = Step(key, schedule, Side(*values[:7]), Side(*values[7:]))  # type: ignore
    return steps


@lru_cache
def read_figures() -> tuple[Figure, ...]:
    """Returns the shipped table of published steps of cuDNN."""
    return tuple(
        Figure(cell, precision, algorithm, int(H), float(forward), float(backward), source)
        for cell, precision, algorithm, H, forward, backward, source in _lines(PUBLISHED)
    )


def _lines(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def judge(problem: Problem, plans: tuple[Plan, ...], chip: Chip, T: int, I: int) -> Verdict:
    """Returns the expected times of a call with ``T`` steps of ``I`` features.

    Args:
        problem: the whole stack of layers.
        plans: its launches, as ``plan_stack`` returns them.
        chip: the GPU.
        T: steps.
        I: features of the input.
    """
    products = _products_us(problem, chip, T, I)
    figure = figure_of(problem, I)
    if figure is None:
        theirs, source = None, f"published nowhere in {problem.kind(chip)} for this cell"
    else:
        # The persistent kernels run directions side by side, as far as is known.
        times = problem.layers * (problem.directions if figure.algorithm == "standard" else 1)
        step = figure.forward + figure.backward * problem.needs_grad
        theirs, source = T * times * step + products, figure.source
    total, said = sum(HOST_US[: 1 + problem.needs_grad]) + products, set()
    for plan in plans:
        step_of = find_step(problem, plan, chip)
        if step_of is None:
            why = f"not predicted for schedule {plan.schedule} on {chip.name}"
            return Verdict(None, theirs, (why, source))
        total += _launch_us(problem, plan, chip, step_of, T)
        said.add(f"{step_of.key.chip}'s cycles at {_mhz(chip, step_of):.0f} MHz")
    return Verdict(total, theirs, (f"predicted: {', '.join(sorted(said))}", source))


def find_step(problem: Problem, plan: Plan, chip: Chip) -> Step | None:
    """Returns the line of the next larger H of the same schedule, None if there is none."""
    if chip.warp_size != 32:
        return None
    family = FAMILIES.get(chip.arch, "sm_90")
    cell = "rnn_tanh" if problem.cell == "rnn_relu" else problem.cell
    wanted = (family, cell, problem.kind(chip), plan.schedule)
    fitting = [
        step
        for key, step in read_steps().items()
        if (*key[:3], step.schedule) == wanted
        and key.H >= problem.hidden_size
        and key.layers <= plan.layers
    ]
    return min(fitting, key=lambda step: (step.key.H, -step.key.layers), default=None)


def _launch_us(problem: Problem, plan: Plan, chip: Chip, step: Step, T: int) -> float:
    """Forward and backward of one plan, all its programs one wave after the other."""
    total, mhz = 0.0, _mhz(chip, step)
    for forward, tiles in ((True, plan.forward), (False, plan.backward)):
        if tiles is None:
            continue
        compiled = step.forward if forward else step.backward
        larger = max(1.0, tiles.block_b / compiled.rows) * max(1.0, tiles.block_h / compiled.units)
        if plan.layers > step.key.layers == 1:
            larger *= 2  # a wavefront's upper layers multiply by W_ih, too
        groups = -(-problem.batch // tiles.block_b)
        if plan.schedule == "cooperative":
            waves = -(-groups // tiles.at_once)
        else:
            waves = -(-groups * problem.directions // chip.sms)
        us = compiled.cycles / mhz * larger * (RAGGED if problem.ragged else 1.0)
        total += waves * ((T + plan.layers - 1) * us + LAUNCH_US)
    return total


def figure_of(problem: Problem, I: int) -> Figure | None:
    """Returns the published step of cuDNN, by the algorithm that torch takes (``RNN.cpp``)."""
    p, H = problem, problem.hidden_size
    cell = "rnn" if p.cell.startswith("rnn") else p.cell
    precision = {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}.get(p.dtype)
    if precision is None or (precision == "fp32" and p.precision != "tf32"):
        return None
    static = (
        (cell, precision, p.layers, p.directions) == ("lstm", "fp16", 1, 1)
        and H % 128 == I % 128 == p.batch % 8 == 0
        and p.batch <= 128
        and 192 < H <= 1024
    )
    # In bf16 a step at H = 64 is published at 12 us (0z5a/flashrnn): no persistent kernel.
    small = not p.ragged and precision != "bf16" and (384 if cell == "rnn" else 192) >= H
    algorithm = "small" if small else "static" if static and not p.ragged else "standard"
    found = [
        figure
        for figure in read_figures()
        if (figure.cell, figure.algorithm) == (cell, algorithm)
        and figure.precision in (precision, "any")
        and figure.H <= H
    ]
    return max(found, key=lambda figure: figure.H, default=None)


def _products_us(p: Problem, chip: Chip, T: int, I: int) -> float:
    """The GEMMs over all steps, which both sides need: by peak throughput and bandwidth."""
    sm, rows, units = TIMINGS.get(chip.arch, TIMINGS["sm_90"]), T * p.batch, p.hidden_size
    width, columns = p.spec.gates * units * p.directions, I + (p.layers - 1) * p.directions * units
    work, moved = 2 * rows * width * columns, rows * (columns + 2 * p.layers * width)
    if p.needs_grad:  # two GEMMs for W_ih, one for W_hh
        work, moved = 3 * work + 2 * rows * width * units * p.layers, 3 * moved
    flops = 4 * 4096 / sm.hmma * chip.sms * (chip.mhz or sm.mhz) / (p.dtype.itemsize / 2)
    return max(work / flops, moved * p.dtype.itemsize / MEMORY)


def _mhz(chip: Chip, step: Step) -> float:
    return chip.mhz or TIMINGS.get(chip.arch, TIMINGS[step.key.chip]).mhz
