"""The kernels to compile, and what must hold of each binary."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, cycle, product
from typing import Any, NamedTuple

import torch

from fusedrnn.kernels.plan import CHIPS, Plan, Problem, plan_stack
from fusedrnn.kernels.sass import count_kinds, trace
from fusedrnn.kernels.spec import SPECS

MOST_SPILLED = 64  # bytes of a thread, but none in schedule resident_nvidia
#: A ragged step's predicted cycles: so many times a dense one's, and for its loads so many more.
MOST_RAGGED = 1.15, 160
COMPILED_CHIPS = ("sm_90", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PRODUCTS = ((BF16, "ieee"), (FP16, "ieee"), (FP64, "ieee"))
PRODUCTS += ((FP32, "tf32"), (FP32, "tf32x3"), (FP32, "ieee"))
#: The largest first: of jobs with the same traits it is taken, and it needs most registers.
SIZES = (4096, 2048, 1536, 1216, 1024, 768, 512, 256, 128, 64, 32, 16)
PADDED = (3000, 1000, 500, 200, 100, 50, 25, 12, 1)
#: The last one fills an SM twice: programs of schedule resident_nvidia have 16 rows.
BATCHES = (16, 8, 128, 3000)


class Job(NamedTuple):
    """A plan whose kernels are compiled, of one launch of all the problem's layers."""

    problem: Problem
    chip: str
    plan: Plan

    @property
    def traits(self) -> tuple[str, ...]:
        """The schedule, and everything else that makes another binary; the first four are SHAPE."""
        p, tiles, schedule = self.problem, self.plan.forward, self.plan.schedule
        products, rows = f"{p.dtype} {p.precision}", f"{tiles.block_b} rows"
        if schedule == "stepwise":  # whose products are torch's; rows follow from H
            products, rows = str(p.dtype), ""
        return (
            schedule,
            p.cell,
            products,
            "ragged" if p.ragged else "dense",
            "padded" if p.hidden_size % 16 else "whole",
            f"D = {p.directions}",
            f"L = {p.layers}",
            "training" if p.needs_grad else "inference",
            rows,
            "halved" if tiles.halved else "in registers",
        )


SHAPE = 4  # the first traits: schedule, cell, products, form of rows


def job_of(problem: Problem, chip: str = "sm_90") -> Job | None:
    """Returns the job of a problem; None where its layers share no launch."""
    chosen, *_ = plan_stack(problem, CHIPS[chip])
    return Job(problem, chip, chosen) if chosen.layers == problem.layers else None


@cache
def candidates(chip: str) -> list[Job]:
    """Problems of every cell, kind of product and form of rows, at sizes where plans change."""
    sizes = product(SIZES + PADDED, SPECS, PRODUCTS, (False, True), BATCHES)
    variants = list(product((True, False), (1, 2), (2, 1)))
    found = (
        job_of(Problem(cell, H, B, D, dtype, precision, needs_grad, L, ragged), chip)
        for H, cell, (dtype, precision), ragged, B in sizes
        for needs_grad, L, D in variants
        if D == 1 or L == 1
    )
    return [each for each in found if each]


def combined(traits: Iterable[str], count: int) -> set[tuple[str, ...]]:
    """The combinations of so many traits, each beside the schedule."""
    schedule, *others = traits
    return {(schedule, *some) for some in combinations(others, count)}


def cover(chip: str, count: int, of: int | None = None) -> list[Job]:
    """Chooses jobs until every trait occurs, and ``count`` of the first ``of`` traits together."""
    jobs: dict[tuple, Job] = {}
    for each in candidates(chip):
        jobs.setdefault(each.traits, each)
    goals = {t: combined(t, 1) | combined(t[:of], count) for t in jobs}
    left, chosen = set().union(*goals.values()), []
    while left:
        best = max(goals, key=lambda traits: len(goals[traits] & left))
        left -= goals.pop(best)
        chosen.append(jobs[best])
    return chosen


def covering() -> list[Job]:
    """The jobs of `make test`: each trait beside each schedule, half on other chips."""
    chips, found = cycle(COMPILED_CHIPS[1:]), []
    for number, each in enumerate(cover("sm_90", 1)):
        moved = job_of(each.problem, next(chips)) if number % 2 else None
        found.append(moved if moved and moved.traits == each.traits else each)
    return found


def every_plan(chip: str = "sm_90") -> list[Job]:
    """The jobs of `make test-all` for one chip: the planner's tiles, and the triples of SHAPE.

    fp16, rnn_relu, padded and inference are in the triples and pairs alone, and so are both
    directions of a layer whose programs do not wait for each other.
    """
    found = dict.fromkeys([*cover(chip, 3, SHAPE), *cover(chip, 2)])
    seen = set()
    for each in candidates(chip):
        p, chosen = each.problem, each.plan
        sides = chosen.forward, chosen.backward
        tiles = tuple(side and replace(side, at_once=1, shared_bytes=0) for side in sides)
        D = p.directions if chosen.schedule == "cooperative" else 0
        key = chosen.schedule, *p._replace(hidden_size=0, batch=0, directions=D), tiles
        plain = p.dtype != FP16 and p.cell != "rnn_relu" and p.hidden_size in SIZES
        if plain and p.needs_grad and key not in seen:
            seen.add(key)
            found[each] = None
    return list(found)


def faults(found: Job, kernel: Any, ragged: float = 0.0, dense: float = 0.0) -> list[str]:
    """The faults of a kernel of a job, in words, given cycles of its steps and of dense ones."""
    chip, chosen = CHIPS[found.chip], found.plan
    allowed, asm = min(chip.shared_bytes, kernel.tiles.shared_bytes), kernel.binary.asm
    wrong = []
    if kernel.spills > (0 if chosen.schedule == "resident_nvidia" else MOST_SPILLED):
        wrong.append(f"{kernel.spills} bytes spilled")
    if kernel.shared_bytes > allowed:
        wrong.append(f"{kernel.shared_bytes} bytes shared, {allowed} allowed")
    if ragged > MOST_RAGGED[0] * dense + MOST_RAGGED[1]:
        wrong.append(f"a ragged step takes {ragged:.0f} cycles, a dense one {dense:.0f}")
    if chosen.schedule == "resident_nvidia":
        return wrong + list(_gluon_faults(found.problem, kernel))
    if chosen.schedule == "cooperative":
        return wrong + list(exchange_faults(found.problem, kernel))
    if narrow := _narrow_pointers(asm["ttir"]):
        wrong.append(f"{narrow} pointers moved by 32 bits")
    if chosen.schedule == "stepwise":  # its products are torch.mm
        return wrong
    if "scf.for" not in asm["ttgir"]:
        wrong.append("no loop over T: it is a constant")
    kind = found.problem.kind(chip)
    if kind != "ieee" and not re.search(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)", asm["ptx"]):
        wrong.append("no tensor-core instruction")
    return wrong


def _gluon_faults(problem: Problem, kernel: Any) -> Iterator[str]:
    """Two steps a turn with a barrier for each product, and nothing moved between layouts."""
    turn = count_kinds(trace(kernel.instructions))
    if turn["barrier"] != 2 * len(problem.spec.phases):
        yield f"{turn['barrier']} barriers in two steps"
    if turn["tensor core"] < 2 * problem.spec.gates:
        yield "no tensor-core instruction"
    if turn["shuffle"]:
        yield "values move between threads"
    if "min.f32" in kernel.binary.asm["ptx"]:
        yield "a minimum drops NaN"


def exchange_faults(problem: Problem, kernel: Any) -> Iterator[str]:
    """Three barriers for each product of a step: of the sums, the publication and the wait.

    Orders are those of ``docs/kernels.md``: data is stored, the barrier passed, then the counter
    released; the counter is acquired, the barrier passed, then data loaded, past L1.
    """
    names = [one.name for one in trace(kernel.instructions)]
    phases, waits_below = len(problem.spec.phases), problem.layers > 1
    barriers = sum(name.startswith("BAR") for name in names)
    if barriers > 3 * phases + waits_below:
        yield f"{barriers} barriers in a step"
    if any(name.startswith(("LDL", "STL")) for name in names):
        yield "registers are spilled in the loop"
    if not any("MMA" in name for name in names):
        yield "no tensor-core instruction"
    if any(name.startswith(("SHFL", "MOVM")) for name in names):
        yield "values move between threads"
    exchanged = [n for n, name in enumerate(names) if re.match(r"LDG\.E\.\d+\.STRONG\.GPU", name)]
    polls = [n for n, name in enumerate(names) if name == "LDG.E.STRONG.GPU"]
    wide = [n for n in exchanged if names[n] == "LDG.E.128.STRONG.GPU"]
    # Slots are padded to 16 bytes; the rows of the layer below (backward: above) are not.
    is_even = problem.hidden_size * problem.dtype.itemsize % 16 == 0 or not waits_below
    if not wide or (is_even and wide != exchanged):
        yield "exchanged data is not loaded 16 bytes at a time"
    if not polls or (exchanged and exchanged[0] < polls[0]):
        yield "exchanged data is loaded before the wait"
    for begin, end in zip(polls, [*polls[1:], len(names)], strict=True):
        loads = [n for n in exchanged if begin < n < end]
        products = [n for n in range(begin, end) if "MMA" in names[n]]
        if loads and sum(n < products[0] for n in loads) < min(4, len(loads) // 2):
            yield "loads wait for products"
    yield from _order_faults(kernel.binary.asm["ptx"])
    if "__assertfail" not in kernel.binary.asm["ptx"]:
        yield "a wait has no limit"
    if not kernel.binary.metadata.launch_cooperative_grid:
        yield "programs that wait for each other are not launched at once"


def _order_faults(ptx: str) -> Iterator[str]:
    """A barrier stands between memory and the counter, on both sides of the exchange."""
    memory = r"(ld\.global(?:\.cg)?|st\.global|bar\.sync|ld\.acquire\.gpu|red\.release\.gpu)"
    found = re.findall(rf"^\s*(?:@\S+\s+)?{memory}", ptx, re.MULTILINE)
    for before, one, after in zip(found, found[1:], found[2:], strict=False):
        if one == "red.release.gpu" and before != "bar.sync":
            yield f"the counter is released after {before}"
        if one == "ld.acquire.gpu" and after != "bar.sync":
            yield f"the counter is acquired before {after}"
    for kind in ("red.release.gpu", "ld.acquire.gpu"):
        if kind not in found:
            yield f"no {kind}"


def _narrow_pointers(ttir: str) -> int:
    """Pointers that are moved by a number of 32 bits, which overflows at 2**31 elements.

    Inside a tile such offsets are small.
    """
    return len(re.findall(r"tt\.addptr [^,]+, (?!%c\d)\S+ : !tt\.ptr<(?!i8)\w+>, i32", ttir))
