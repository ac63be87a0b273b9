"""The last stage of ``python -m bench gpu``: which plan is the fastest, for the table of ``plan``.

For each shape of the sweep the candidates of ``kernels/plan.py`` are proved by the gate and timed
in turns, beside torch.nn. ``python -m bench.autotable FOLDER`` takes the winners of a results
folder over into ``kernels/measured.csv``; docs/gpu.md says how to look at them first.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from fusedrnn.dispatch import precision
from fusedrnn.kernels import measured
from fusedrnn.kernels.measured import COLUMNS, Cut, Measured, Shape, cells_of, shape_of
from fusedrnn.kernels.plan import Plan, Problem, candidates, chip_of, modelled

from .cases import Workload
from .disk import Table, whole_rows
from .forcing import forced
from .gate import Gate
from .providers import TORCH
from .run import Settings, Subject
from .timing import Call, interleaved

TRITON = "fusedrnn triton"
#: Candidates of one problem. Each costs some seconds of compiling, most of them far behind.
MOST = 8
#: A lead over the model's choice that is less than this is noise.
LEAD = 0.02
TRIED = (*Shape._fields, *Cut._fields, "T", "outcome", "ms", "floor_us", "note")
#: The mode that is timed, by whether gradients are needed.
MODES = {True: "fwbw", False: "fw"}


class Tried(NamedTuple):
    """One candidate. ``ms`` is None where it was not timed; the note says why."""

    plan: Plan
    outcome: str
    ms: float | None = None
    note: str = ""


def problem_of(workload: Workload, cell: str, needs_grad: bool) -> Problem:
    """The recurrence of a point of the sweep."""
    dtype = getattr(torch, workload.dtype)
    return Problem(
        cell, workload.I, workload.H, workload.B, 1, dtype, precision(), needs_grad
    )  # fmt: skip


def shortlist(plans: Iterable[Plan], left_out: frozenset[str] = frozenset()) -> list[Plan]:
    """The first of every schedule in turns: the best by the model of each come first."""
    by_schedule: dict[str, list[Plan]] = {}
    for plan in plans:
        if plan.schedule not in left_out:
            by_schedule.setdefault(plan.schedule, []).append(plan)
    taken = chain.from_iterable(zip_longest(*by_schedule.values()))
    return [plan for plan in taken if plan is not None][:MOST]


def tune(
    workload: Workload,
    cell: str,
    settings: Settings,
    left_out: frozenset[str] = frozenset(),
    tell: Callable[[Problem, Tried], object] = lambda problem, tried: None,
) -> Iterator[tuple[Shape, Cut, Measured]]:
    """Gates and times the candidates of one point, with gradients and without.

    Args:
        workload, cell: a point of the sweep.
        settings: device, seed and time for one comparison.
        left_out: schedules that failed their tests.
        tell: called with each candidate as soon as it is known.

    Yields:
        A line for the table, where a candidate passed.
    """
    subject = Subject(workload, cell, settings)
    gate = Gate(workload, cell, subject.weights, subject.gate_input())
    chip = chip_of(settings.device)
    for needs_grad, mode in MODES.items():
        problem = problem_of(workload, cell, needs_grad)
        judged = [
            _judged(plan, gate, with_backward)
            for plan, with_backward in _pairs(problem, chip, left_out)
        ]
        able = {tried.plan.cut: tried.plan for tried in judged if tried.outcome == "ok"}
        times = _timed(able, subject, mode)
        for tried in judged:
            tell(problem, tried._replace(ms=times.get(tried.plan.cut)))
        line = _winner(problem, chip, workload.T, times)
        if line is not None:
            yield line


def _pairs(problem: Problem, chip, left_out: frozenset[str]) -> Iterator[tuple[Plan, Plan]]:
    """Candidates, each with a plan of the same forward that the gate can send backward."""
    training = problem._replace(needs_grad=True)
    for plan in shortlist(candidates(problem, chip), left_out):
        if plan.backward is None:
            for other in candidates(training, chip):
                if other.schedule == plan.schedule and other.forward == plan.forward:
                    yield plan, other
                    break
        else:
            yield plan, plan


def _judged(plan: Plan, gate: Gate, with_backward: Plan) -> Tried:
    try:
        with forced(with_backward):
            verdict = gate.judge(TRITON)
    except Exception as error:  # one broken candidate must not cost the others their turn
        return Tried(plan, "failed", note=f"{type(error).__name__}: {error}"[:200])
    if not verdict.ok:
        return Tried(plan, "red", note=verdict.failures[0])
    return Tried(plan, "ok", note=f"{verdict.share:.2f} of the error budget")


def _timed(able: dict[Cut, Plan], subject: Subject, mode: str) -> dict[Cut | None, float]:
    """Milliseconds by cut, and under None torch.nn's; nothing where nobody passed."""
    if not able:
        return {}
    settings, names = subject.settings, {TORCH: subject.call(TORCH, mode)}
    for cut, plan in able.items():
        names[repr(cut)] = _by(plan, subject.call(TRITON, mode))
    times = interleaved(
        names, settings.device, seconds=settings.seconds, least=settings.least_rounds
    )
    return {None: times[TORCH].p50} | {cut: times[repr(cut)].p50 for cut in able}


def _by(plan: Plan, call: Call) -> Call:
    def forced_call() -> object:
        with forced(plan):
            return call()

    return forced_call


def _winner(
    problem: Problem, chip, T: int, times: dict[Cut | None, float]
) -> tuple[Shape, Cut, Measured] | None:
    """The fastest, but the model's choice unless it is clearly slower."""
    ours = {cut: ms for cut, ms in times.items() if cut is not None}
    shape = shape_of(problem, chip)
    if not ours or shape is None:
        return None
    usual = modelled(problem, chip).cut
    model_ms = ours.get(usual, math.inf)
    best = min(ours, key=ours.__getitem__)
    if model_ms * (1 - LEAD) <= ours[best]:
        best = usual
    us = 1000 / T
    return shape, best, Measured(
        T, us * ours[best], us * model_ms, us * times[None], chip.name, _today()
    )  # fmt: skip


def _today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


class Files:
    """autotable.csv, every candidate; measured.csv, the winners as ``plan`` reads them."""

    def __init__(self, folder: Path):
        self.tried = Table(folder / "autotable.csv", TRIED)
        self.winners = Table(folder / "measured.csv", COLUMNS)

    def add_tried(self, shape: Shape, T: int, tried: Tried) -> None:
        ms = "" if tried.ms is None else f"{tried.ms:.4g}"
        rest = (T, tried.outcome, ms, f"{tried.plan.step:.3g}", tried.note)
        self.tried.add((*shape, *tried.plan.cut, *rest))

    def add_winner(self, line: tuple[Shape, Cut, Measured]) -> None:
        self.winners.add(cells_of(*line))


def install(folder: Path, target: Path = measured.PATH) -> int:
    """Takes a folder's winners over into the table; its lines for the same problems are replaced.

    Returns:
        How many lines were taken.

    Raises:
        ValueError: a line is no measurement; nothing is written.
    """
    rows = whole_rows(folder / "measured.csv")
    whole = folder / "measured.whole.csv"
    _write(whole, [[row[name] for name in COLUMNS] for row in rows])
    taken = measured.read(whole)
    whole.unlink()
    merged = measured.read(target) | taken
    _write(target, [cells_of(shape, *found) for shape, found in sorted(merged.items())])
    return len(taken)


def _write(path: Path, lines: list[list[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines])


def main() -> int:
    """``python -m bench.autotable FOLDER``; 2 where there is nothing to take."""
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else "")
    if len(sys.argv) != 2 or not (folder / "measured.csv").exists():
        print("usage: python -m bench.autotable FOLDER, with a measured.csv in it", file=sys.stderr)
        return 2
    try:
        count = install(folder)
    except ValueError as error:
        print(f"python -m bench.autotable: {error}", file=sys.stderr)
        return 2
    print(f"{count} measurements are now in {measured.PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
