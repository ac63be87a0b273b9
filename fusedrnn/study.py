"""``python -m fusedrnn study``: the kernels that a layer becomes, without a GPU.

Everything printed comes from the planner, the compiler and the two models of a step; nothing is
measured. ``docs/kernels.md`` explains how to read it.
"""

import json
import math
import textwrap
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import dispatch
from .kernels import plan as planning
from .kernels.expected import floor_us
from .kernels.problem import CHIPS, Chip, NoPlan, Plan, Problem
from .kernels.sass import count_kinds

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES["fp64"] = torch.float64  # for schedule stepwise alone
LARGEST = 2**37  # elements of W_hh, or of a step: no GPU has memory for more


def run(options: Namespace) -> Iterator[str]:
    """Yields the report paragraph by paragraph; the options are those of the command.

    It ends with ``options.fail`` where there is no plan, no Triton, or no folder for the files.
    """
    o, chip = options, CHIPS[options.arch]
    if dispatch._interpreting():
        o.fail("TRITON_INTERPRET is set, under which Triton does not compile; unset it")
    if not dispatch._HAS_TRITON:
        o.fail("study compiles with Triton, which is not installed")
    problem = Problem(
        o.cell, o.hidden, o.batch, o.directions, DTYPES[o.dtype], o.precision, True, o.layers
    )
    if problem.spec.gates * o.hidden * max(o.hidden, o.batch) > LARGEST:
        o.fail("no plan: no GPU has memory for the weights or for one step")
    try:
        if o.schedule:
            is_wavefront = o.schedule == "cooperative" and o.directions == 1
            one = problem if is_wavefront else problem._replace(layers=1)
            plans = [planning.SCHEDULES[o.schedule](one, chip)]
        else:
            plans = list(dict.fromkeys(planning.plan_stack(problem, chip)))
    except NoPlan as reason:
        o.fail(f"no plan: {reason}")
    products = o.precision if o.dtype == "fp32" else None
    sizes = f"H{o.hidden}-B{o.batch}-D{o.directions}-L{o.layers}"
    name = "-".join(filter(None, (o.cell, sizes, o.dtype, products, o.arch, o.schedule)))
    folder = o.out or Path("study") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        o.fail(f"{folder} cannot be made: {error.strerror}")
    yield (
        f"{o.cell}: H {o.hidden}, B {o.batch}, D {o.directions}, L {o.layers}, {o.dtype}, for "
        f"training on {chip.name}: {chip.sms} SMs with {chip.shared_bytes:,} bytes of\nshared "
        "memory each. Compiled for an absent GPU: nothing here is measured.\n"
    )
    yield _paragraph("1. Plan (kernels/plan.py)", _plan_lines(problem, chip, plans))
    yield from _compiled(problem, chip, plans, folder)
    names = " ".join(sorted(path.name for path in folder.iterdir()))
    yield _paragraph(f"5. Files in {folder}", textwrap.wrap(names, 100, break_on_hyphens=False))


def _paragraph(title: str, lines: Iterable[str]) -> str:
    return "\n".join([title, *lines, ""])


def _plan_lines(problem: Problem, chip: Chip, plans: Sequence[Plan]) -> Iterator[str]:
    wrapper = textwrap.TextWrapper(100, initial_indent="   ", subsequent_indent=" " * 6)
    for plan in plans:
        yield wrapper.fill(plan.describe())
        for schedule, choose in planning.SCHEDULES.items():
            if schedule == plan.schedule:
                continue
            try:
                reason = f"possible, {choose(problem._replace(layers=1), chip).forward}"
            except NoPlan as refusal:
                reason = str(refusal)
            yield wrapper.fill(f"why not {schedule}: {reason}")


def _compiled(problem: Problem, chip: Chip, plans: Sequence[Plan], folder: Path) -> Iterator[str]:
    """Compiles the plans; yields the paragraphs about their kernels, and writes the files."""
    from .kernels.compile import compile_plan

    names = "warps", "registers", "spilled", "shared", "programs", "launches", "grid"
    resources: list[tuple[Any, ...]] = [("", *names)]
    mix: list[tuple[Any, ...]] = [("", *count_kinds(()))]
    times, reports, values = [("", "floor", "predicted", "measured")], [], {}
    for plan in plans:
        made = compile_plan(problem._replace(layers=plan.layers), plan, chip)
        for number, k in enumerate(made):
            name = f"{plan.layers}-layers-" * (len(plans) > 1) + k.direction
            name += f"-{number}" * (plan.schedule == "stepwise")  # it has several a direction
            numbers = k.tiles.num_warps, k.registers, k.spills, k.shared_bytes, math.prod(k.grid)
            resources.append((name, *numbers, k.launches, " x ".join(map(str, k.grid))))
            # The loop over T is counted, or everything where the host has that loop.
            counts = count_kinds(k.turn or k.instructions).values()
            mix.append((f"{name}: loop" if k.turn else name, *counts))
            floor, predicted = f"{floor_us(plan, problem, chip, k.direction):.2f}", "-"
            if k.turn:
                found = k.predict(chip.arch)
                predicted = f"{found.us:.2f}"
                reports.append(textwrap.indent(f"{name}: {found.report()}", "   "))
                values[name] = {"cycles": round(found.cycles, 1), "us": round(found.us, 4)}
                values[name] |= {"warps": found.warps, "steps": k.steps}
            times.append((name, floor, predicted, "-"))
            sass = "".join(f"{one.address:#06x} {one}\n" for one in k.instructions)
            for stage, content in {**k.binary.asm, "sass": sass}.items():
                data = content if isinstance(content, bytes) else str(content).encode()
                (folder / f"{name}.{stage}").write_bytes(data)
    if values:
        (folder / "steptime.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    units = f"   registers, spilled bytes: of a thread; shared: bytes of a program; {chip.sms} SMs"
    yield _paragraph("2. Resources, by the compiler", [*_table(resources), units])
    columns = _table(list(zip(*mix, strict=True)))
    yield _paragraph("3. Instructions of one warp, each once", columns)
    lines = [*_table(times), *(reports or ["   no kernel has the loop over T: the host runs it"])]
    yield _paragraph("4. Microseconds of a step (kernels/expected.py, kernels/steptime.py)", lines)


def _table(rows: Sequence[tuple[Any, ...]]) -> Iterator[str]:
    """Columns, the first flush left and the others flush right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield "   " + "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()
