"""``python -m bench ladder``: the rungs of docs/kernels.md side by side, or one of them alone."""

import argparse
import ast
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fusedrnn.kernels.expected import LAUNCH_US, floor_us
from fusedrnn.kernels.plan import SCHEDULES
from fusedrnn.kernels.problem import CHIPS, Problem, Tiles

from . import UserError, figure
from .cases import named
from .figure import ARCH
from .providers import TORCH
from .run import run as run_plan

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- python -m bench ladder --write -->\n", "<!-- end of the ladder -->\n"
HEADS = ("rung", "file", "W_hh lies in", "launches", "us", "instructions", "barriers", "shared KiB")
#: The functions of a file that make a step forward.
STEP = re.compile(r"_fwd_kernel$|_forward_step$|^_lstm_step$|^_one_direction$|^_scan_kernel$")
MOST_LINES = 60


class Rung(NamedTuple):
    """One way to run the same recurrence."""

    name: str  # of its schedule, if it is one
    file: str
    weights: str  # where W_hh lies
    launches: str  # of T steps forward
    test: str
    H: int = 128  # of the LSTM that is compiled: bf16, batch 64


RUNGS = {
    "1": Rung("operations", "fusedrnn/reference.py", "memory", "11 T", "reference"),
    "2": Rung("stepwise", "kernels/stepwise.py", "memory", "2 T", "stepwise"),
    "3": Rung("resident", "kernels/resident.py", "shared memory", "1", "resident"),
    "4": Rung("resident_nvidia", "kernels/resident_nvidia.py", "registers", "1", "resident_nvidia"),
    "5": Rung("cooperative", "kernels/cooperative.py", "32 SMs", "1", "cooperative", 512),
    "scan": Rung("another model", "bench/scan.py", "there is none", "1", "bench_ladder"),
}


def run(options: argparse.Namespace) -> int:
    """Prints the table, or compares one rung with the reference and prints what its step adds.

    On CUDA a rung passes the gate of the bench and is timed. Elsewhere, and for the scan, the tests
    of its file run.
    """
    if number := options.rung:
        if options.device == "cuda" and number != "scan":
            rung = RUNGS[number]
            provider = f"fusedrnn {rung.name}" if rung.name in SCHEDULES else "eager loop"
            plan = [(case, (TORCH, provider)) for case in named(f"H{rung.H}-B64-bf16")]
            code = run_plan(options, plan, ("lstm",))[1]
        else:
            code = tested(number)
        print("\n".join(differing(number)))
        return code
    text = "".join(f"| {' | '.join(row)} |\n" for row in table())
    print(text, end="")
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")
        figure.draw(PAGE.parent / "figures" / "step.svg")
    return 0


def table() -> Iterator[tuple[str, ...]]:
    """Yields the heads, a rule, and a row for each rung; us are m: modelled, or p: predicted.

    Nothing is measured: launches are modelled (``kernels/expected.py``), loops predicted
    (``kernels/steptime.py``).
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is set, under which Triton does not compile; unset it")
    yield HEADS
    yield ("---",) * len(HEADS)
    for number, rung in RUNGS.items():
        numbers = (f"{11 * LAUNCH_US:.1f} m", *"---") if number == "1" else compiled(rung)
        name = f"{number} {rung.name}"
        yield (name, f"`{rung.file}`", rung.weights, rung.launches, *numbers)


def compiled(rung: Rung) -> Iterator[str]:
    """Compiles a rung; yields us, instructions of a warp, barriers, KiB through shared memory."""
    from fusedrnn.kernels import compile, sass, steptime
    from fusedrnn.kernels.latencies import TIMINGS

    chip = CHIPS[ARCH]
    if choose := SCHEDULES.get(rung.name):
        problem = Problem("lstm", rung.H, 64, 1, torch.bfloat16, "tf32", True)
        plan = choose(problem, chip)
        *_, kernel = compile.compile_plan(problem, plan, chip, ("forward",))
    else:
        from . import scan

        with compile.recording(chip) as made:
            scan.scan(*(torch.empty(64, 512, rung.H, device="meta"),) * 2)
        tiles = Tiles(scan.BLOCK_T, scan.BLOCK_H, 4, None, "ieee", 0)
        kernel = compile.Kernel("forward", tiles, made[0][1], made[0][0], scan.BLOCK_T)
    if path := kernel.turn:
        yield f"{kernel.predict(ARCH).us:.2f} p"
    else:
        path = kernel.instructions
        yield f"{floor_us(plan, problem, chip, kernel.direction):.2f} m"
    sm, kinds = TIMINGS[ARCH], sass.count_kinds(path)
    costs = [steptime.cost(one, sm) for one in path]
    beats = sum(cost.unit for cost in costs if cost.kind == "shared memory")
    moved = beats * sm.shared_bytes * kernel.tiles.num_warps / 1024
    for count in (kinds["total"], kinds["barrier"], moved):
        yield f"{count / kernel.steps:.{0 if count >= kernel.steps else 1}f}"


def tested(number: str) -> int:
    """Runs the tests that compare an LSTM of this rung with the reference, in the interpreter."""
    file = f"tests/test_{RUNGS[number].test}.py"
    print(f"rung {number} beside the reference, in Triton's interpreter: {file}", flush=True)
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = (*pytest, "-k", "equals and (lstm or scan)", file)
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def differing(number: str) -> Iterator[str]:
    """Yields the lines of a step that the rung below has not, at most MOST_LINES."""
    below = RUNGS[str(int(number) - 1)] if number in "2345" else None
    found = list(difflib.ndiff(step(below), step(RUNGS[number])))
    new = [line[2:] for line in found if line.startswith("+")]
    other = below.file if below else "no other"
    yield f"\n{RUNGS[number].file}: {len(new)} lines that {other} has not"
    yield from new[:MOST_LINES]
    gone = sum(line.startswith("-") for line in found)
    yield f"{'...' * (len(new) > MOST_LINES)} ({gone} lines of the rung below are gone)"


def step(rung: Rung | None) -> list[str]:
    """Returns the lines of the functions that make a step, without blank ones."""
    text = (ROOT / rung.file).read_text() if rung else ""
    steps = [node for node in ast.parse(text).body if STEP.search(getattr(node, "name", ""))]
    spans = [text.splitlines()[node.lineno - 1 : node.end_lineno] for node in steps]
    return [line for lines in spans for line in lines if line]
