"""Compiles a plan's kernels for a GPU that is not there, and reads what their binaries need.

For tests, which compile every plan, and for ``python -m fusedrnn study``. Triton compiles for a
named target without a device; it does not under ``TRITON_INTERPRET``, where a kernel is no kernel.
The signature is what the launchers pass: 16-byte aligned pointers, and run-time sizes as i32.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .assembly import longest_loop, read_assembly
from .launch import cooperative_options, launch_options, rounds
from .model import batch_tiles
from .plan import Chip, Plan, Problem, Tiles, stepwise_tiles
from .rows import Rows
from .spec import SPECS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
#: What schedule stepwise carries in fp32 where the tensors have 16 bits.
CARRIED = ("h_ptr", "c_ptr", "d_h_ptr", "d_c_ptr")
INTEGERS = {"counters_ptr": "*i32", "origins_ptr": "*i8", "starts_ptr": "*i64"}
#: The stages of a compilation that are text, in their order, as Triton names them.
STAGES = ("ttir", "ttgir", "llir", "ptx", "amdgcn")


class Usage(NamedTuple):
    """What a binary needs of its chip."""

    registers: int  # 32-bit ones a thread; on AMD with accumulation registers
    spills: int  # bytes a thread in local memory; on AMD registers


class Compiled(NamedTuple):
    """One kernel as the compiler leaves it."""

    binary: Any  # triton's CompiledKernel
    tiles: Tiles
    options: dict[str, Any]  # for compiler and launch
    usage: Usage
    disassembly: str  # SASS, or the AMDGCN that was assembled

    @property
    def shared_bytes(self) -> int:
        """Of one program, as the launch asks for it."""
        return self.binary.metadata.shared


def launches_of(problem: Problem, chosen: Plan) -> int:
    """How many different kernels a step of a direction launches; in schedule stepwise one more
    than there are products, for the first of all or the last."""
    return 1 + len(SPECS[problem.cell].phases) if chosen.schedule == "stepwise" else 1


def grids(problem: Problem, chosen: Plan, tiles: Tiles) -> list[tuple[int, ...]]:
    """The grids of one call of a kernel, one after the other: several only in rounds."""
    from . import resident, stepwise_launch

    B, H, D = problem.batch, problem.hidden_size, problem.directions
    if chosen.schedule == "resident":
        return [resident.grid(D, B, tiles, problem.members)]
    if chosen.schedule == "stepwise":
        return [stepwise_launch.grid(D, B, H, tiles)]
    count = batch_tiles(B, tiles.block_b, problem.members)
    return [grid for grid, _ in rounds(tiles, count, H, D * chosen.layers)]


def compile_kernel(
    problem: Problem, chosen: Plan, chip: Chip, direction: str, launch: int = 0
) -> Compiled:
    """Compiles the kernel of a direction, "forward" or "backward", of a plan for training.

    launch: which of ``launches_of``. For ragged rows it takes packed ones, which need most.
    """
    forward = direction == "forward"
    if chosen.schedule == "stepwise":
        kernel, tiles, constants, options = _stepwise_kernel_of(problem, forward, launch)
    else:
        kernel, tiles, constants, options = _kernel_of(problem, chosen, forward)
    constants["aux_ptr"] = None
    if not problem.ragged:
        constants |= {"origins_ptr": None, "starts_ptr": None}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    aligned = [["tt.divisibility", 16]]  # as torch's allocations are
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = INTEGERS[name]
        elif name.endswith("_ptrs"):
            count = problem.directions * chosen.layers
            signature[name] = (POINTERS[problem.dtype],) * count
            attributes.update({(index, each): aligned for each in range(count)})
        elif name.endswith("_ptr"):
            carried = chosen.schedule == "stepwise" and name in CARRIED
            wide = carried and problem.dtype.itemsize < 4
            signature[name] = POINTERS[torch.float32 if wide else problem.dtype]
            attributes[(index,)] = aligned
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGETS[chip.arch], options=options)
    usage, disassembly = read(binary)
    return Compiled(binary, tiles, options, usage, disassembly)


def _kernel_of(problem: Problem, chosen: Plan, forward: bool) -> tuple[Any, Tiles, dict, dict]:
    """The kernel of a plan, its tiles, constants and launch options."""
    from . import cooperative as together
    from . import cooperative_launch, resident

    rows = _rows_of(problem)
    cell, I, H, D = problem.cell, problem.input_size, problem.hidden_size, problem.directions
    tiles, L = chosen.forward if forward else chosen.backward, chosen.layers
    assert tiles is not None, "the plan has no backward"
    with_d_cs = False  # of module.states() alone
    saved = 2 * problem.needs_grad
    if chosen.schedule == "cooperative":
        options, mask = cooperative_options(tiles), L > 1
        if forward:
            constants = cooperative_launch.fwd_constants(
                cell, chosen, L, D, H, True, mask, saved, rows
            )
            return together._cooperative_fwd_kernel, tiles, constants, options
        constants = cooperative_launch.bwd_constants(
            cell, chosen, L, D, H, True, with_d_cs, mask, rows
        )
        return together._cooperative_bwd_kernel, tiles, constants, options
    options = launch_options(tiles)
    if forward:
        constants = resident.fwd_constants(cell, chosen, D, I, H, True, saved, rows)
        return resident._resident_fwd_kernel, tiles, constants, options
    constants = resident.bwd_constants(cell, chosen, D, H, True, with_d_cs, rows)
    return resident._resident_bwd_kernel, tiles, constants, options


def _rows_of(problem: Problem) -> Rows:
    """Ragged ones packed, which is all a kernel can be asked for: addresses of their own, too."""
    some = torch.empty(0) if problem.ragged else None
    return Rows(1, 1, some, some, some)


def _stepwise_kernel_of(
    problem: Problem, forward: bool, launch: int
) -> tuple[Any, Tiles, dict, dict]:
    """One of the launches of a step: forward the first of all is number 0, backward the last."""
    from . import stepwise, stepwise_launch

    cell, H, D = problem.cell, problem.hidden_size, problem.directions
    phases = SPECS[cell].phases
    tiles, switches = stepwise_tiles(H), _rows_of(problem).switches
    if forward:
        kernel, ready = stepwise._stepwise_fwd_kernel, 0
        if launch:
            ready = phases[launch - 1][-1] + 1
        constants = stepwise_launch.fwd_constants(
            cell, D, H, True, 2 * (launch > 0), launch % len(phases), ready
        )
    else:
        kernel, has_d_cs = stepwise._stepwise_bwd_kernel, SPECS[cell].states == 2
        constants = stepwise_launch.bwd_constants(cell, D, H, True, has_d_cs, launch - 1)
    return kernel, tiles, constants | switches, launch_options(tiles)


def read(binary: Any) -> tuple[Usage, str]:
    """What a compiled kernel needs, and its instructions as text."""
    if "amdgcn" in binary.asm:
        asm = binary.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", asm)}
        return Usage(found["vgpr_count"], found["vgpr_spill_count"]), asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"]), sass


def run_tool(name: str, *arguments: str) -> str:
    """The output of a program that Triton brings along: ptxas, cuobjdump or nvdisasm."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def figures(binary: Any) -> dict[str, int]:
    """A binary in the figures of ``docs/compiled.csv``: mma counts instructions of the kernel as
    the compiler was given them, step those of a SASS loop over T as it left them."""
    usage, text = read(binary)
    if "amdgcn" in binary.asm:
        mma, step = re.findall(r"\bv_mfma_", text), 0  # the latter is not in the table
    else:
        mma = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", binary.asm["ptx"])
        step = len(longest_loop(read_assembly(text)))
    return {
        "registers": usage.registers,
        "spills": usage.spills,
        "mma": len(mma),
        "step": step,
    }
