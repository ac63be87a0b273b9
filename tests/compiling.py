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
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedrnn.kernels.plan import (
    CHIPS,
    Chip,
    NoPlan,
    Plan,
    Problem,
    cooperative,
    plan,
    stepwise_tiles,
)
from fusedrnn.kernels.rows import Rows
from fusedrnn.kernels.spec import SPECS

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


class Job(NamedTuple):
    """One kernel to compile: "forward" or "backward", for which problem, on which chip.

    ``launch`` numbers the different launches of one step in schedule stepwise.
    """

    direction: str
    problem: Problem
    chip: str
    launch: int = 0

    def to_json(self) -> str:
        problem = self.problem._replace(dtype=str(self.problem.dtype).removeprefix("torch."))
        return json.dumps([self.direction, list(problem), self.chip, self.launch])

    @classmethod
    def from_json(cls, line: str) -> Job:
        direction, fields, chip, launch = json.loads(line)
        problem = Problem(*fields)
        return cls(direction, problem._replace(dtype=getattr(torch, problem.dtype)), chip, launch)


#: Beyond these the plan is the same but for H, which no rule of it treats specially.
COOPERATIVE_H = (192, 256, 384, 512, 768, 1024, 1536, 2048)
KINDS = [
    (torch.bfloat16, "ieee"),
    *((torch.float32, precision) for precision in ("ieee", "tf32", "tf32x3")),
]
#: Directions and layers of one launch; both of them double what a chip must hold.
COOPERATIVE_STACKS = ((1, 1), (2, 1), (1, 2))


def plan_of(problem: Problem, chip: Chip) -> Plan:
    """The plan of one launch of all the problem's layers."""
    return cooperative(problem, chip) if problem.layers > 1 else plan(problem, chip)


def _problems(chip: Chip) -> Iterator[Problem]:
    """Every cell, H, precision, rows per program and I, beside which plans do not differ.

    In bf16, which differs from fp16 in the name of an instruction. Resident with two directions,
    whose binaries hold all of one direction's and a pointer select.
    """
    for cell, (dtype, precision) in product(SPECS, KINDS):
        for H, I, batch in product(range(16, 257, 16), (65, 1, 64), (8, 8 * chip.sms + 1)):
            problem = Problem(cell, I, H, batch, 2, dtype, precision, True)
            if plan(problem, chip).schedule == "resident":
                yield problem
        for H, batch, (D, L) in product(COOPERATIVE_H, (16, 128), COOPERATIVE_STACKS):
            # The other cells differ from these in a few lines: one size is enough.
            if H == 256 or (cell in ("lstm", "gru", "rnn_tanh") and (D, L) == (1, 1)):
                yield Problem(cell, H, H, batch, D, dtype, precision, True, L)
    yield from _ragged_problems(chip)
    yield from _stepwise_problems()


def _ragged_problems(chip: Chip) -> Iterator[Problem]:
    """The largest resident H of every cell and precision, and cooperative at every size.

    What ragged rows add to a kernel is the same for each tile: it counts where registers are full.
    """
    for cell, (dtype, precision) in product(SPECS, KINDS):
        for batch in (8, 8 * chip.sms + 1):
            problems = [
                Problem(cell, 65, H, batch, 2, dtype, precision, True, ragged=True)
                for H in range(16, 257, 16)
            ]
            yield from [p for p in problems if plan(p, chip).schedule == "resident"][-1:]
        for H, batch in product(COOPERATIVE_H, (16, 128)):
            if H == 256 or cell in ("lstm", "gru", "rnn_tanh"):
                yield Problem(cell, H, H, batch, 1, dtype, precision, True, ragged=True)
        for D, L in COOPERATIVE_STACKS[1:]:
            yield Problem(cell, 256, 256, 16, D, dtype, precision, True, L, ragged=True)


def _stepwise_problems() -> Iterator[Problem]:
    """Every width of a tile, and every cell and dtype; H = 4096 is beyond the other schedules."""
    for H in (1, 2, 3, 5, 9, 17, 33):
        yield Problem("lstm", H, H, 8, 2, torch.float64, "ieee", True)
    for cell, (dtype, H) in product(
        SPECS, ((torch.float64, 48), (torch.float32, 4096), (torch.bfloat16, 4096))
    ):
        for ragged in (False, True):
            yield Problem(cell, H, H, 8, 2, dtype, "ieee", True, ragged=ragged)


def every_plan(chip: Chip) -> Iterator[tuple[Problem, Plan]]:
    """One problem for each different plan. Where other schedules end is no plan of stepwise."""
    seen, stepwise = set(), set(_stepwise_problems())
    for problem in _problems(chip):
        try:
            chosen = plan_of(problem, chip)
        except NoPlan:
            continue
        meant = chosen.schedule != "stepwise" or problem in stepwise
        key = problem.cell, problem.dtype, _tilings(problem, chosen), chosen.i_blocks
        if meant and key not in seen:
            seen.add(key)
            yield problem, chosen


def _tilings(problem: Problem, chosen: Plan) -> tuple:
    """What of a plan makes a binary: not how many tiles run at once, nor how long it takes."""
    tiles = (chosen.forward, chosen.backward)
    size = (problem.hidden_size, problem.directions) if chosen.forward.k_chunks else ()
    size += (problem.ragged, chosen.schedule)
    return *(t and replace(t, at_once=1) for t in tiles), chosen.layers, size


def every_job(chip: str) -> Iterator[Job]:
    """Both kernels of every plan; of each one for every tiling (backward knows no I)."""
    seen = set()
    for problem, chosen in every_plan(CHIPS[chip]):
        forward, backward, *rest = _tilings(problem, chosen)
        for direction, tiles, more in (
            ("forward", forward, (*rest, chosen.i_blocks)),
            ("backward", backward, rest),
        ):
            key = direction, problem.cell, problem.dtype, tiles, tuple(more)
            if key not in seen:
                seen.add(key)
                launches = 1
                if chosen.schedule == "stepwise":  # one more than products: first or last of all
                    launches += len(SPECS[problem.cell].phases)
                yield from (Job(direction, problem, chip, launch) for launch in range(launches))


def compile_kernel(job: Job) -> dict:
    """Compiles one kernel; returns its shared bytes, registers, spilled bytes and mma count."""
    problem, chosen = job.problem, plan_of(job.problem, CHIPS[job.chip])
    forward = job.direction == "forward"
    if chosen.schedule == "stepwise":
        kernel, tiles, constants, options = _stepwise_kernel_of(problem, forward, job.launch)
    else:
        kernel, tiles, constants, options = _kernel_of(problem, chosen, forward)
    constants["aux_ptr"] = None
    if not problem.ragged:
        constants |= {"origins_ptr": None, "starts_ptr": None}
    signature, attributes = {}, {}
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
    binary = triton.compile(source, target=TARGETS[job.chip], options=options)
    usage = {
        "shared": binary.metadata.shared,
        "narrow": _narrow_rows(binary, tiles.block_b),
    }
    nvidia = not job.chip.startswith("gfx")
    if chosen.schedule == "cooperative":
        usage |= _exchanged_loads(binary, problem.hidden_size, nvidia)
    return usage | (_nvidia_usage(binary) if nvidia else _amd_usage(binary.asm["amdgcn"]))


def _kernel_of(problem: Problem, chosen: Plan, forward: bool):
    """The kernel of a plan, its tiles, constants and launch options."""
    from fusedrnn.kernels import cooperative as together
    from fusedrnn.kernels import cooperative_launch, launch, resident

    rows = _rows_of(problem)
    cell, I, H, D = problem.cell, problem.input_size, problem.hidden_size, problem.directions
    tiles, L = chosen.forward if forward else chosen.backward, chosen.layers
    with_d_cs = False  # of module.states() alone
    if chosen.schedule == "cooperative":
        options, mask = launch.cooperative_options(tiles), L > 1
        if forward:
            constants = cooperative_launch.fwd_constants(
                cell, chosen, L, D, H, True, mask, True, rows
            )
            return together._cooperative_fwd_kernel, tiles, constants, options
        constants = cooperative_launch.bwd_constants(
            cell, chosen, L, D, H, True, with_d_cs, mask, rows
        )
        return together._cooperative_bwd_kernel, tiles, constants, options
    options = launch.launch_options(tiles)
    if forward:
        constants = resident.fwd_constants(cell, chosen, D, I, H, True, problem.needs_grad, rows)
        return resident._resident_fwd_kernel, tiles, constants, options
    constants = resident.bwd_constants(cell, chosen, D, H, True, with_d_cs, rows)
    return resident._resident_bwd_kernel, tiles, constants, options


def _rows_of(problem: Problem) -> Rows:
    """Ragged ones packed, which is all a kernel can be asked for: addresses of their own, too."""
    some = torch.empty(0) if problem.ragged else None
    return Rows(1, 1, some, some, some)


def _stepwise_kernel_of(problem: Problem, forward: bool, launch: int):
    """One of the launches of a step: forward the first of all is number 0, backward the last."""
    from fusedrnn.kernels import stepwise, stepwise_launch
    from fusedrnn.kernels.launch import launch_options

    cell, H, D, phases = problem.cell, problem.hidden_size, problem.directions, len(
        SPECS[problem.cell].phases
    )  # fmt: skip
    tiles, switches = stepwise_tiles(H), _rows_of(problem).switches
    if forward:
        kernel, ready = stepwise._stepwise_fwd_kernel, 0
        if launch:
            ready = SPECS[cell].phases[launch - 1][-1] + 1
        constants = stepwise_launch.fwd_constants(
            cell, D, H, True, launch > 0, launch % phases, ready
        )
    else:
        kernel, has_d_cs = stepwise._stepwise_bwd_kernel, SPECS[cell].states == 2
        constants = stepwise_launch.bwd_constants(cell, D, H, True, has_d_cs, launch - 1)
    return kernel, tiles, constants | switches, launch_options(tiles)


def _exchanged_loads(binary, H: int, nvidia: bool) -> dict:
    """How loads of what other programs wrote came out: only these go past L1 (``cg``).

    early: how many the compiler moved before the first wait (an acquiring poll); scalar: how many
    take one element at a time though rows are aligned, which costs an operand 8 times the loads.
    """
    ir = binary.asm["ttgir"]
    loads = [match.start() for match in re.finditer(r"tt\.load [^\n]*\bcg\b", ir)]
    assert loads, "no load of exchanged data is left"
    early = sum(start < ir.index("acquire") for start in loads)
    scalar = re.findall(r"ld\.global\.cg\.b\d+", binary.asm["ptx"]) if nvidia else []
    return {"early": early, "scalar": 0 if H % 16 else len(scalar)}


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        sass = _run_tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = binary.asm["ptx"]
    return {
        "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"],
        "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
        "step": _longest_loop(sass),
    }


def _run_tool(name: str, *arguments: str) -> str:
    """Runs a program that Triton brings along."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def _longest_loop(sass: str) -> int:
    """Instructions from the target of the farthest backward branch to it: the loop over T."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                longest = max(longest, count - labels[target[1]])
    return longest


def _amd_usage(asm: str) -> dict:
    def figure(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", asm).group(1))

    return {
        "registers": figure("vgpr_count"),
        "spills": figure("vgpr_spill_count"),
        "mma": len(re.findall(r"\bv_mfma_", asm)),
        "step": 0,  # not counted
    }


def main() -> None:
    """Reads jobs and answers each with what its binary needs, one JSON object a line."""
    for line in sys.stdin:
        job = Job.from_json(line)
        usage = compile_kernel(job)
        sys.stdout.write(json.dumps({"triton": triton.__version__, **usage}) + "\n")


if __name__ == "__main__":
    main()
