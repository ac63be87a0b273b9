"""The kernels to compile, and what must hold of each binary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch

from fusedrnn.kernels.compile import count_kinds
from fusedrnn.kernels.plan import CHIPS, Chip, NoPlan, Plan, Problem, cooperative, plan
from fusedrnn.kernels.sass import trace
from fusedrnn.kernels.spec import SPECS

MOST_SPILLED = 64  # bytes of a thread
MOST_SPILLED_BEFORE = 256  # of a cooperative kernel, all while W_hh is loaded, before its loop
COMPILED_CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = ((BF16, "ieee"), (FP16, "ieee"), (FP32, "tf32"), (FP32, "tf32x3"), (FP32, "ieee"))
MANY = 2000  # sequences, for which a program of schedule resident has 16 rows


class Job(NamedTuple):
    """A plan whose kernels are compiled."""

    problem: Problem
    chip: str

    @property
    def plan(self) -> Plan:
        """One launch of all the problem's layers."""
        choose = cooperative if self.problem.layers > 1 else plan
        return choose(self.problem, CHIPS[self.chip])


def job(
    cell: str, H: int, dtype: torch.dtype = BF16, precision: str = "ieee", chip: str = "sm_90",
    *, B: int = 16, D: int = 1, **options: Any,
) -> Job:  # fmt: skip
    problem = Problem(cell, H, B, D, dtype, precision, options.pop("needs_grad", True), **options)
    return Job(problem, chip)


def covering() -> list[Job]:
    """About 60 kernels: every schedule, cell, kind of product, form of rows, direction and chip."""
    return [
        # resident_nvidia, and resident for other products
        job("lstm", 128),
        job("lstm", 128, B=MANY, needs_grad=False),
        job("lstm", 128, FP16, chip="sm_100", ragged=True),
        job("lstm", 64, FP32, "tf32", "sm_80", D=2, ragged=True),
        job("lstm", 64, FP32, "tf32x3"),
        job("lstm", 64, FP32, "ieee", ragged=True),
        job("gru", 128, FP16, D=2, ragged=True, B=MANY),
        job("gru", 64, FP32, "tf32", "sm_100"),
        job("lstm", 128, FP16, chip="sm_80"),
        job("gru_reset_before", 96),
        job("gru_reset_before", 64, FP32, "tf32", ragged=True),
        job("rnn_tanh", 256, ragged=True),
        job("rnn_relu", 128, FP32, "tf32", "sm_80"),
        job("rnn_relu", 16, FP16),
        job("lstm", 32, FP32, "tf32", "sm_86"),
        job("lstm", 128, FP16, chip="sm_86"),
        job("gru", 128, chip="sm_89"),
        job("lstm", 100, FP16, chip="sm_120", ragged=True),
        # cooperative
        job("lstm", 512),
        job("lstm", 512, FP16, ragged=True),
        job("lstm", 512, FP32, "tf32"),
        job("lstm", 1024, chip="sm_100"),
        job("lstm", 256, layers=2),
        job("lstm", 200, FP32, "tf32", "sm_80", ragged=True),
        job("gru", 512, B=128),
        job("gru", 1024, D=2),
        job("gru", 256, FP32, "tf32", layers=3),
        job("gru", 256, chip="sm_80", ragged=True, D=2),
        job("gru_reset_before", 256),
        job("rnn_tanh", 1024, needs_grad=False),
        job("rnn_relu", 512, FP32, "tf32", "sm_100"),
        job("lstm", 512, chip="sm_89"),
        # half of the weights in shared memory
        job("lstm", 2048),
        job("lstm", 1024, FP32, "tf32", ragged=True),
        job("gru", 1280, chip="sm_86"),
        job("gru", 256, FP32, "tf32", "sm_120"),
        # stepwise
        job("lstm", 48, FP64, D=2),
        job("gru_reset_before", 4096, ragged=True),
    ]


def every_job(chip: str) -> Iterator[Job]:
    """One problem for each different plan that the planner has for a chip."""
    seen = set()
    for problem in _problems(CHIPS[chip]):
        found = Job(problem, chip)
        try:
            chosen = found.plan
        except NoPlan:
            continue
        sides = chosen.forward, chosen.backward
        tiles = tuple(side and replace(side, at_once=1, shared_bytes=0) for side in sides)
        if chosen.schedule == "stepwise" and problem.precision != "ieee":
            continue  # a larger H of tf32 or tf32x3
        # A binary depends on H only by masks and strides, where it is not a tile's width.
        key = *problem._replace(hidden_size=0, batch=0), tiles
        if chosen.layers == problem.layers and key not in seen:
            seen.add(key)
            yield found


def _problems(chip: Chip) -> Iterator[Problem]:
    """Every cell and kind, with the sizes at which plans change."""
    many = 8 * chip.sms + 1
    for cell, (dtype, precision), ragged in product(SPECS, KINDS, (False, True)):
        if dtype == FP16 and cell != "lstm":  # as bf16
            continue
        for H, B in product((256, 128, 64, 32, 16), (8, many)):
            yield Problem(cell, H, B, 2, dtype, precision, True, ragged=ragged)
        for H in (256, 1024):
            yield Problem(cell, H, 16, 1, dtype, precision, False, ragged=ragged)
        similar = cell in ("gru_reset_before", "rnn_relu")  # differ from the others in a few lines
        for H in (256, 512) if similar else (2048, 1536, 1024, 768, 512, 256, 200):
            for B, (D, L) in product((16, 128), ((1, 1), (2, 1), (1, 2))):
                if (D, L) == (1, 1) or H <= 512:
                    yield Problem(cell, H, B, D, dtype, precision, True, L, ragged)
    for cell, ragged, dtype in product(SPECS, (False, True), (FP64, FP32, BF16)):
        yield Problem(cell, 48 if dtype == FP64 else 4096, 8, 2, dtype, "ieee", True, ragged=ragged)


def faults(found: Job, kernel: Any) -> list[str]:
    """The faults of a kernel of a job, in words."""
    chip, chosen = CHIPS[found.chip], found.plan
    allowed, asm = min(chip.shared_bytes, kernel.tiles.shared_bytes), kernel.binary.asm
    wrong = []
    if kernel.spills > (MOST_SPILLED if chosen.schedule != "cooperative" else MOST_SPILLED_BEFORE):
        wrong.append(f"{kernel.spills} bytes spilled")
    if kernel.shared_bytes > allowed:
        wrong.append(f"{kernel.shared_bytes} bytes shared, {allowed} allowed")
    if chosen.schedule == "resident_nvidia":
        return wrong + list(_gluon_faults(found.problem, kernel))
    if chosen.schedule == "cooperative":
        return wrong + list(exchange_faults(found.problem, kernel))
    if narrow := _narrow_rows(asm["ttir"], kernel.tiles.block_b):
        wrong.append(f"{narrow} row offsets of 32 bits")
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
    if kernel.spills > 16 * problem.ragged:
        yield f"{kernel.spills} bytes spilled"
    if turn["barrier"] != 2 * len(problem.spec.phases):
        yield f"{turn['barrier']} barriers in two steps"
    if turn["tensor core"] < 2 * problem.spec.gates:
        yield "no tensor-core instruction"
    if turn["shuffle"]:
        yield "values move between threads"


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
    if not exchanged or not all(names[n] == "LDG.E.128.STRONG.GPU" for n in exchanged):
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


def _narrow_rows(ttir: str, block_b: int) -> int:
    """Row pointers that are moved by 32-bit offsets, which overflow at 2**31 elements.

    Counted for 8 rows: no block of columns, whose offsets are small, is 8 wide.
    """
    narrow = r"tt\.addptr [^,]+, (?!%cst)\S+ : tensor<8x!tt\.ptr<\w+>>, tensor<8xi32>"
    return len(re.findall(narrow, ttir)) if block_b == 8 else 0
