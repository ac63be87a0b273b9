"""Compiles a plan's kernels for a GPU that is not there, and reads what the binary needs.

Must run in a process without ``TRITON_INTERPRET``. Run as a script it takes jobs as JSON lines on
standard input and answers one line each, so that another Triton can be put on ``PYTHONPATH``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedrnn.kernels import resident
from fusedrnn.kernels.plan import Plan, Problem

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def compile_kernel(direction: str, problem: Problem, plan: Plan, target: str) -> dict:
    """Compiles the "forward" or "backward" kernel; returns shared bytes, registers, spills, mma."""
    cell, D, I, H = (
        problem.cell,
        problem.directions,
        problem.input_size,
        problem.hidden_size,
    )  # noqa: E741,N806
    if direction == "forward":
        kernel, tiles = resident._resident_fwd_kernel, plan.forward
        constants = resident.fwd_constants(
            cell, plan, D, I, H, True, problem.needs_grad
        )
    else:
        kernel, tiles = resident._resident_bwd_kernel, plan.backward
        constants = resident.bwd_constants(cell, plan, D, H, True)
    constants["aux_ptr"] = None
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS[problem.dtype]
            attributes[(index,)] = [
                ["tt.divisibility", 16]
            ]  # as torch's allocations are
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(
        source, target=TARGETS[target], options=resident.launch_options(tiles)
    )
    if target.startswith("gfx"):
        return {"shared": binary.metadata.shared, **_amd_usage(binary.asm["amdgcn"])}
    return {"shared": binary.metadata.shared, **_nvidia_usage(binary)}


def _nvidia_usage(binary) -> dict:
    cuobjdump = (
        Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = {
        key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    }
    ptx = binary.asm["ptx"]
    return {
        "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"],
        "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
    }


def _amd_usage(asm: str) -> dict:
    def figure(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", asm).group(1))

    return {
        "registers": figure("vgpr_count"),
        "spills": figure("vgpr_spill_count"),
        "mma": len(re.findall(r"\bv_mfma_", asm)),
    }


def main() -> None:
    from fusedrnn.kernels.plan import CHIPS, plan

    for line in sys.stdin:
        job = json.loads(line)
        problem = Problem(
            *job["problem"][:5], getattr(torch, job["problem"][5]), *job["problem"][6:]
        )
        usage = compile_kernel(
            job["direction"], problem, plan(problem, CHIPS[job["chip"]]), job["chip"]
        )
        print(json.dumps({**job, **usage}), flush=True)


if __name__ == "__main__":
    main()
