"""Prints README's table of precision; `make precision`. Some minutes under the interpreter.

For each cell the largest error of the kernels (schedule resident, fp32) over the odd cases of
``fusedrnn/testing.py``, every output and gradient: as a part of what the budget allows, and as the
relative RMS, beside torch's own.
"""

from __future__ import annotations

import copy
import sys

import conftest  # noqa: F401, chooses the interpreter before triton is imported
import torch
from models import CELLS, Op, double, make_inputs, torch_module

from fusedrnn.testing import CASES, error_budget, run_module

NAMES = ("LSTM", "GRU", "GRU, reset before", "RNN tanh", "RNN relu")


def worst(cell: str) -> tuple[float, float, float]:
    """Of the kernels the share of the budget and the relative RMS; of torch the relative RMS."""
    share = rms = torch_rms = 0.0
    for case in CASES:
        if case.H > 64:  # beyond, fp32 is not resident
            continue
        module = torch_module(cell, case.I, case.H)
        inputs = make_inputs(cell, case)
        ref, got = run_module(module, *inputs), run_module(Op(module, cell, "triton"), *inputs)
        truth = run_module(copy.deepcopy(module).double(), *map(double, inputs))
        for name in truth:
            budget = error_budget(name, got[name], ref[name], truth[name])
            share = max(share, budget.max_err / budget.allowed if budget.allowed else 0.0)
            rms = max(rms, budget.rms)
            torch_rms = max(torch_rms, error_budget(name, ref[name], ref[name], truth[name]).rms)
    return share, rms, torch_rms


def main() -> None:
    torch.manual_seed(0)
    columns = [worst(cell) for cell in CELLS]
    rows = {
        "kernels: worst share of the budget": [f"{share:.2f}" for share, _, _ in columns],
        "kernels: worst relative RMS": [f"{rms:.1e}" for _, rms, _ in columns],
        "torch.nn: worst relative RMS": [f"{rms:.1e}" for _, _, rms in columns],
    }
    lines = [f"| fp32 | {' | '.join(NAMES)} |", "|---" * (1 + len(NAMES)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    sys.stdout.write("\n".join(lines).replace("e-0", "e-") + "\n")


if __name__ == "__main__":
    main()
