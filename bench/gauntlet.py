"""What ``python -m bench gpu`` measures: which cases, in which order, and who takes part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import acceptance
from .cases import (
    CELLS,
    EVERY_CELL,
    KINDS,
    LESSONS,
    SWEEP_B,
    SWEEP_T,
    Workload,
    cut_down,
    every_sweep,
)  # fmt: skip
from .providers import TORCH, contenders
from .readme import BATCH, SIZES

#: Who takes part in every case of the sweep: the yardstick, what a user gets, and the kernels by
#: name, whose times stand beside the floor.
CORE = (TORCH, "fusedrnn", "fusedrnn triton")
#: Who is compiled for seconds to minutes before it can be timed: behind all lessons.
COMPILED = ("fusedrnn compiled", "compiled step", "compiled loop")
#: Who has nothing to say in the sweep: torch's operator again, our loop for the CPU, and those.
NOT_IN_SWEEP = ("fusedrnn aten", "fusedrnn torch", *COMPILED)
#: Everybody takes part at README's sizes in fp32, which every peer computes, up to so many steps.
EVERYBODY_T = 1024
#: Axes of the ranking, the usual value first.
_DTYPES = ("bfloat16", "float32", "float16")
_H = (256, 1024, 64, 512, 128, 192, 384, 768, 2048, 32, 16)
#: Of so many cases one is not of the grid of ``acceptance.py``, until that is done.
_EVERY = 4

Point = tuple[Workload, str]


class Case(NamedTuple):
    """One workload and cell, or ``bench ragged``.

    Attributes:
        name, workload, cell: without a workload it is ragged.
        everybody: whether all take part who are there, or ``CORE`` alone.
        late: whether it is only about ``COMPILED``; torch.nn's own row was written before.
    """

    name: str
    workload: Workload | None
    cell: str
    everybody: bool = False
    late: bool = False

    def providers(self, device: torch.device) -> tuple[str, ...]:
        """Who takes part, torch.nn first."""
        able = contenders(device)
        if self.late:
            return (TORCH, *(name for name in able if name in COMPILED))
        if self.workload is not None and self.workload.lesson != "sweep":
            return tuple(name for name in able if name not in COMPILED)
        others = [name for name in able if name not in (*CORE, *NOT_IN_SWEEP)]
        return (*CORE, *others) if self.everybody else CORE


def cases_of(stage: str, quick: bool = False) -> list[Case]:
    """What a stage measures, in order."""
    if stage == "lessons":
        made = [_case(workload, cell, quick) for workload in LESSONS for cell in CELLS]
        late = [case._replace(name=f"{case.name}, compiled", late=True) for case in made]
        return [*made, Case("ragged", None, ""), *late]
    points = informative_first()
    if stage == "autotable":
        points = [point for point in points if tunable(*point)]
    return [_case(*point, quick) for point in points]


def _case(workload: Workload, cell: str, quick: bool) -> Case:
    usual = workload.B == BATCH and workload.H in SIZES and workload.dtype == "float32"
    everybody = workload.lesson != "sweep" or (usual and workload.T <= EVERYBODY_T)
    small = cut_down(workload) if quick else workload
    return Case(f"{workload.name} {cell}", small, cell, everybody)


def kind_of(workload: Workload) -> str:
    """The one of ``KINDS`` that a point of the sweep is."""
    plain = {"ragged": False, "bidirectional": False, "layers": 1}
    is_of = {name: plain | options for name, options in KINDS.items()}
    found = {option: getattr(workload, option) for option in plain}
    return next(name for name, options in is_of.items() if options == found)


def tunable(workload: Workload, cell: str) -> bool:
    """Whether the plan's table has lines of this kind: one dense layer; no kernel knows T."""
    return kind_of(workload) == "padded" and workload.T == acceptance.T and cell in CELLS


def informative_first() -> list[Point]:
    """The whole sweep by every cell, so that wherever it is cut off every axis has been walked.

    Of four cases three are of the grid that ``acceptance.py`` judges (with README's sizes), ranked
    by the sum of their places along the axes: first the usual case of all, then its neighbour along
    every axis, then theirs. The fourth is of the rest, where T, layouts, layers, directions and the
    RNN are: first what differs from the usual case along one axis, then along two, and so on.
    """
    points = [(workload, cell) for workload in every_sweep() for cell in EVERY_CELL]
    grid = sorted(filter(lambda p: in_grid(*p), points), key=lambda p: sum(_places(*p)))
    rest = sorted(filter(lambda p: not in_grid(*p), points), key=_far)
    return list(_merged(grid, rest))


def in_grid(workload: Workload, cell: str) -> bool:
    """Whether a point is judged by ``acceptance.py``, or stands in README's table."""
    shown = workload.B == BATCH and workload.H in SIZES
    judged = workload.H in acceptance.SIZES and workload.B in acceptance.BATCHES
    return tunable(workload, cell) and (shown or judged)


def _merged(grid: list[Point], rest: list[Point]) -> Iterator[Point]:
    step = _EVERY - 1
    for turn, begin in enumerate(range(0, len(grid), step)):
        yield from grid[begin : begin + step]
        yield from rest[turn : turn + 1]
    yield from rest[-(-len(grid) // step) :]


def _places(workload: Workload, cell: str) -> tuple[int, ...]:
    """Of T, kind, cell, H, B and dtype: how far from the usual value."""
    return (
        SWEEP_T.index(workload.T),
        list(KINDS).index(kind_of(workload)),
        EVERY_CELL.index(cell),
        _H.index(workload.H),
        SWEEP_B.index(workload.B),
        _DTYPES.index(workload.dtype),
    )


def _far(point: Point) -> tuple[int, ...]:
    """Along how many axes, how far, and along which axis first: T before all."""
    places = _places(*point)
    return sum(map(bool, places)), sum(places), *(-place for place in places)
