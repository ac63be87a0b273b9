"""``python -m bench tune``: tries the candidates of ``kernels/plan.py`` on the present machine.

Each candidate passes the gate before it is timed, in turns with the others and with torch.nn. What
is printed are entries of ``MEASURED`` in ``kernels/plan.py``, ready to be copied there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import islice

import torch

from fusedrnn import dispatch
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import Chip, Measured, Plan, Problem, chip_of

from . import DEFAULT_FOLDER, UserError
from .cases import named
from .gate import Gate
from .gpu import append
from .measure import PASSES, BenchmarkCase, Settings, Times, interleaved
from .providers import TORCH

OPTIONS = ("out", "device", "seed")
#: Candidates of a problem; each takes seconds to compile, and the model's best come first.
MOST = 8
#: The model's choice is kept unless another candidate is faster by this factor.
LEAD = 1.02
COLUMNS = ("case", "cell", "pass", "plan", "gate", "ms", "torch_ms", "note")
TRITON = "fusedrnn triton"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--cases", default="sweep", metavar="NAMES", help="one layer without packing; default sweep"
    )
    add("--minutes", type=float, default=5.0, help="default 5")


def run(options: argparse.Namespace) -> int:
    """Tunes case by case until the time is over; returns 1 if a candidate was wrong or broke."""
    device = torch.device(options.device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("tune needs a CUDA device, and torch finds none")
    table = (options.out or DEFAULT_FOLDER) / "tune.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    end, bad = time.monotonic() + 60 * options.minutes, 0
    flat = [w for w in named(options.cases) if w.layers == 1 and not w.ragged]
    for workload, cell in ((w, cell) for w in flat for cell in w.cells):
        settings = Settings(device, options.seed, seconds=0.3)
        case = BenchmarkCase.of(workload, cell, settings)
        for mode in PASSES:
            rows, entry = tune(case, mode, settings)
            for row in rows:
                append(table, COLUMNS, (workload.name, cell, mode, *row))
            bad += sum(row[1] in ("red", "failed") for row in rows)
            print(entry or f"# {workload.name} {cell}: no candidate passed", flush=True)
        if time.monotonic() > end:
            break
    return 1 if bad else 0


def tune(case: BenchmarkCase, mode: str, settings: Settings) -> tuple[list[tuple], str]:
    """Gates and times the candidates of one problem.

    Args:
        case: one layer, in one or two directions.
        mode: ``"forward"`` or ``"training"``.
        settings: the device, and the seconds for each candidate.

    Returns:
        The rows for tune.csv, and the fastest candidate as an entry of ``MEASURED``; "" if none
        passed.
    """
    problem, chip = problem_of(case, mode == "training"), chip_of(settings.device)
    gate, precision = Gate(case), problem.precision if case.x.dtype == torch.float32 else ""
    calls = {name: case.call(name, mode) for name in (TORCH, TRITON)}
    rows, passed = [], {}
    for plan in islice(planning.candidates(problem, chip), MOST):
        times: dict[str, Times] = {}
        # The plan is forced around all calls, not in each, so that calls cost what they do.
        with planning.forced(_always(plan)):
            try:
                verdict = gate.judge(TRITON, precision, backward=mode == "training")
            except (RuntimeError, ValueError) as error:
                outcome, note = "failed", f"{type(error).__name__}: {error}"[:200]
            else:
                outcome = "ok" if verdict.ok else "red"
                note = f"{verdict.share:.2f} of the error budget"
                if verdict.ok:
                    times = interleaved(calls, settings.device, seconds=settings.seconds)
                    passed[plan] = times
        ms = [times[name].p50 if times else "" for name in (TRITON, TORCH)]
        rows.append((plan.describe(), outcome, *ms, note))
    if not passed:
        return rows, ""
    best = max(passed, key=lambda plan: passed[plan][TRITON].x)
    usual = planning.plan(problem, chip)
    if usual in passed and passed[usual][TRITON].x * LEAD > passed[best][TRITON].x:
        best = usual
    where = f"{chip.name}, {datetime.now(timezone.utc):%Y-%m-%d}"
    us = [round(1000 * passed[best][name].p50 / case.workload.T, 3) for name in (TRITON, TORCH)]
    measured = Measured(best.schedule, best.forward, best.backward, us[0], us[1], where)
    return rows, f"    {(chip.arch, chip.sms, problem)!r}: {measured!r},"


def problem_of(case: BenchmarkCase, needs_grad: bool) -> Problem:
    """Returns the problem that the planner gets for one layer of a case."""
    cell = "rnn_tanh" if case.cell == "rnn" else case.cell
    D = 2 if case.workload.bidirectional else 1
    sizes = case.workload.H, case.workload.B, D
    return Problem(cell, *sizes, case.x.dtype, dispatch.precision(), needs_grad)


def _always(plan: Plan) -> Callable[[Problem, Chip], tuple[Plan, ...]]:
    return lambda problem, chip: (plan,)
