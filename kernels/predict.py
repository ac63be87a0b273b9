"""Compiles the kernels that the planner chooses and writes their predicted steps.

``python -m fusedrnn.kernels.predict`` (or ``make predict``) adds the lines that ``predicted.csv``
lacks, or that are of other tiles than the planner's, and prints the tables of
``docs/predicted.md``, which follow from it. It needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby, product

import torch

from .expected import PREDICTED, Key, Side, Step, judge, read_steps
from .latencies import timings
from .plan import cooperative, plan, plan_stack
from .problem import CHIPS, NoPlan, Plan, Problem

CHIP_NAMES = ("sm_90", "sm_80", "sm_86")  # the families, see expected.FAMILIES
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}
DTYPES = {"16-bit": torch.bfloat16, "tf32": torch.float32}
SIZES = (16, 32, 64, 128, 256, 512, 1024)
#: Problems of KernelBench, level 3: cell, directions, and milliseconds of torch on three H100.
KERNELBENCH = {
    35: ("lstm", 1, "16.9 to 29.4"), 38: ("lstm", 2, "32.0 to 56.9"),
    39: ("gru", 1, "21.7 to 39.1"), 41: ("gru", 2, "42.6 to 77.5"),
}  # fmt: skip


def grid() -> Iterator[Key]:
    """Yields every line that the table may have; a wavefront is compiled with two layers."""
    for chip, cell, products, H in product(CHIP_NAMES, CELLS, DTYPES, SIZES):
        yield Key(chip, cell, products, H, 1)
        if H in (256, 512) and cell != "rnn_tanh":
            yield Key(chip, cell, products, H, 2)


def _problem(key: Key) -> Problem:
    return Problem(key.cell, key.H, 16, 1, DTYPES[key.products], "tf32", True, key.layers)


def plan_of(key: Key) -> Plan | None:
    """Returns the plan of a line, None where no schedule that keeps the weights takes it."""
    try:
        chosen = (plan if key.layers == 1 else cooperative)(_problem(key), CHIPS[key.chip])
    except NoPlan:
        return None
    return None if chosen.schedule == "stepwise" else chosen


def predict(key: Key) -> Step:
    """Compiles forward and backward of a line that has a plan, and predicts their steps."""
    from .compile import compile_plan  # imports triton

    chosen, sides = plan_of(key), []
    assert chosen is not None
    for kernel in compile_plan(_problem(key), chosen, CHIPS[key.chip]):
        tiles, found = kernel.tiles, kernel.predict(key.chip)
        counts = round(found.instructions), found.barriers, round(found.cycles)
        sides.append(Side(tiles.block_b, tiles.block_h, tiles.num_warps, *counts, kernel.spills))
    return Step(key, chosen.schedule, *sides)


def is_fresh(step: Step | None, chosen: Plan | None) -> bool:
    """Returns whether a line is of the planner's present tiles; a kernel may still be another."""
    if step is None or chosen is None:
        return step is chosen
    sides = zip((step.forward, step.backward), (chosen.forward, chosen.backward), strict=True)
    return step.schedule == chosen.schedule and all(
        tiles and side[:3] == (tiles.block_b, tiles.block_h, tiles.num_warps)
        for side, tiles in sides
    )


def _write(steps: dict[Key, Step]) -> None:
    lines = [Step.heads(), *(steps[key].cells() for key in grid() if key in steps)]
    new = PREDICTED.with_suffix(".new")
    new.write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")
    new.replace(PREDICTED)


def tables() -> Iterator[str]:
    """Yields the lines of the tables of ``docs/predicted.md``."""
    yield f"| | {' | '.join(f'H {H}' for H in SIZES)} |"
    yield f"|---{'|---' * len(SIZES)}|"
    for name, products, cell in product(CHIP_NAMES[:2], DTYPES, ("lstm", "gru")):
        steps = (read_steps().get(Key(name, cell, products, H, 1)) for H in SIZES)
        mhz = timings(name).mhz
        sides = ((s.forward.cycles, s.backward.cycles) if s else () for s in steps)
        times = (" / ".join(f"{cycles / mhz:.2f}" for cycles in both) for both in sides)
        yield f"| {name}, {products}, {CELLS[cell]} | {' | '.join(times)} |"
    yield "| | sm_90, inference | sm_90, training | sm_80, inference | sm_80, training |"
    yield "|---|---|---|---|---|"
    for dtype in ("bfloat16", "float16", "float32"):
        cases = product(CHIP_NAMES[:2], (False, True))
        yield f"| {dtype} | {' | '.join(_chosen(dtype, *case) for case in cases)} |"
    yield "| KernelBench | predicted ms | published ms, H100 |"
    yield "|---|---|---|"
    chip = CHIPS["sm_90"]
    for number, (cell, D, published) in KERNELBENCH.items():
        problem = Problem(cell, 256, 10, D, torch.float32, "tf32", False, 6)
        ours = judge(problem, plan_stack(problem, chip), chip, 512, 128).ours
        both = ", both directions" if D == 2 else ""
        time = "none" if ours is None else f"{ours / 1000:.2f}"
        yield f"| {number}: {CELLS[cell]}{both} | {time} | {published} |"


def _chosen(dtype: str, name: str, needs_grad: bool) -> str:
    """Returns the sizes of each cell at which ``auto`` takes the kernels, T 512 and B 16."""
    chip, found = CHIPS[name], []
    for cell in CELLS:
        takes = {}
        for H in SIZES:
            problem = Problem(cell, H, 16, 1, getattr(torch, dtype), "tf32", needs_grad)
            takes[H] = judge(problem, plan_stack(problem, chip), chip, 512, H).favours_ours
        runs = ([H for H, _ in run] for ours, run in groupby(takes.items(), lambda t: t[1]) if ours)
        sizes = (f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        found.append(f"{CELLS[cell]} {', '.join(sizes) or 'none'}")
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser("python -m fusedrnn.kernels.predict", description=__doc__)
    parser.add_argument("--again", metavar="TEXT", help="make the lines with this text again")
    parser.add_argument("--line", help="print this line made anew, as sm_90,lstm,tf32,64,1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    options = parser.parse_args()
    if options.line:
        chip, cell, products, H, layers = options.line.split(",")
        cells = predict(Key(chip, cell, products, int(H), int(layers))).cells()
        sys.stdout.write(",".join(cells) + "\n")
        return
    again, plans = options.again or "\0", {key: plan_of(key) for key in grid()}
    steps = {
        key: step
        for key, step in read_steps().items()
        if is_fresh(step, plans.get(key)) and again not in ",".join(step.cells())
    }
    wanted = [key for key, chosen in plans.items() if chosen and key not in steps]
    with ProcessPoolExecutor(options.jobs) as processes:
        futures = [processes.submit(predict, key) for key in wanted]
        for number, future in enumerate(as_completed(futures), 1):
            step = future.result()
            steps[step.key] = step
            _write(steps)  # an interrupted run goes on where it ended
            sys.stderr.write(f"{number}/{len(wanted)} {','.join(step.cells())}\n")
    sys.stdout.write("\n".join(tables()) + "\n")


if __name__ == "__main__":
    main()
