"""Compiles the kernels that the planner chooses and predicts their steps; it needs no GPU.

``python -m fusedrnn.kernels.predict`` (or ``make predict``) adds the lines that ``predicted.csv``
lacks, or that are of other tiles than the planner's, and writes the tables of
``docs/predicted.md``, which follow from it.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import groupby, product
from pathlib import Path

import torch

from .expected import PREDICTED, judge, read
from .plan import cooperative, plan, plan_stack
from .problem import CHIPS, Chip, NoPlan, Plan, Problem

PAGE = Path(__file__).resolve().parents[1] / "docs" / "predicted.md"
CHIP_NAMES = ("sm_90", "sm_80", "sm_86")  # the families, see expected.FAMILIES
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}
DTYPES = {"16-bit": torch.bfloat16, "tf32": torch.float32}
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
#: Problems of KernelBench, level 3: cell, directions, and milliseconds of torch on three H100.
KERNELBENCH = {
    35: ("lstm", 1, "16.9 to 29.4"), 38: ("lstm", 2, "32.0 to 56.9"),
    39: ("gru", 1, "21.7 to 39.1"), 41: ("gru", 2, "42.6 to 77.5"),
}  # fmt: skip


@cache
def grid() -> dict[str, tuple[Problem, Plan, Chip]]:
    """Returns the plan of every line by how the line begins; a wavefront has two layers.

    A line begins with what the planner decides. One that begins otherwise is stale.
    """
    found = {}
    for name, cell, products, H, L in product(CHIP_NAMES, CELLS, DTYPES, SIZES, (1, 2)):
        if L == 2 and (H not in (256, 512) or cell == "rnn_tanh"):
            continue
        problem, chip = Problem(cell, H, 16, 1, DTYPES[products], "tf32", True, L), CHIPS[name]
        with suppress(NoPlan):
            chosen = (plan if L == 1 else cooperative)(problem, chip)
            start = f"{name},{cell},{products},{H},{L},{chosen.schedule},"
            for t in filter(None, (chosen.forward, chosen.backward)):
                start += f"{t.block_b},{t.block_h},{t.num_warps},"
            if chosen.schedule != "stepwise":
                found[start] = problem, chosen, chip
    return found


def predict(start: str) -> str:
    """Compiles forward and backward of a line of ``grid``, and adds their predicted steps."""
    from .compile import compile_plan  # imports triton

    problem, chosen, chip = grid()[start]
    counts = []
    for kernel in compile_plan(problem, chosen, chip):
        found = kernel.predict(chip.arch)
        counts += [round(found.instructions), found.barriers, round(found.cycles), kernel.spills]
    return start + ",".join(f"{count:g}" for count in counts)


def tables() -> Iterator[str]:
    """Yields the tables of ``docs/predicted.md``."""
    lines = {tuple(line.values())[:5]: line for line in read(PREDICTED)}
    rows = [["one layer", *(f"H {H}" for H in SIZES)]]
    for name, products, cell in product(CHIP_NAMES[:2], DTYPES, ("lstm", "gru")):
        found = (lines.get((name, cell, products, H, 1)) for H in SIZES)
        mhz = CHIPS[name].mhz
        times = (
            f"{f['fw_cycles'] / mhz:.2f} / {f['bw_cycles'] / mhz:.2f}" if f else "" for f in found
        )
        rows.append([f"{name}, {products}, {CELLS[cell]}", *times])
    yield _table(rows)
    cases = list(product(CHIP_NAMES[:2], ("inference", "training")))
    rows = [["dtype", *map(", ".join, cases)]]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        chosen = (_chosen(dtype, CHIPS[name], use == "training") for name, use in cases)
        rows.append([str(dtype).removeprefix("torch."), *chosen])
    yield _table(rows)
    rows, chip = [["KernelBench", "predicted ms", "published ms, H100"]], CHIPS["sm_90"]
    for number, (cell, D, published) in KERNELBENCH.items():
        problem = Problem(cell, 256, 10, D, torch.float32, "tf32", False, 6)
        ours = judge(problem, plan_stack(problem, chip), chip, 512, 128).ours
        both = ", both directions" if D == 2 else ""
        rows.append([f"{number}: {CELLS[cell]}{both}", f"{(ours or 0) / 1000:.2f}", published])
    yield _table(rows)


def _table(rows: list[list[str]]) -> str:
    head, *others = (f"| {' | '.join(row)} |\n" for row in rows)
    return "".join([head, "|---" * len(rows[0]) + "|\n", *others])


def _chosen(dtype: torch.dtype, chip: Chip, needs_grad: bool) -> str:
    """Returns the sizes of each cell at which ``auto`` takes the kernels, T 512 and B 16."""
    found = []
    for cell, name in CELLS.items():
        problems = [Problem(cell, H, 16, 1, dtype, "tf32", needs_grad) for H in SIZES]
        verdicts = [judge(p, plan_stack(p, chip), chip, 512, p.hidden_size) for p in problems]
        takes = {H: verdict.favours_ours for H, verdict in zip(SIZES, verdicts, strict=True)}
        runs = [list(run) for ours, run in groupby(SIZES, takes.get) if ours]
        said = (f"{run[0]} to {run[-1]}" if run[1:] else f"{run[0]}" for run in runs)
        found.append(f"{name} {', '.join(said) or 'none'}")
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser("python -m fusedrnn.kernels.predict", description=__doc__)
    parser.add_argument("--again", metavar="TEXT", help="make the lines with this text again")
    again = parser.parse_args().again
    head, *lines = PREDICTED.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not (again and again in line)]
    made = {start: next((n for n in kept if n.startswith(start)), "") for start in grid()}
    wanted = [start for start, line in made.items() if not line]
    with ProcessPoolExecutor() as processes:
        for number, line in enumerate(processes.map(predict, wanted)):
            made[wanted[number]] = line
            sys.stderr.write(f"{number + 1}/{len(wanted)} {line}\n")
            # Written after each, so that an interrupted run goes on where it ended.
            found = [head, *filter(None, made.values())]
            PREDICTED.write_text("\n".join(found) + "\n", encoding="utf-8")
    read.cache_clear()
    page = PAGE.read_text(encoding="utf-8")
    for table in tables():
        head = re.escape(table.partition("\n")[0])
        page = re.sub(rf"{head}\n(\|.*\n)*", table, page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
