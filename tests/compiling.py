"""Which kernels there are to compile, and what must hold of each; ``offline.py`` compiles them.

Must run in a process without ``TRITON_INTERPRET``. Run as a script it takes jobs as JSON lines on
standard input and answers one line each, so that another Triton can be put on ``PYTHONPATH``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
import triton

from fusedrnn.kernels import measured, offline
from fusedrnn.kernels.plan import (
    CHIPS,
    Chip,
    NoPlan,
    Plan,
    Problem,
    cooperative,
    plan,
)
from fusedrnn.kernels.spec import SPECS


class Job(NamedTuple):
    """One kernel to compile: "forward" or "backward", for which problem, on which chip.

    ``launch`` numbers the different launches of one step in schedule stepwise.
    """

    direction: str
    problem: Problem
    chip: str
    launch: int = 0

    def to_json(self) -> str:
        problem = self.problem._replace(dtype=str(self.problem.dtype).removeprefix("torch."))
        return json.dumps([self.direction, list(problem), self.chip, self.launch])

    @classmethod
    def from_json(cls, line: str) -> Job:
        direction, fields, chip, launch = json.loads(line)
        problem = Problem(*fields)
        return cls(direction, problem._replace(dtype=getattr(torch, problem.dtype)), chip, launch)


#: Beyond these the plan is the same but for H, which no rule of it treats specially.
COOPERATIVE_H = (192, 256, 384, 512, 768, 1024, 1536, 2048)
KINDS = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    *((torch.float32, precision) for precision in ("ieee", "tf32", "tf32x3")),
]
#: Their rows are of no round length.
ODD_H = (200, 1000)
#: Directions and layers of one launch; both of them double what a chip must hold.
COOPERATIVE_STACKS = ((1, 1), (2, 1), (1, 2))
#: What is scanned for tiles: raggedness, stacks, H in steps of so many, batches. A chunk of H is
#: of 8 columns or more; how many rows a program has changes with the batch, what it holds with
#: directions and layers.
SCANNED = (
    (False, (1, 1), 8, (16, 128)),
    (True, (1, 1), 8, (16, 128)),
    *(
        (False, stack, 32, (8, 16, 32, 64, 128, 256))
        for stack in (*COOPERATIVE_STACKS, (1, 3), (1, 4))
    ),
)


def plan_of(problem: Problem, chip: Chip) -> Plan:
    """The plan of one launch of all the problem's layers."""
    return cooperative(problem, chip) if problem.layers > 1 else plan(problem, chip)


def _problems(chip: Chip) -> Iterator[Problem]:
    """Every cell, H, precision, rows per program and I, beside which plans do not differ.

    Resident with two directions, whose binaries hold all of one direction's and a pointer select.
    """
    for cell, (dtype, precision) in product(SPECS, KINDS):
        for H, I, batch in product(range(16, 257, 16), (65, 1, 64), (8, 8 * chip.sms + 1)):
            problem = Problem(cell, I, H, batch, 2, dtype, precision, True)
            if plan(problem, chip).schedule == "resident":
                yield problem
        for H, batch, (D, L) in product(COOPERATIVE_H, (16, 128), COOPERATIVE_STACKS):
            # The other cells differ from these in a few lines: one size is enough.
            if H == 256 or (cell in ("lstm", "gru", "rnn_tanh") and (D, L) == (1, 1)):
                yield Problem(cell, H, H, batch, D, dtype, precision, True, L)
    yield from _cooperative_tiles(chip)
    for cell, (dtype, precision), H in product(("lstm", "gru", "rnn_tanh"), KINDS, ODD_H):
        yield Problem(cell, H, H, 16, 1, dtype, precision, True)
    for cell, (dtype, precision), layers in product(("lstm", "gru"), KINDS, (3, 4)):
        yield Problem(cell, 256, 256, 16, 1, dtype, precision, True, layers)
    yield from _inference_problems(chip)
    yield from _ragged_problems(chip)
    yield from _member_problems(chip)
    yield from _stepwise_problems()
    yield from measured_problems(chip)


def _cooperative_tiles(chip: Chip) -> Iterator[Problem]:
    """Whatever tiles the plan can choose up to H = 2048, each with the first H that has it."""
    seen = set()
    for (ragged, (D, L), step, batches), cell in product(SCANNED, ("lstm", "gru", "rnn_tanh")):
        every = product(KINDS, range(64, 2049, step), batches)
        for (dtype, precision), H, batch in every:
            problem = Problem(cell, H, H, batch, D, dtype, precision, True, L, ragged=ragged)
            try:
                chosen = plan_of(problem, chip)
            except NoPlan:
                continue
            sides = enumerate((chosen.forward, chosen.backward))
            tiles = {
                (cell, ragged, dtype, i, replace(t, at_once=1, shared_bytes=0))
                for i, t in sides
                if t
            }
            if chosen.schedule == "cooperative" and chosen.layers == L and tiles - seen:
                seen |= tiles
                yield problem


def _inference_problems(chip: Chip) -> Iterator[Problem]:
    """Forward alone, which saves nothing: the largest resident H, and three sizes beyond."""
    for cell, (dtype, precision) in product(SPECS, KINDS):
        problems = [Problem(cell, 65, H, 8, 2, dtype, precision, False) for H in range(16, 257, 16)]
        yield from [p for p in problems if plan(p, chip).schedule == "resident"][-1:]
        for H in (256, 512, 1024):
            yield Problem(cell, H, H, 16, 1, dtype, precision, False)


def measured_problems(chip: Chip) -> Iterator[Problem]:
    """Those of the table of measurements: what a GPU preferred must compile as well."""
    for shape in measured.table():
        dtype, precision = getattr(torch, shape.dtype), shape.precision or "tf32"
        problem = Problem(
            shape.cell, shape.I, shape.H, shape.B, shape.directions, dtype, precision,
            shape.needs_grad,
        )  # fmt: skip
        if measured.shape_of(problem, chip) == shape:
            yield problem


def _member_problems(chip: Chip) -> Iterator[Problem]:
    """Ensembles: the largest resident H of every cell, precision and rows per program, both ways to
    project, and cooperative ones. What members add is an offset of each pointer before the loop."""
    for cell, (dtype, precision), H in product(SPECS, KINDS, (256, 512)):
        yield Problem(cell, H, H, 16, 1, dtype, precision, True, members=2)
    for cell, (dtype, precision), I in product(SPECS, KINDS, (1, 65)):
        for batch in (16, 8 * chip.sms + 2):
            problems = [
                Problem(cell, I, H, batch, 2, dtype, precision, True, members=2)
                for H in range(16, 257, 16)
            ]
            yield from [p for p in problems if plan(p, chip).schedule == "resident"][-1:]


def _ragged_problems(chip: Chip) -> Iterator[Problem]:
    """The largest resident H of every cell and precision, and cooperative at every size.

    What ragged rows add to a kernel is the same for each tile: it counts where registers are full.
    """
    for cell, (dtype, precision) in product(SPECS, KINDS):
        for batch in (8, 8 * chip.sms + 1):
            problems = [
                Problem(cell, 65, H, batch, 2, dtype, precision, True, ragged=True)
                for H in range(16, 257, 16)
            ]
            yield from [p for p in problems if plan(p, chip).schedule == "resident"][-1:]
        for H, batch in product(COOPERATIVE_H, (16, 128)):
            if H == 256 or cell in ("lstm", "gru", "rnn_tanh"):
                yield Problem(cell, H, H, batch, 1, dtype, precision, True, ragged=True)
        for D, L in COOPERATIVE_STACKS[1:]:
            yield Problem(cell, 256, 256, 16, D, dtype, precision, True, L, ragged=True)


def _stepwise_problems() -> Iterator[Problem]:
    """Every width of a tile, and every cell and dtype; H = 4096 is beyond the other schedules."""
    for H in (1, 2, 3, 5, 9, 17, 33):
        yield Problem("lstm", H, H, 8, 2, torch.float64, "ieee", True)
    for cell, (dtype, H) in product(
        SPECS,
        (
            (torch.float64, 48),
            *((dtype, 4096) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        ),
    ):
        for ragged in (False, True):
            yield Problem(cell, H, H, 8, 2, dtype, "ieee", True, ragged=ragged)


def every_plan(chip: Chip) -> Iterator[tuple[Problem, Plan]]:
    """One problem for each different plan. Where other schedules end is no plan of stepwise."""
    seen, stepwise = set(), set(_stepwise_problems())
    for problem in _problems(chip):
        try:
            chosen = plan_of(problem, chip)
        except NoPlan:
            continue
        meant = chosen.schedule != "stepwise" or problem in stepwise
        key = problem.cell, problem.dtype, _tilings(problem, chosen), chosen.i_blocks
        if meant and key not in seen:
            seen.add(key)
            yield problem, chosen


def _tilings(problem: Problem, chosen: Plan) -> tuple:
    """What of a plan makes a binary: not how many tiles run at once, nor how long it takes."""
    tiles = (chosen.forward, chosen.backward)
    size = (problem.hidden_size, problem.directions) if chosen.forward.k_chunks else ()
    size += (problem.ragged, chosen.schedule, problem.members, problem.needs_grad)
    return *(t and replace(t, at_once=1) for t in tiles), chosen.layers, size


def every_job(chip: str) -> Iterator[Job]:
    """Both kernels of every plan; of each one for every tiling (backward knows no I)."""
    seen = set()
    for problem, chosen in every_plan(CHIPS[chip]):
        forward, backward, *rest = _tilings(problem, chosen)
        for direction, tiles, more in (
            ("forward", forward, (*rest, chosen.i_blocks)),
            ("backward", backward, rest),
        ):
            key = direction, problem.cell, problem.dtype, tiles, tuple(more)
            if tiles and key not in seen:
                seen.add(key)
                launches = range(offline.launches_of(problem, chosen))
                yield from (Job(direction, problem, chip, launch) for launch in launches)


def compile_job(job: Job) -> dict:
    """Compiles one kernel; returns its shared bytes, registers, spilled bytes and mma count."""
    chip = CHIPS[job.chip]
    chosen = plan_of(job.problem, chip)
    compiled = offline.compile_kernel(job.problem, chosen, chip, job.direction, job.launch)
    binary = compiled.binary
    usage = {
        "shared": compiled.shared_bytes,
        "narrow": narrow_rows(binary, compiled.tiles.block_b),
    }
    if chosen.schedule != "stepwise":
        deep = 16 if job.problem.dtype.itemsize == 2 else 8  # columns of one mma
        usage["chain"] = longest_chain(binary.asm["ttgir"], deep)
    if chosen.schedule == "cooperative":
        nvidia = not job.chip.startswith("gfx")
        usage |= _exchanged_loads(binary, job.problem.hidden_size, nvidia) | _waits(binary)
    return usage | offline.figures(binary)


def _exchanged_loads(binary, H: int, nvidia: bool) -> dict:
    """How loads of what other programs wrote came out: only these go past L1 (``cg``).

    early: how many the compiler moved before the first wait (an acquiring poll); scalar: how many
    take one element at a time though rows are aligned, which costs an operand 8 times the loads.
    """
    ir = binary.asm["ttgir"]
    loads = [match.start() for match in re.finditer(r"tt\.load [^\n]*\bcg\b", ir)]
    assert loads, "no load of exchanged data is left"
    early = sum(start < ir.index("acquire") for start in loads)
    scalar = re.findall(r"ld\.global\.cg\.b\d+", binary.asm["ptx"]) if nvidia else []
    return {"early": early, "scalar": 0 if H % 16 else len(scalar)}


def _waits(binary) -> dict:
    """What the launch options of programs that wait for each other must have come to.

    endless: how many polling loops have no call of the device's assertion to end them; apart:
    whether the launch would not ask for all programs at once.
    """
    polls = len(re.findall(r"atomic_rmw add, acquire", binary.asm["ttgir"])) // 2  # before, inside
    bounds = len(re.findall(r"call\S* __assertfail", binary.asm["ptx"]))
    assert polls, "no wait is left"
    return {
        "endless": max(0, polls - bounds),
        "apart": not binary.metadata.launch_cooperative_grid,
    }


_VALUE = re.compile(r"%\w+(?:#\d+)?")
_ACCUMULATES = re.compile(
    r"\s*(%\w+) = (tt\.dot|arith\.addf|arith\.select|arith\.cmpf|ttg\.convert_layout)\b([^:]*):(.*)"
)
_COLUMNS = re.compile(r"tensor<(?:\d+x)*(\d+)x(?:bf|f)\d+, #ttg\.dot_op<\{opIdx = 0")


def longest_chain(ttgir: str, deep: int) -> int:
    """The most mma instructions of which each adds to what the one before gave.

    Through the accumulators of dots, and the sums of what they gave; the operands of a dot, an
    activation or memory end a chain. ``deep``: how many columns one instruction multiplies.
    """
    depths: dict[str, int] = {}
    for name, operation, operands, types in map(re.Match.groups, _matches(ttgir)):
        values, own = _VALUE.findall(operands), 0
        if operation == "tt.dot":
            columns = _COLUMNS.search(types)
            assert columns, types
            values, own = values[2:3], -(-int(columns[1]) // deep)
        depths[name] = own + max((depths.get(value, 0) for value in values), default=0)
    return max(depths.values(), default=0)


def _matches(ttgir: str) -> Iterator[re.Match]:
    return filter(None, map(_ACCUMULATES.match, ttgir.splitlines()))


def narrow_rows(binary, block_b: int) -> int:
    """How often a vector of row pointers is moved by 32-bit offsets, which overflow at 2**31.

    Counted only for 8 rows: no block of columns, whose offsets are small, is 8 wide.
    """
    if block_b != 8:
        return 0
    return len(
        re.findall(r"tt\.addptr .*: tensor<8x!tt\.ptr<\w+>>, tensor<8xi32>", binary.asm["ttir"])
    )


def main() -> None:
    """Reads jobs and answers each with what its binary needs, one JSON object a line."""
    for line in sys.stdin:
        job = Job.from_json(line)
        usage = compile_job(job)
        sys.stdout.write(json.dumps({"triton": triton.__version__, **usage}) + "\n")


if __name__ == "__main__":
    main()
