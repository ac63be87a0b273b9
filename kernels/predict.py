"""Compiles the kernels that the planner chooses and writes their predicted steps.

``python -m fusedrnn.kernels.predict`` (or ``make predict``) adds the lines that ``predicted.csv``
lacks, or that are of other tiles than the planner's, and prints the tables of
``docs/predicted.md``, which follow from it. It needs no GPU.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby, product
from typing import Any

import torch

from .expected import PREDICTED, judge, read
from .plan import cooperative, plan, plan_stack
from .problem import CHIPS, NoPlan, Plan, Problem

CHIP_NAMES = ("sm_90", "sm_80", "sm_86")  # the families, see expected.FAMILIES
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}
DTYPES = {"16-bit": torch.bfloat16, "tf32": torch.float32}
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
#: Problems of KernelBench, level 3: cell, directions, and milliseconds of torch on three H100.
KERNELBENCH = {
    35: ("lstm", 1, "16.9 to 29.4"), 38: ("lstm", 2, "32.0 to 56.9"),
    39: ("gru", 1, "21.7 to 39.1"), 41: ("gru", 2, "42.6 to 77.5"),
}  # fmt: skip
Key = tuple[str, str, str, int, int]
Line = dict[str, Any]
KEY = ("chip", "cell", "products", "H", "layers")
#: Of each direction; instructions, barriers and cycles are of one step.
SIDE = ("rows", "units", "warps", "instructions", "barriers", "cycles", "spills")
COLUMNS = (*KEY, "schedule", *(f"{side}_{name}" for side in ("fw", "bw") for name in SIDE))


def grid() -> dict[Key, Plan]:
    """Returns the plan of every line; a wavefront is compiled with two layers."""
    found = {}
    for key in product(CHIP_NAMES, CELLS, DTYPES, SIZES, (1, 2)):
        chip, cell, _, H, L = key
        if L == 1 or (H in (256, 512) and cell != "rnn_tanh"):
            with suppress(NoPlan):
                found[key] = (plan if L == 1 else cooperative)(_problem(key), CHIPS[chip])
    return {key: chosen for key, chosen in found.items() if chosen.schedule != "stepwise"}


def _problem(key: Key) -> Problem:
    _, cell, products, H, layers = key
    return Problem(cell, H, 16, 1, DTYPES[products], "tf32", True, layers)


def planned(key: Key, chosen: Plan) -> Line:
    """Returns the columns that the planner decides; a line with others is stale."""
    line: Line = dict(zip(KEY, key, strict=True)) | {"schedule": chosen.schedule}
    for side, t in (("fw", chosen.forward), ("bw", chosen.backward)):
        sizes = (t.block_b, t.block_h, t.num_warps) if t else ()
        line |= {f"{side}_{name}": n for name, n in zip(SIDE, sizes, strict=False)}
    return line


def predict(key: Key, chosen: Plan) -> Line:
    """Compiles forward and backward of a line, and predicts their steps."""
    from .compile import compile_plan  # imports triton

    line, kernels = planned(key, chosen), compile_plan(_problem(key), chosen, CHIPS[key[0]])
    for side, kernel in zip(("fw", "bw"), kernels, strict=True):
        found = kernel.predict(key[0])
        counts = round(found.instructions), found.barriers, round(found.cycles), kernel.spills
        line |= {f"{side}_{name}": n for name, n in zip(SIDE[3:], counts, strict=True)}
    return line


def shipped() -> dict[Key, Line]:
    """Returns the lines of ``predicted.csv``."""
    return {tuple(line[name] for name in KEY): line for line in read(PREDICTED)}


def text(line: Line) -> str:
    """Returns a line of ``predicted.csv``."""
    values = (line[name] for name in COLUMNS)
    return ",".join(v if isinstance(v, str) else f"{v:g}" for v in values)


def tables() -> Iterator[str]:
    """Yields the lines of the tables of ``docs/predicted.md``."""
    yield from _heads("one layer", *(f"H {H}" for H in SIZES))
    lines = shipped()
    for name, products, cell in product(CHIP_NAMES[:2], DTYPES, ("lstm", "gru")):
        found = (lines.get((name, cell, products, H, 1)) for H in SIZES)
        mhz = CHIPS[name].mhz
        times = (
            f"{f['fw_cycles'] / mhz:.2f} / {f['bw_cycles'] / mhz:.2f}" if f else "" for f in found
        )
        yield _row(f"{name}, {products}, {CELLS[cell]}", *times)
    cases = list(product(CHIP_NAMES[:2], ("inference", "training")))
    yield from _heads("dtype", *map(", ".join, cases))
    for dtype in ("bfloat16", "float16", "float32"):
        yield _row(dtype, *(_chosen(dtype, name, use == "training") for name, use in cases))
    yield from _heads("KernelBench", "predicted ms", "published ms, H100")
    chip = CHIPS["sm_90"]
    for number, (cell, D, published) in KERNELBENCH.items():
        problem = Problem(cell, 256, 10, D, torch.float32, "tf32", False, 6)
        ours = judge(problem, plan_stack(problem, chip), chip, 512, 128).ours
        both = ", both directions" if D == 2 else ""
        yield _row(f"{number}: {CELLS[cell]}{both}", f"{(ours or 0) / 1000:.2f}", published)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _heads(*names: str) -> tuple[str, str]:
    return _row(*names), "|---" * len(names) + "|"


def _chosen(dtype: str, name: str, needs_grad: bool) -> str:
    """Returns the sizes of each cell at which ``auto`` takes the kernels, T 512 and B 16."""

    def takes(cell: str, H: int) -> bool:
        problem = Problem(cell, H, 16, 1, getattr(torch, dtype), "tf32", needs_grad)
        plans = plan_stack(problem, CHIPS[name])
        return judge(problem, plans, CHIPS[name], 512, H).favours_ours

    found = []
    for cell in CELLS:
        runs = [list(run) for ours, run in groupby(SIZES, partial(takes, cell)) if ours]
        said = (f"{run[0]} to {run[-1]}" if run[1:] else f"{run[0]}" for run in runs)
        found.append(f"{CELLS[cell]} {', '.join(said) or 'none'}")
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser("python -m fusedrnn.kernels.predict", description=__doc__)
    parser.add_argument("--again", metavar="TEXT", help="make the lines with this text again")
    again, plans = parser.parse_args().again, grid()
    lines = {
        key: line
        for key, line in shipped().items()
        if key in plans
        and planned(key, plans[key]).items() <= line.items()
        and not (again and again in text(line))
    }
    wanted = [key for key in plans if key not in lines]
    with ProcessPoolExecutor() as processes:
        made = processes.map(predict, wanted, [plans[key] for key in wanted])
        for number, (key, line) in enumerate(zip(wanted, made, strict=True), 1):
            lines[key] = line
            sys.stderr.write(f"{number}/{len(wanted)} {text(line)}\n")
            # Written after each, so that an interrupted run goes on where it ended.
            found = [",".join(COLUMNS), *(text(lines[key]) for key in plans if key in lines)]
            PREDICTED.write_text("\n".join(found) + "\n", encoding="utf-8")
    read.cache_clear()
    sys.stdout.write("\n".join(tables()) + "\n")


if __name__ == "__main__":
    main()
