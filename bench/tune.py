"""``python -m bench tune``: tries the candidates of ``kernels/plan.py`` on the present machine.

Each candidate passes the gate before it is timed, in turns with the others and with torch.nn. What
is printed are entries of ``MEASURED`` in ``kernels/plan.py``, ready to be copied there.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import torch

from fusedrnn import dispatch
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import Chip, Measured, Plan, Problem, chip_of

from . import DEFAULT_FOLDER, UserError
from .cases import Workload, named
from .gate import Gate
from .gpu import append
from .measure import BenchmarkCase, Settings, interleaved
from .providers import TORCH

HELP = "which plan is the fastest here, as entries for kernels/plan.py"
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
    device = torch.device("cuda" if options.device == "auto" else options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("tune needs a CUDA device, and torch finds none")
    table = Path(options.out or DEFAULT_FOLDER) / "tune.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    end, bad = time.monotonic() + 60 * options.minutes, 0
    flat = [w for w in named(options.cases) if w.layers == 1 and not w.ragged]
    for workload, cell in ((w, cell) for w in flat for cell in w.cells):
        case = BenchmarkCase(workload, cell, Settings(device, options.seed))
        for training in (True, False):
            rows, entry = tune(case, training)
            for row in rows:
                append(table, COLUMNS, (workload.name, cell, *row))
            bad += sum(row[2] in ("red", "failed") for row in rows)
            print(entry or f"# {workload.name} {cell}: no candidate passed", flush=True)
        if time.monotonic() > end:
            break
    return 1 if bad else 0


def tune(case: BenchmarkCase, training: bool) -> tuple[list[tuple], str]:
    """Gates and times the candidates of one problem.

    Args:
        case: one layer, in one or two directions.
        training: whether backward is run too.

    Returns:
        The rows for tune.csv, and the fastest candidate as an entry of ``MEASURED``; "" if none
        passed.
    """
    workload, device = case.workload, case.settings.device
    pass_name = "training" if training else "forward"
    gate = Gate(workload, case.cell, case.weights, case.gate_input())
    problem, chip = problem_of(workload, case.cell, training), chip_of(device)
    calls = {name: case.call(name, pass_name) for name in (TORCH, TRITON)}
    rows, passed = [], {}
    for plan in islice(planning.candidates(problem, chip), MOST):
        verdict, note = _judge(gate, plan, problem, chip)
        ms = dict.fromkeys(calls, math.nan)
        if verdict == "ok":
            # The plan is forced around all calls, not in each, so that calls cost what they do.
            with planning.forced(lambda problem, chip, plan=plan: (plan,)):
                times = interleaved(calls, device, seconds=case.settings.seconds)
            ms = {name: found.p50 for name, found in times.items()}
            passed[plan] = ms
        rows.append((pass_name, plan.describe(), verdict, ms[TRITON], ms[TORCH], note))
    if not passed:
        return rows, ""

    def relative(plan: Plan) -> float:
        return passed[plan][TRITON] / passed[plan][TORCH]

    best, usual = min(passed, key=relative), planning.plan(problem, chip)
    if usual in passed and relative(usual) < LEAD * relative(best):
        best = usual
    where = f"{chip.name}, {datetime.now(timezone.utc):%Y-%m-%d}"
    us = (round(1000 * passed[best][name] / workload.T, 3) for name in (TRITON, TORCH))
    measured = Measured(best.schedule, best.forward, best.backward, *us, where)
    return rows, f"    {(chip.arch, chip.sms, problem)!r}: {measured!r},"


def problem_of(workload: Workload, cell: str, needs_grad: bool) -> Problem:
    """Returns the problem that the planner gets for one layer of a case."""
    name = "rnn_tanh" if cell == "rnn" else cell
    dtype, D = getattr(torch, workload.dtype), 2 if workload.bidirectional else 1
    return Problem(name, workload.H, workload.B, D, dtype, dispatch.precision(), needs_grad)


def _judge(gate: Gate, plan: Plan, problem: Problem, chip: Chip) -> tuple[str, str]:
    """Returns the gate's verdict on a plan and a note. The gate runs backward as well."""
    try:
        if plan.backward is None:
            schedule = planning.SCHEDULES[plan.schedule]
            trained = schedule(problem._replace(needs_grad=True), chip)
            plan = replace(plan, backward=trained.backward)
        with planning.forced(lambda problem, chip: (plan,)):
            verdict = gate.judge(TRITON)
    except (RuntimeError, ValueError, planning.NoPlan) as error:
        return "failed", f"{type(error).__name__}: {error}"[:200]
    return ("ok" if verdict.ok else "red"), f"{verdict.share:.2f} of the error budget"
