"""``python -m fusedrnn study``: the kernels that a layer becomes, without a GPU.

Everything printed comes from the planner, the compiler and the two models of a step; nothing is
measured. ``docs/kernels.md`` explains how to read it.
"""

import json
import math
import os
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .kernels import plan as planning
from .kernels.plan import CHIPS, Chip, NoPlan, Plan, Problem

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES["fp64"] = torch.float64  # for schedule stepwise alone
PRECISIONS = ("tf32", "ieee", "tf32x3")
SCHEDULES = tuple(planning.SCHEDULES)
LARGEST_MEMORY = 2**38  # bytes; no GPU of the architectures in ``CHIPS`` is sold with more


class UsageError(Exception):
    """The command cannot do what it is asked; the message is the reason, in one sentence."""


def run(options: Namespace) -> Iterator[str]:
    """Yields the report paragraph by paragraph; the options are those of the command.

    Raises:
        UsageError: there is no plan, no triton, or no folder for the files.
    """
    compiling = _compiler()
    o, chip = options, CHIPS[options.arch]
    problem = Problem(
        o.cell, o.hidden, o.batch, o.directions, DTYPES[o.dtype], o.precision, True, o.layers
    )
    _check_memory(problem, o.input or o.hidden)
    try:
        plans = _plans(problem, chip, o.schedule)
    except NoPlan as reason:
        raise UsageError(f"no plan: {reason}") from None
    folder = o.out or Path("study") / _folder_name(o)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}") from None
    yield (
        f"{o.cell}: H {o.hidden}, B {o.batch}, D {o.directions}, L {o.layers}, {o.dtype}, for "
        f"training on {chip.name}: {chip.sms} SMs with {chip.shared_bytes:,} bytes of\nshared "
        "memory each. Compiled for an absent GPU: nothing here is measured."
    )
    yield "\n".join(["1. Plan (kernels/plan.py)", *_plan_lines(problem, chip, plans)])
    kernels: dict[str, Any] = {}
    for plan in plans:
        kernels |= _kernels(compiling, problem, plan, plans, chip)
    yield "\n".join(["2. Resources, by the compiler", *_resource_lines(kernels, chip)])
    yield "\n".join(["3. Instructions of one warp, each once", *_mix_lines(compiling, kernels)])
    times = _time_lines(kernels, plans, problem, o.arch, folder)
    yield "\n".join(["4. Microseconds of a step (kernels/model.py, kernels/steptime.py)", *times])
    for name, kernel in kernels.items():
        _dump(folder, name, kernel)
    names = " ".join(sorted(path.name for path in folder.iterdir()))
    yield "\n".join([f"5. Files in {folder}", *textwrap.wrap(names, 100, break_on_hyphens=False)])


def _compiler() -> Any:
    """Returns the module ``compile``; raises UsageError if triton is missing, or interprets."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no", "n"):
        raise UsageError("TRITON_INTERPRET is set, under which Triton does not compile; unset it")
    try:
        from .kernels import compile as compiling
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise UsageError("study compiles with Triton, which is not installed") from None
    return compiling


def _check_memory(problem: Problem, input_size: int) -> None:
    """Raises UsageError if the weights and the tensors of one step are larger than any memory."""
    p, units = problem, problem.directions * problem.hidden_size
    columns = input_size + p.hidden_size + (p.layers - 1) * (units + p.hidden_size)
    step = p.batch * (input_size + p.layers * p.spec.gates * units)
    size = (p.spec.gates * units * columns + step) * p.dtype.itemsize
    if size > LARGEST_MEMORY:
        raise UsageError(
            f"no plan: the weights and one step of the batch are {size >> 30:,} GiB, and no GPU "
            f"has more than {LARGEST_MEMORY >> 30}"
        )


def _plans(problem: Problem, chip: Chip, schedule: str | None) -> list[Plan]:
    """The different plans of the stack, from the first layer up."""
    if schedule is None:
        return list(dict.fromkeys(planning.plan_stack(problem, chip)))
    if schedule != "cooperative" or problem.directions > 1:
        problem = problem._replace(layers=1)
    return [planning.SCHEDULES[schedule](problem, chip)]


def _plan_lines(problem: Problem, chip: Chip, plans: Sequence[Plan]) -> Iterator[str]:
    for plan in plans:
        yield textwrap.fill(plan.describe(), 100, initial_indent="   ", subsequent_indent=" " * 6)
        for schedule, choose in planning.SCHEDULES.items():
            if schedule == plan.schedule:
                continue
            layers = plan.layers if schedule == "cooperative" else 1
            try:
                step = choose(problem._replace(layers=layers), chip).step * plan.layers / layers
                reason = f"possible: {step:.2f} us a step, this {plan.step:.2f} us (modelled)"
            except NoPlan as refusal:
                reason = str(refusal)
            text = f"why not {schedule}: {reason}"
            yield textwrap.fill(text, 100, initial_indent="   ", subsequent_indent=" " * 6)


def _kernels(
    compiling: Any, problem: Problem, plan: Plan, plans: Sequence[Plan], chip: Chip
) -> dict[str, Any]:
    """The compiled kernels by name; in schedule stepwise there are several a direction."""
    found: dict[str, Any] = {}
    for kernel in compiling.compile_plan(problem._replace(layers=plan.layers), plan, chip):
        name = _name(plan, kernel.direction, plans)
        number = sum(each.startswith(name) for each in found)
        found[f"{name}-{number}" if plan.schedule == "stepwise" else name] = kernel
    return found


def _resource_lines(kernels: dict[str, Any], chip: Chip) -> Iterator[str]:
    heads = "", "warps", "registers", "spilled", "shared", "programs", "launches", "grid"
    rows: list[tuple[str, ...]] = [heads]
    for name, k in kernels.items():
        numbers = k.tiles.num_warps, k.registers, k.spills, k.shared_bytes, math.prod(k.grid)
        rows.append((name, *map(str, (*numbers, k.launches)), " x ".join(map(str, k.grid))))
    yield from _table(rows)
    yield f"   registers, spilled bytes: of a thread; shared: bytes of a program; {chip.sms} SMs"


def _mix_lines(compiling: Any, kernels: dict[str, Any]) -> Iterator[str]:
    """A column for the loop over T of each kernel, or for all of it where the host has the loop."""
    columns = [("", *compiling.count_kinds(()))]
    for name, kernel in kernels.items():
        loop = compiling.loop_over_time(kernel.instructions)
        counts = compiling.count_kinds(loop or kernel.instructions)
        columns.append((f"{name}: loop" if loop else name, *map(str, counts.values())))
    yield from _table(list(zip(*columns, strict=True)))


def _time_lines(
    kernels: dict[str, Any], plans: Sequence[Plan], problem: Problem, arch: str, folder: Path
) -> Iterator[str]:
    """The floor of each kernel beside a simulation of its loop over T (steptime.json)."""
    from .kernels import steptime
    from .kernels.latencies import timings
    from .kernels.sass import loops, trace

    predictions = {}
    for name, kernel in kernels.items():
        if loops(kernel.instructions):
            hops = len(problem.spec.phases) if kernel.tiles.k_chunks else 0
            warps, path = kernel.tiles.num_warps, trace(kernel.instructions)
            predictions[name] = steptime.predict(path, timings(arch), warps, hops, kernel.steps)
    rows = [("", "floor", "predicted", "measured")]
    for plan in plans:
        for direction, floors in zip(("forward", "backward"), plan.floors, strict=True):
            name = _name(plan, direction, plans)
            predicted = f"{predictions[name].us:.2f}" if name in predictions else "-"
            rows.append((name, f"{floors.step:.2f}", predicted, "-"))
        if plan.measured:
            step, us = plan.step, plan.measured.us
            rows.append((_name(plan, "both", plans), f"{step:.2f}", "-", f"{us:.2f}"))
    yield from _table(rows)
    for name, prediction in predictions.items():
        yield textwrap.indent(f"{name}: {prediction.report(3)}", "   ")
    if predictions:
        values = {
            name: {
                "cycles": round(each.cycles, 1),
                "us": round(each.us, 4),
                "warps": each.warps,
                "steps": each.steps,
                "source": "predicted",
            }
            for name, each in predictions.items()
        }
        text = json.dumps(values, indent=2) + "\n"
        (folder / "steptime.json").write_text(text, encoding="utf-8")
    else:
        yield "   no kernel has the loop over T: the host runs it"


def _name(plan: Plan, direction: str, plans: Sequence[Plan]) -> str:
    return f"{plan.layers}-layers-{direction}" if len(plans) > 1 else direction


def _folder_name(o: Namespace) -> str:
    products = f"-{o.precision}" if o.dtype == "fp32" else ""
    schedule = f"-{o.schedule}" if o.schedule else ""
    sizes = f"H{o.hidden}-B{o.batch}-D{o.directions}-L{o.layers}"
    return f"{o.cell}-{sizes}-{o.dtype}{products}-{o.arch}{schedule}"


def _dump(folder: Path, name: str, kernel: Any) -> None:
    """Writes every stage of a kernel: ``forward.ptx``, ``forward.cubin`` and so on."""
    sass = "".join(f"{one.address:#06x} {one}\n" for one in kernel.instructions)
    for stage, content in {**kernel.binary.asm, "sass": sass}.items():
        data = content if isinstance(content, bytes) else str(content).encode()
        (folder / f"{name}.{stage}").write_bytes(data)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield "   " + "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()
