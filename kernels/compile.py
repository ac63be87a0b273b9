"""Compiles the kernels that a plan launches, for a GPU that is absent, and reads their binaries.

The schedule's own launcher is called, with tensors on the device "meta", which have no memory. Up
to the launch Triton does what it does on a GPU; a stand-in for its driver names the chip. Triton
does not compile under ``TRITON_INTERPRET``.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import steptime
from .latencies import timings
from .problem import Chip, Plan, Problem, Tiles
from .rows import Rows
from .sass import Instruction, loops, read, run_tool, trace
from .tensors import Grads, Layers

#: Kinds of instructions and what their names begin with; the first that fits counts.
KINDS = {
    "tensor core": r"[HIDBQO]G?MMA\b|UTC\w*MMA",
    "MUFU": r"MUFU\b",
    "shared load": r"LDSM?\b",
    "shared store": r"STSM?\b|ATOMS\b",
    "global load": r"LDG(?:STS)?\b|LD\b|UBLKCP\b|UTMALDG",
    "global store": r"STG\b|ST\b|UTMASTG",
    "global atomic": r"ATOMG?\b|REDG?\b",
    "barrier": r"BAR\b|B2R\b|SYNCS\b|UCGABAR|WARPGROUP\b",
    "fence": r"MEMBAR\b|CCTL\b|C?G?A?ERRBAR\b|FENCE\b",
    "shuffle": r"SHFL\b|MOVM\b|REDUX\b",
    "spill": r"LDL\b|STL\b",
    "FMA unit": r"[FD](?:FMA|ADD|MUL)\w*\b|HFMA2|HADD2|HMUL2",
}


class Kernel:
    """One compiled kernel of a plan."""

    def __init__(
        self, direction: str, tiles: Tiles, grid: tuple[int, ...], binary: Any, steps: int = 1
    ):
        self.direction = direction  # "forward" or "backward"
        self.tiles = tiles
        self.grid = grid  # of its first launch
        self.steps = steps  # in one turn of the loop over time
        self.launches = 1  # of a call with T = 1: more for batch tiles that do not fit at once
        self.binary = binary  # triton's CompiledKernel
        self.shared_bytes: int = binary.metadata.shared

    @cached_property
    def _usage(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            listing = run_tool("cuobjdump", "-res-usage", file.name)
        return {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}

    @property
    def registers(self) -> int:
        """The registers of a thread."""
        return self._usage["REG"]

    @property
    def spills(self) -> int:
        """The bytes of a thread in local memory."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @cached_property
    def instructions(self) -> list[Instruction]:
        """All instructions, each once, however often it runs."""
        return read(self.binary.asm["cubin"])

    @cached_property
    def turn(self) -> list[Instruction]:
        """One turn of the loop over time; empty where the host has the loop."""
        return trace(self.instructions) if loops(self.instructions) else []

    def predict(self, arch: str) -> steptime.Prediction:
        """Predicts a step of a kernel that has the loop over time."""
        return steptime.predict(self.turn, timings(arch), self.tiles.num_warps, self.steps)


def compile_plan(
    problem: Problem, plan: Plan, chip: Chip, directions: Sequence[str] = ("forward", "backward")
) -> list[Kernel]:
    """Compiles the different kernels of one call: one a direction, in schedule stepwise several.

    For ragged rows it takes packed ones, and for several layers dropout masks, which need most.
    """
    layers, grads, rows = _tensors(problem, plan)
    found: dict[int, Kernel] = {}
    for direction in directions:
        tiles = plan.forward if direction == "forward" else plan.backward
        assert tiles is not None, "the plan has no backward"
        module = import_module(f".{plan.module(direction)}", __package__)
        steps = getattr(module, "STEPS", 1)

        def record(
            binary: Any,
            grid: tuple,
            direction: str = direction,
            tiles: Tiles = tiles,
            steps: int = steps,
        ) -> None:
            if id(binary) in found:
                found[id(binary)].launches += 1
            else:
                found[id(binary)] = Kernel(direction, tiles, grid, binary, steps)

        given = (layers,) if direction == "forward" else (layers, grads)
        with recording(module, chip, record):
            getattr(module, direction)(problem.cell, plan, *given, rows)
    return list(found.values())


class _Driver:
    """The part of a driver that Triton calls before it loads a binary."""

    def __init__(self, arch: str):
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps the binaries of each device apart

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(module: Any, chip: Chip, record: Callable[[Any, tuple], None]) -> Iterator[None]:
    """Within the context the module's kernels are compiled, and recorded instead of launched."""
    kernels = [k for name, k in vars(module).items() if name.endswith("_kernel")]

    def compiler(run: Callable) -> Callable:
        return lambda *args, grid, **kwargs: record(
            run(*args, grid=grid, **kwargs | {"warmup": True}), grid
        )

    for kernel in kernels:
        kernel.run = compiler(kernel.run)
    driver = triton.runtime.driver
    before = driver._active  # None until the first launch
    driver.set_active(_Driver(chip.arch))
    try:
        yield
    finally:
        driver._active = before
        for kernel in kernels:
            del kernel.run


def _tensors(problem: Problem, plan: Plan) -> tuple[Layers, Grads, Rows]:
    """The arguments of a launcher for T = 1, without memory."""
    p, spec, B, H, D = problem, problem.spec, problem.batch, problem.hidden_size, problem.directions
    Z, G = plan.layers * D, spec.gates

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def c(*shape: int) -> torch.Tensor | None:
        return empty(*shape) if spec.states == 2 else None

    rows = Rows(1, B)
    if p.ragged:
        origins, starts = empty(D, 1, B, dtype=torch.int8), empty(1, dtype=torch.int64)
        rows = Rows(1, B, origins, torch.tensor([B]), starts)
    wide, bias = (empty(G * H, D * H),) * Z, (empty(G * H),) * Z
    layers = Layers(
        empty(D, B, G * H), wide, bias, (empty(G * H, H),) * Z, bias,
        (empty(B, D * H),) * Z if plan.layers > 1 else None,
        empty(Z, B, H), c(Z, B, H), empty(Z, B, H), c(Z, B, H), (empty(B, D * H),) * Z,
        empty(Z, B, spec.saved * H) if spec.saved and p.needs_grad else None,
        c(Z, B, H) if p.needs_grad else None, rows.origins, rows.starts,
    )  # fmt: skip
    grads = Grads(
        empty(B, D * H), None, empty(Z, B, H), c(Z, B, H), empty(Z, B, spec.grad_tiles * H),
        empty(Z, B, H), c(Z, B, H),
    )  # fmt: skip
    return layers, grads, rows


def count_kinds(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Counts the instructions of each kind, of no kind ("other"), and all ("total")."""
    counts = dict.fromkeys((*KINDS, "other"), 0)
    for instruction in instructions:
        of = (kind for kind, names in KINDS.items() if re.match(names, instruction.name))
        counts[next(of, "other")] += 1
    return counts | {"total": len(instructions)}
