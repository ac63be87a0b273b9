"""What was measured on GPUs, as a table: which of its candidates ``plan`` should prefer.

``measured.csv`` beside this file holds one line for each problem and family of GPUs; the command
``python -m bench gpu`` makes such lines (docs/gpu.md). The rule of precedence: a line of the same
family and exactly the same problem counts; for everything else the model does. A family is an
architecture and a number of SMs, e.g. ``sm_90-132`` for H100 SXM and H200: beside the shared memory
that is all of a chip that a plan looks at.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_type_hints

if TYPE_CHECKING:
    from .chips import Chip
    from .plan import Problem

PATH = Path(__file__).with_name("measured.csv")


class Cut(NamedTuple):
    """What of a plan is chosen: with the problem and the chip it determines all the rest.

    Rows and warps of a program and the width of its first block of H, forward and backward (0
    without one); whether the kernel projects the input; steps in a CUDA graph, 0 for none.
    """

    schedule: str
    forward_rows: int
    forward_units: int
    forward_warps: int
    backward_rows: int
    backward_units: int
    backward_warps: int
    projects: bool
    graph_steps: int


class Measured(NamedTuple):
    """A measurement of one call: microseconds divided by T, projection and launch included.

    ``model_us`` is of the model's choice, ``torch_us`` of torch.nn, in the same process.
    """

    T: int
    us: float
    model_us: float
    torch_us: float
    gpu: str
    date: str

    @property
    def where(self) -> str:
        return f"measured at T = {self.T} on {self.gpu}, {self.date}"

    def __str__(self) -> str:
        return f"{self.us:.2f} us a step (torch.nn {self.torch_us:.2f}), {self.where}"


class Shape(NamedTuple):
    """A problem as far as the table knows it: one dense layer. Precision is of fp32 alone."""

    family: str
    cell: str
    I: int
    H: int
    B: int
    directions: int
    dtype: str
    precision: str
    needs_grad: bool


Table = dict[Shape, tuple[Cut, Measured]]
COLUMNS = (*Shape._fields, *Cut._fields, *Measured._fields)


def shape_of(problem: Problem, chip: Chip) -> Shape | None:
    """The problem's line in the table, or None for a kind that the table does not hold."""
    alone = problem.layers == problem.members == 1 and not problem.layer_by_layer
    if not alone or problem.ragged or problem.proj_size:
        return None
    dtype = str(problem.dtype).removeprefix("torch.")
    return Shape(
        f"{chip.arch}-{chip.sms}",
        problem.cell,
        problem.input_size,
        problem.hidden_size,
        problem.batch,
        problem.directions,
        dtype,
        problem.precision if dtype == "float32" else "",
        problem.needs_grad,
    )


def measured_cut(problem: Problem, chip: Chip) -> tuple[Cut, Measured] | None:
    """What was found the fastest for exactly this problem on this family, or None."""
    shape = shape_of(problem, chip)
    return None if shape is None else table().get(shape)


@lru_cache
def table() -> Table:
    """What is installed, read once."""
    return read(PATH)


def read(path: Path) -> Table:
    """A table from a file; of two lines for one problem the later counts.

    Raises:
        ValueError: the file is no such table; the message names the line.
    """
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if tuple(next(lines, ())) != COLUMNS:
            raise ValueError(f"{path}: the first line must be {','.join(COLUMNS)}")
        found: Table = {}
        for number, line in enumerate(lines, 2):
            try:
                if len(line) != len(COLUMNS):
                    raise ValueError(f"{len(line)} cells, not {len(COLUMNS)}")
                cells = iter(line)
                shape, cut, source = (_made(kind, cells) for kind in (Shape, Cut, Measured))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is no measurement: {error}") from error
            found[shape] = (cut, source)
    return found


def cells_of(shape: Shape, cut: Cut, measured: Measured) -> list[str]:
    """A line of the table."""
    return [
        f"{value:.4g}"
        if isinstance(value, float)
        else str(int(value) if value in (0, 1) else value)
        for value in (*shape, *cut, *measured)
    ]


def _made(kind, cells):
    types = get_type_hints(kind)
    return kind(*(_value(types[name], next(cells)) for name in kind._fields))


def _value(kind: type, text: str) -> object:
    return bool(int(text)) if kind is bool else kind(text)
