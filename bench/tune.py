"""``python -m bench tune``: tries the candidates of ``kernels/plan.py`` on the present machine.

Each candidate passes the gate before it is timed, in turns with the others and with torch.nn. What
is printed are entries of ``MEASURED`` in ``kernels/plan.py``, ready to be copied there.
"""

import argparse
import os
import time
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import torch

from fusedrnn import dispatch
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import Measured, Plan, Problem, chip_of

from . import DEFAULT_FOLDER, UserError
from .cases import named
from .gate import Gate
from .measure import PASSES, BenchmarkCase, Settings, Times, interleaved
from .providers import TORCH
from .report import append
from .run import guarded

#: Candidates of a problem; each takes seconds to compile, and the model's best come first.
MOST = 8
#: The model's choice is kept unless another candidate is faster by this factor.
LEAD = 1.02
COLUMNS = ("case", "cell", "pass", "plan", "gate", "torch.nn ms", "fusedrnn triton ms", "note")
TRITON = "fusedrnn triton"


def run(options: argparse.Namespace) -> int:
    """Tunes case by case until the time is over; returns 1 if a candidate was wrong or broke."""
    device = torch.device(options.device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("tune needs a CUDA device, and torch finds none")
    table = (options.out or DEFAULT_FOLDER) / "tune.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    end, bad = time.monotonic() + 60 * options.minutes, 0
    flat = [w for w in named(options.names or "sweep") if w.layers == 1 and not w.ragged]
    for workload, cell in ((w, cell) for w in flat for cell in w.cells):
        settings = Settings(device, options.seed, seconds=0.3)
        case = BenchmarkCase.of(workload, cell, settings)
        for mode in PASSES:
            rows, entry = tune(case, mode, settings)
            key = {"case": workload.name, "cell": cell, "pass": mode}
            append(table, COLUMNS, [key | row for row in rows])
            bad += sum(row["gate"] in ("red", "failed") for row in rows)
            print(entry or f"# {workload.name} {cell}: no candidate passed", flush=True)
        if time.monotonic() > end:
            break
    return 1 if bad else 0


def tune(case: BenchmarkCase, mode: str, settings: Settings) -> tuple[list[dict[str, Any]], str]:
    """Gates and times the candidates for a case of one layer.

    Returns:
        The rows for tune.csv, and the fastest candidate as an entry of ``MEASURED``; "" if none
        passed.
    """
    cell, D = "rnn_tanh" if case.cell == "rnn" else case.cell, 1 + case.workload.bidirectional
    sizes, precision = (case.workload.H, case.workload.B, D), dispatch.precision()
    problem = Problem(cell, *sizes, case.x.dtype, precision, mode == "training")
    chip = chip_of(settings.device)
    gate, fp32 = Gate(case), precision if case.x.dtype == torch.float32 else ""
    calls = {name: case.call(name, mode) for name in (TORCH, TRITON)}
    rows: list[dict[str, Any]] = []
    passed: dict[Plan, dict[str, Times]] = {}
    for plan in islice(planning.candidates(problem, chip), MOST):
        # The plan is forced around all calls, not in each, so that calls cost what they do.
        with planning.forced(lambda *_, plan=plan: (plan,)):
            row: dict[str, Any] = {"plan": plan.describe()}
            with guarded(row):
                verdict = gate.judge(TRITON, fp32, backward=mode == "training")
                row["gate"] = "ok" if verdict.ok else "red"
                row["note"] = f"{verdict.share:.2f} of the error budget"
                if verdict.ok:
                    times = passed[plan] = interleaved(calls, settings)
                    row |= {f"{name} ms": times[name].ms for name in calls}
            rows.append(row)
    if not passed:
        return rows, ""
    best = max(passed, key=lambda plan: passed[plan][TRITON].x)
    usual = planning.plan(problem, chip)
    if usual in passed and passed[usual][TRITON].x * LEAD > passed[best][TRITON].x:
        best = usual
    where = f"{chip.name}, {datetime.now(timezone.utc):%Y-%m-%d}"
    us = [round(1000 * passed[best][name].ms / case.workload.T, 3) for name in (TRITON, TORCH)]
    measured = Measured(best.schedule, best.forward, best.backward, us[0], us[1], where)
    return rows, f"    {(chip.arch, chip.sms, problem)!r}: {measured!r},"
