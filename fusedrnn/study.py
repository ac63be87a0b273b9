"""``python -m fusedrnn study``: what a plan becomes, from its tiles to instructions, without a GPU.

For people who learn to write such kernels (``docs/kernels.md`` teaches how to read it). All it says
comes from the planner, the model and the compiler themselves; nothing is measured.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .kernels import plan as planning
from .kernels.assembly import (
    Instruction,
    count_kinds,
    dialect_of,
    longest_loop,
    read_assembly,
    tensor_names,
)
from .kernels.model import SPEEDS
from .kernels.occupancy import occupancy
from .kernels.plan import CHIPS, Chip, NoPlan, Plan, Problem
from .kernels.spec import SPECS

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
SCHEDULES = ("resident", "cooperative", "stepwise")  # in the order in which they are asked
PRECISIONS = ("tf32", "ieee", "tf32x3")
WIDTH = 100  # of a line of prose
#: Bytes. No GPU of the architectures in ``CHIPS`` is sold with more (MI325X: 256 GB).
LARGEST_MEMORY = 2**38
#: An exponential of a tile, in Triton's GPU dialect; and of a thread, in either assembly.
_EXP_TILE = re.compile(r"= math\.exp2? .*: tensor<((?:\d+x)+)f32,")
_EXP = re.compile(r"MUFU\.EX2\b|v_exp_f32")
#: The terms of the model, by what they are to a reader.
TERMS = {
    "products": "tensor core",
    "shared": "shared memory",
    "specials": "MUFU",
    "l2": "L2",
    "mma": "mma chain",
    "chain": "other chain",
    "sync": "sync hop",
}


class Refused(Exception):  # noqa: N818, it is an answer and no error
    """The command cannot do what it is asked; the message is the reason, in one sentence."""


class Part(NamedTuple):
    """One launch of a stack, and which layers run in it or, one after the other, in its likes."""

    layers: range
    problem: Problem
    plan: Plan


class Kernel(NamedTuple):
    """One compiled kernel of a part."""

    name: str  # of its row, and of its files
    part: Part
    direction: str
    compiled: Any  # offline.Compiled


def run(options: Namespace) -> Iterator[str]:
    """The report, paragraph by paragraph; the options are those of the command.

    Raises:
        Refused: no plan, no triton, or no folder for the files.
    """
    offline = _offline()
    chip = CHIPS[options.arch]
    problem = Problem(
        options.cell,
        options.input or options.hidden,
        options.hidden,
        options.batch,
        options.directions,
        DTYPES[options.dtype],
        options.precision,
        True,
        options.layers,
    )
    _check_memory(problem)
    try:
        parts = _parts(problem, chip, options.schedule)
    except NoPlan as reason:
        raise Refused(f"no plan: {reason}") from None
    folder = options.out or Path("study") / _folder_name(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made: {error.strerror}") from None
    yield _title(problem, chip, options)
    yield "\n".join(["1. Plan (kernels/plan.py)", *_plan_lines(parts, chip, offline, options)])
    kernels = [kernel for part in parts for kernel in _compile(part, len(parts), chip, offline)]
    yield "\n".join(["2. Resources, by the compiler", *_resource_lines(kernels, chip, offline)])
    mix = [*_mix_lines(kernels), *_specials_lines(kernels, chip)]
    yield "\n".join(["3. Instructions of one warp, as they stand", *mix])
    yield "\n".join(_floor_lines(parts, chip))
    names = [name for kernel in kernels for name in _dump(kernel, folder, offline)]
    yield "\n".join([f"5. Files in {folder}", *_wrapped(names)])


def _offline() -> Any:
    """The compiler.

    Raises:
        Refused: there is none.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no", "n"):
        raise Refused("TRITON_INTERPRET is set, under which Triton does not compile; unset it")
    try:
        from .kernels import offline
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise Refused("study compiles with Triton, which is not installed") from None
    return offline


def _check_memory(problem: Problem) -> None:
    """A plan for what no memory holds would be arithmetic about nothing.

    Raises:
        Refused: the weights, or the inputs and gates of one step, are larger than any memory.
    """
    p, itemsize = problem, problem.dtype.itemsize
    G, H, D = SPECS[p.cell].gates, p.hidden_size, p.directions
    widths = p.input_size + H + (p.layers - 1) * (D * H + H)
    for what, values in (
        ("weights", D * G * H * widths),
        ("inputs and gates of one step", p.batch * (p.input_size + p.layers * D * G * H)),
    ):
        if values * itemsize > LARGEST_MEMORY:
            raise Refused(
                f"no plan: the {what} alone are {values * itemsize / 2**30:,.0f} GiB, and no GPU "
                f"has more than {LARGEST_MEMORY >> 30}"
            )


def _parts(problem: Problem, chip: Chip, schedule: str | None) -> list[Part]:
    """The launches of the stack from the first layer up, like ones together."""
    width = problem.directions * problem.hidden_size
    above = problem._replace(input_size=width, layers=1)
    if schedule is None:
        plans = planning.plan_stack(problem, chip)
    else:
        choose = getattr(planning, schedule)
        one_launch = schedule == "cooperative" and problem.directions == 1
        each = [problem] if one_launch else [problem._replace(layers=1)]
        each += [above] * (0 if one_launch else problem.layers - 1)
        plans = tuple(choose(one, chip) for one in each)
    parts: list[Part] = []
    first = 0
    for plan in plans:
        layers = range(first, first + plan.layers)
        own = (above if first else problem)._replace(layers=plan.layers)
        # Kernels depend on I only where they project the input.
        if parts and parts[-1].plan == plan and (own == parts[-1].problem or not plan.i_blocks):
            first_of_them = parts.pop()
            layers, own = range(first_of_them.layers.start, layers.stop), first_of_them.problem
        parts.append(Part(layers, own, plan))
        first = layers.stop
    return parts


def _title(problem: Problem, chip: Chip, options: Namespace) -> str:
    p = problem
    products = f" as {p.precision}" if options.dtype == "fp32" else ""
    return (
        f"{p.cell}: I {p.input_size}, H {p.hidden_size}, B {p.batch}, D {p.directions}, "
        f"L {p.layers}, {options.dtype}{products}, for training on {chip.name}: {chip.sms} SMs, "
        f"{chip.shared_bytes:,} bytes\n"
        "of shared memory a program at most. Compiled for an absent GPU: nothing here is measured."
    )


def _heading(part: Part, several: bool) -> str:
    """Which layers, where there are several parts."""
    if not several:
        return ""
    first, last = part.layers.start, part.layers.stop - 1
    return f"layer {first}: " if first == last else f"layers {first} to {last}: "


def _plan_lines(parts: list[Part], chip: Chip, offline: Any, options: Namespace) -> Iterator[str]:
    for part in parts:
        plan, heading = part.plan, _heading(part, len(parts) > 1)
        why = "as --schedule says" if options.schedule else "the first that takes it"
        if plan.layers > 1 and not options.schedule:
            why = f"{plan.layers} layers in one launch, which the model finds fastest"
        if plan.schedule == "stepwise":
            form = f"CUDA graphs of {plan.graph_steps} steps" if plan.graph_steps else "no graphs"
            why += f"; a library GEMM for each product, {form}"
        elif plan.i_blocks:
            why += "; the input is projected in the kernel"
        else:
            why += "; the input is projected by one library GEMM before"
        yield f"   {heading}{plan.schedule}: {why}"
        rows = [
            ("", "rows", "units", "warps", "stages", "max regs", "programs", "rounds", "pieces")
        ]
        for direction, tiles in (("forward", plan.forward), ("backward", plan.backward)):
            assert tiles is not None
            grids = offline.grids(part.problem, plan, tiles)
            stages = offline.launch_options(tiles)["num_stages"]
            rows.append((
                direction, str(tiles.block_b), "+".join(str(width) for _, width in tiles.blocks),
                str(tiles.num_warps), str(stages), str(tiles.max_registers or "-"),
                str(max(map(math.prod, grids))), str(len(grids)),
                " + ".join(f"{n} x {width}" for _, n, width in tiles.k_chunks) or "-",
            ))  # fmt: skip
        yield from _table(rows)
        for schedule in SCHEDULES:
            if schedule != plan.schedule:
                text = f"   why not {schedule}: {_why_not(schedule, part, chip)}"
                yield textwrap.fill(text, WIDTH, subsequent_indent=" " * 6)


def _why_not(schedule: str, part: Part, chip: Chip) -> str:
    """In the planner's own words, or beside the modelled time of the plan that runs."""
    plan = part.plan
    try:
        other = getattr(planning, schedule)(part.problem, chip)
    except NoPlan as reason:
        return str(reason)
    launches = plan.layers // other.layers
    after = SCHEDULES.index(schedule) > SCHEDULES.index(plan.schedule)
    order = "it is asked later" if after else "it would take it, and is asked earlier"
    return (
        f"{order}; forward and backward of a step {launches * other.step:.2f} us, "
        f"this {plan.step:.2f} us (modelled)"
    )


def _compile(part: Part, of: int, chip: Chip, offline: Any) -> Iterator[Kernel]:
    for direction in ("forward", "backward"):
        launches = offline.launches_of(part.problem, part.plan)
        for launch in range(launches):
            layer = f"layer{part.layers.start}-" if of > 1 else ""
            number = f"-{launch}" if launches > 1 else ""
            compiled = offline.compile_kernel(part.problem, part.plan, chip, direction, launch)
            yield Kernel(f"{layer}{direction}{number}", part, direction, compiled)


def _resource_lines(kernels: list[Kernel], chip: Chip, offline: Any) -> Iterator[str]:
    rows = [("", "warps", "registers", "spilled", "shared", "programs an SM", "of them limited by",
             "grid", "programs", "SMs busy")]  # fmt: skip
    for name, part, _, compiled in kernels:
        usage, tiles = compiled.usage, compiled.tiles
        fits = occupancy(chip, usage.registers, compiled.shared_bytes, tiles.num_warps)
        grid = max(offline.grids(part.problem, part.plan, tiles), key=math.prod)
        programs = math.prod(grid)
        rows.append((
            name, str(tiles.num_warps), str(usage.registers), str(usage.spills),
            str(compiled.shared_bytes), f"{fits.programs} ({'/'.join(map(str, fits))})", fits.limit,
            " x ".join(map(str, grid)), str(programs), f"{min(programs, chip.sms)} of {chip.sms}",
        ))  # fmt: skip
    yield from _table(rows)
    unit = "registers" if chip.warp_size == 64 else "bytes"
    yield f"   registers: a thread; spilled: {unit} a thread; shared: bytes a program"
    yield "   programs an SM: at once (by registers / by shared memory / by threads alone)"
    if any(kernel.part.plan.schedule == "stepwise" for kernel in kernels):
        yield "   forward-0 runs before the first step, backward-0 after the last. The products"
        yield "   between them are library GEMMs, which are not compiled here"


def _mix_lines(kernels: list[Kernel]) -> Iterator[str]:
    """Of every kernel a column for the loop over T, if it has one, and one for the whole kernel."""
    columns: list[tuple[str, dict[str, int]]] = []
    named = []
    for name, part, _, compiled in kernels:
        dialect = dialect_of(compiled.disassembly)
        every, loop = _read(part, compiled)
        if loop:
            columns.append((f"{name}: loop", count_kinds(loop, dialect)))
        columns.append(("all" if loop else name, count_kinds(every, dialect)))
        if names := tensor_names(loop or every, dialect):
            listed = ", ".join(f"{n} {kind}" for kind, n in names.items())
            named.append(f"   {name}: {listed}")
    rows = [("", *(head for head, _ in columns))]
    for kind in columns[0][1]:
        rows.append((kind, *(str(counts[kind]) for _, counts in columns)))
    yield from _table(rows)
    if kernels[0].part.plan.schedule == "stepwise":
        yield "   no kernel has the loop over T: the host runs it"
    yield from named


def _read(part: Part, compiled: Any) -> tuple[Sequence[Instruction], Sequence[Instruction]]:
    """All instructions of a kernel, and those of the loop over T: none where the host runs it."""
    every = read_assembly(compiled.disassembly)
    return every, longest_loop(every) if part.plan.schedule != "stepwise" else ()


def _specials_lines(kernels: list[Kernel], chip: Chip) -> Iterator[str]:
    """Of each kernel that has activations: its MUFU of a step beside those of the floor."""
    for name, part, direction, compiled in kernels:
        every, loop = _read(part, compiled)
        found = count_kinds(loop or every, dialect_of(compiled.disassembly))["MUFU"]
        tiles = compiled.tiles
        threads = tiles.num_warps * chip.warp_size
        elements = tiles.block_b * sum(width for _, width in tiles.blocks)
        each = SPECS[part.problem.cell].specials[direction == "backward"]
        if not found or not each or part.problem.dtype.itemsize == 8:
            continue  # exponentials in fp64 are FMAs
        counted = elements * each / threads
        line = f"   {name}: {found} MUFU a thread and step"
        if found == counted:
            yield f"{line}, as the floor counts"
            continue
        line += f", the floor counts {counted:g}"
        copies = copies_of(compiled.binary.asm["ttgir"], every, threads)
        if copies is not None and copies > 1:
            line += f": each element is computed by {copies} threads"
        # What is left: the cell takes other operations than spec.py says.
        if copies is not None and found != counted * copies:
            line += f"{',' if copies > 1 else ':'} in {found * threads / elements / copies:g} "
            line += f"operations, not {each}"
        yield textwrap.fill(line, WIDTH, subsequent_indent=" " * 6)


def copies_of(ttgir: str, instructions: Sequence[Instruction], threads: int) -> int | None:
    """How many threads compute each element of the tiles that a kernel takes exponentials of.

    All exponentials that the threads take, by those that the tiles have: layouts may give one
    element to several threads, as where every warp has the sum of all pieces. None where there are
    none, or where the compiler made more or fewer of them and the quotient is not whole.
    """
    shapes = (shape.split("x")[:-1] for shape in _EXP_TILE.findall(ttgir))
    needed = sum(math.prod(map(int, shape)) for shape in shapes)
    taken = threads * sum(bool(_EXP.match(i.name)) for i in instructions)
    return taken // needed if needed and taken and taken % needed == 0 else None


def _floor_lines(parts: list[Part], chip: Chip) -> Iterator[str]:
    yield "4. Floor of one step in us (kernels/model.py): modelled, not measured"
    if chip.arch not in SPEEDS:
        yield f"   of {chip.arch} the model has no figures of its own: those of sm_90 stand in"
    for part in parts:
        heading = _heading(part, len(parts) > 1)
        if heading:
            yield f"   {heading.removesuffix(': ')}"
        rows = [("", *TERMS.values(), "a step", "binds")]
        for direction, floors in zip(("forward", "backward"), part.plan.floors, strict=True):
            terms = floors._asdict()
            assert terms.keys() == TERMS.keys()
            binds = TERMS[max(terms, key=terms.__getitem__)]
            values = (f"{value:.3f}" for value in (*terms.values(), floors.step))
            rows.append((direction, *values, binds))
        yield from _table(rows)
    yield "   a step: the largest of the first five, which overlap, plus other chain plus hop"
    if any(part.plan.schedule == "stepwise" for part in parts):
        yield "   of schedule stepwise the hop is the launches of a step"


def _folder_name(options: Namespace) -> str:
    products = f"-{options.precision}" if options.dtype == "fp32" else ""
    schedule = f"-{options.schedule}" if options.schedule else ""
    return (
        f"{options.cell}-I{options.input or options.hidden}-H{options.hidden}-B{options.batch}"
        f"-D{options.directions}-L{options.layers}-{options.dtype}{products}-{options.arch}"
        f"{schedule}"
    )


def _dump(kernel: Kernel, folder: Path, offline: Any) -> Iterator[str]:
    """Writes every stage of a kernel; the names of the files."""
    stages = kernel.compiled.binary.asm
    written = {stage: stages[stage] for stage in offline.STAGES if stage in stages}
    if "cubin" in stages:
        written["sass"] = kernel.compiled.disassembly
    for stage, text in written.items():
        (folder / f"{kernel.name}.{stage}").write_text(str(text), encoding="utf-8")
    for stage in ("cubin", "hsaco"):
        if stage in stages:
            (folder / f"{kernel.name}.{stage}").write_bytes(stages[stage])
            written[stage] = ""
    yield from (f"{kernel.name}.{stage}" for stage in written)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield "   " + "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()


def _wrapped(names: list[str]) -> Iterator[str]:
    """The files of one kernel a line."""
    stems = dict.fromkeys(name.partition(".")[0] for name in names)
    for stem in stems:
        own = [name for name in names if name.partition(".")[0] == stem]
        yield "   " + " ".join(own)
