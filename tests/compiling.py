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
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedrnn.kernels.plan import CHIPS, Chip, NoPlan, Plan, Problem, plan
from fusedrnn.kernels.spec import SPECS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Job(NamedTuple):
    """One kernel to compile: "forward" or "backward", for which problem, on which chip."""

    direction: str
    problem: Problem
    chip: str

    def to_json(self) -> str:
        problem = self.problem._replace(dtype=str(self.problem.dtype).removeprefix("torch."))
        return json.dumps([self.direction, list(problem), self.chip])

    @classmethod
    def from_json(cls, line: str) -> Job:
        direction, fields, chip = json.loads(line)
        problem = Problem(*fields)
        return cls(direction, problem._replace(dtype=getattr(torch, problem.dtype)), chip)


def every_plan(chip: Chip) -> Iterator[tuple[Problem, Plan]]:
    """One problem for each different plan, over cells, H, precision, rows per program and I.

    All with two directions, whose binaries hold all of one direction's and a pointer select, and
    in bf16, which differs from fp16 in the name of an instruction.
    """
    kinds = [(torch.bfloat16, "ieee")]
    kinds += [(torch.float32, precision) for precision in ("ieee", "tf32", "tf32x3")]
    seen = set()
    for cell, (dtype, precision) in product(SPECS, kinds):
        for H, I, batch in product(range(16, 257, 16), (65, 1, 64), (8, 8 * chip.sms + 1)):
            problem = Problem(cell, I, H, batch, 2, dtype, precision, True)
            try:
                chosen = plan(problem, chip)
            except NoPlan:
                continue
            key = cell, dtype, chosen
            if key not in seen:
                seen.add(key)
                yield problem, chosen


def every_job(chip: str) -> Iterator[Job]:
    """Both kernels of every plan; of the backward, which knows no I, one for each tiling."""
    seen = set()
    for problem, chosen in every_plan(CHIPS[chip]):
        yield Job("forward", problem, chip)
        key = problem.cell, problem.dtype, chosen.backward
        if key not in seen:
            seen.add(key)
            yield Job("backward", problem, chip)


def compile_kernel(resident, job: Job) -> dict:
    """Compiles one kernel; returns its shared bytes, registers, spilled bytes and mma count."""
    problem, chosen = job.problem, plan(job.problem, CHIPS[job.chip])
    cell, I, H, D = problem.cell, problem.input_size, problem.hidden_size, problem.directions
    if job.direction == "forward":
        kernel, tiles = resident._resident_fwd_kernel, chosen.forward
        constants = resident.fwd_constants(cell, chosen, D, I, H, True, problem.needs_grad)
    else:
        kernel, tiles = resident._resident_bwd_kernel, chosen.backward
        constants = resident.bwd_constants(cell, chosen, D, H, True)
    constants["aux_ptr"] = None
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS[problem.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # as torch's allocations are
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(
        source, target=TARGETS[job.chip], options=resident.launch_options(tiles)
    )
    usage = {"shared": binary.metadata.shared, "narrow": _narrow_rows(binary, tiles.block_b)}
    if job.chip.startswith("gfx"):
        return usage | _amd_usage(binary.asm["amdgcn"])
    return usage | _nvidia_usage(binary)


def _narrow_rows(binary, block_b: int) -> int:
    """How often a vector of row pointers is moved by 32-bit offsets, which overflow at 2**31.

    Counted only for 8 rows: no block of columns, whose offsets are small, is 8 wide.
    """
    if block_b != 8:
        return 0
    return len(
        re.findall(r"tt\.addptr .*: tensor<8x!tt\.ptr<\w+>>, tensor<8xi32>", binary.asm["ttir"])
    )


def _nvidia_usage(binary) -> dict:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
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
    """Reads jobs and answers each with what its binary needs, one JSON object a line."""
    from fusedrnn.kernels import resident

    for line in sys.stdin:
        job = Job.from_json(line)
        usage = compile_kernel(resident, job)
        sys.stdout.write(json.dumps({"triton": triton.__version__, **usage}) + "\n")


if __name__ == "__main__":
    main()
