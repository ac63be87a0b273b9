"""Compiles the kernels that a plan launches, for a GPU that is absent, and reads their binaries.

The schedule's own launcher is called, with tensors on the device "meta", which have no memory. Up
to the launch Triton does what it does on a GPU; a stand-in for its driver names the chip. Triton
does not compile under ``TRITON_INTERPRET``.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from . import steptime
from .latencies import TIMINGS
from .problem import Chip, Plan, Problem, Tiles
from .rows import Rows
from .sass import Instruction, read_listing, run_tool, trace
from .tensors import Grads, Layers


@dataclass(eq=False)
class Kernel:
    """One compiled kernel of a plan."""

    direction: str  # "forward" or "backward"
    tiles: Tiles
    grid: tuple[int, ...]  # of its first launch
    binary: Any  # triton's CompiledKernel
    steps: int = 1  # in one turn of the loop over time
    launches: int = 1  # of a call with T = 1: more for batch tiles that do not fit at once

    def __post_init__(self) -> None:
        listing = run_tool(self.binary.asm["cubin"], "cuobjdump", "-res-usage")
        usage = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
        self.registers = usage["REG"]  # of a thread
        self.spills = usage["STACK"] + usage["LOCAL"]  # bytes of a thread in local memory
        self.shared_bytes: int = self.binary.metadata.shared  # of a program

    @cached_property
    def instructions(self) -> list[Instruction]:
        """All instructions, each once, however often it runs."""
        return read_listing(run_tool(self.binary.asm["cubin"], "nvdisasm", "-c", "-hex", "-g"))

    @cached_property
    def turn(self) -> list[Instruction]:
        """One turn of the loop over time; empty where the host has the loop."""
        return trace(self.instructions)

    def predict(self, arch: str) -> steptime.Prediction:
        """Predicts a step of a kernel that has the loop over time."""
        return steptime.predict(self.turn, TIMINGS[arch], self.tiles.num_warps, self.steps)


def compile_plan(
    problem: Problem, plan: Plan, chip: Chip, directions: Sequence[str] = ("forward", "backward")
) -> list[Kernel]:
    """Compiles the different kernels of one call: one a direction, in schedule stepwise several.

    For ragged rows it takes packed ones, and for several layers dropout masks, which need most.
    """
    layers, grads, rows = _tensors(problem, plan)
    found = []
    for direction in directions:
        tiles = getattr(plan, direction)
        if tiles is None:
            continue
        module = import_module(f".{plan.schedule}", __package__)
        gx, others = (layers.gx, ()) if direction == "forward" else (None, (grads,))
        given = layers.read(plan.layers, *layers[-2:], gx), *others
        with recording(chip) as launches:
            getattr(module, direction)(problem.cell, plan, *given, rows)
        grids, steps = dict(reversed(launches)), getattr(module, "STEPS", 1)
        for binary, count in Counter(binary for binary, _ in launches).items():
            found.append(Kernel(direction, tiles, grids[binary], binary, steps, count))
    return found


@contextmanager
def recording(chip: Chip) -> Iterator[list[tuple[Any, tuple]]]:
    """Within the context kernels are compiled, and listed with their grids instead of launched."""
    launches: list[tuple[Any, tuple]] = []
    capability, run = int(chip.arch.removeprefix("sm_")), JITFunction.run

    def compiled(*args: Any, grid: tuple, **options: Any) -> None:
        launches.append((run(*args, grid=grid, **options | {"warmup": True}), grid))

    absent = SimpleNamespace(  # a driver, before it loads a binary
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # Triton keeps the binaries of each apart
        get_current_stream=lambda device: 0,
    )
    with patch.object(JITFunction, "run", compiled), patch.object(driver, "_active", absent):
        yield launches


def _tensors(problem: Problem, plan: Plan) -> tuple[Layers, Grads, Rows]:
    """The arguments of a launcher for T = 1, without memory."""
    p, spec, B, H, D = problem, problem.spec, problem.batch, problem.hidden_size, problem.directions
    Z, G = plan.layers * D, spec.gates

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    origins, starts = empty(D, 1, B, dtype=torch.int32), empty(1, dtype=torch.int32)
    rows = Rows(1, B, *((origins, torch.tensor([B]), starts) if p.ragged else ()))
    h, y = empty(Z, B, H), empty(B, D * H)
    c, bias = h if spec.states == 2 else None, (empty(G * H),) * Z
    gates = empty(Z, B, spec.saved * H) if spec.saved and p.needs_grad else None
    layers = Layers(
        empty(D, B, G * H), (empty(G * H, D * H),) * Z, bias, (empty(G * H, H),) * Z, bias,
        (y,) * Z if plan.layers > 1 else None, h, c, h, c, (y,) * Z, gates,
        c if p.needs_grad else None, rows.origins, rows.starts,
    )  # fmt: skip
    return layers, Grads(y, None, h, c, empty(Z, B, spec.grad_tiles * H), h, c), rows
