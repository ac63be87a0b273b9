"""Which schedule and which tiles, as a pure function of the problem and the chip.

Nothing here imports triton or touches a device: ``plan`` is a table with a model behind it, and
the tests compile what it returns for every chip it knows. Everything below is *modelled*: no
entry has been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .spec import SPECS


class NoPlan(Exception):  # noqa: N818, it is an answer and no error
    """No schedule takes the problem; the message is the reason, in one sentence."""


class Chip(NamedTuple):
    """The limits of a GPU that a plan must respect."""

    name: str
    sms: int
    shared_bytes: int  # the most one program may have
    warp_size: int = 32


CHIPS = {
    "sm_80": Chip("sm_80", 108, 166_912),
    "sm_90": Chip("sm_90", 132, 232_448),
    "sm_100": Chip("sm_100", 148, 232_448),
    "gfx942": Chip("gfx942", 304, 65_536, warp_size=64),
}


class Problem(NamedTuple):
    """What a plan depends on. T is missing on purpose: no binary depends on it."""

    cell: str
    input_size: int
    hidden_size: int
    batch: int
    directions: int
    dtype: torch.dtype
    precision: str
    needs_grad: bool


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut: rows per program, blocks of H (start, width), and launch options."""

    block_b: int
    blocks: tuple[tuple[int, int], ...]
    num_warps: int
    max_registers: int | None  # a thread's; None where the compiler has no such option
    input_precision: str
    shared_bytes: int  # estimate, an upper bound of the compiler's figure
    k_chunks: tuple[tuple[int, int, int], ...] = ()  # cooperative: (start, pieces, piece's width)

    def describe(self) -> str:
        widths = "+".join(str(width) for _, width in self.blocks)
        return f"{self.block_b} rows x {widths} units, {self.num_warps} warps"


@dataclass(frozen=True)
class Plan:
    """A schedule and its tiles; ``i_blocks`` is empty when a library GEMM projects the input."""

    schedule: str
    forward: Tiles
    backward: Tiles | None
    i_blocks: tuple[tuple[int, int], ...]

    def describe(self) -> str:
        parts = [f"forward {self.forward.describe()}"]
        if self.backward:
            parts.append(f"backward {self.backward.describe()}")
        parts.append(
            "input projected in the kernel" if self.i_blocks else "input projected by GEMM"
        )
        return f"{self.schedule}: " + "; ".join(parts) + " (modelled, not measured)"


def blocks_of(size: int, least: int = 16, most: int = 128) -> tuple[tuple[int, int], ...]:
    """Cuts ``size`` columns into power-of-two blocks, rounding up to ``least`` and no further.

    >>> blocks_of(160)
    ((0, 128), (128, 32))
    >>> blocks_of(33)
    ((0, 32), (32, 16))
    """
    padded = -(-size // least) * least
    blocks, start = [], 0
    while start < padded:
        width = min(most, 1 << ((padded - start).bit_length() - 1))
        blocks.append((start, width))
        start += width
    return tuple(blocks)


#: The largest H one program can hold, by number of gates. With the next block size a kernel on
#: sm_80, sm_90 or sm_100 spills registers or wants more shared memory than an SM has.
LARGEST_H = {
    "16-bit": {4: 128, 3: 128, 1: 256},
    "tf32": {4: 64, 3: 96, 1: 192},
    "tf32x3": {4: 64, 3: 64, 1: 128},
    "ieee": {4: 64, 3: 64, 1: 128},
}
#: gfx942 has 64 KiB of shared memory a program, and its waves spill above this.
LARGEST_H_GFX = {"16-bit": 64, "ieee": 32}


@lru_cache(maxsize=4096)
def plan(problem: Problem, chip: Chip) -> Plan:
    """Chooses schedule and tiles.

    Raises:
        NoPlan: no schedule takes the problem; the message is the reason.
    """
    spec = SPECS.get(problem.cell)
    if spec is None:
        raise NoPlan(f"no kernel knows the cell {problem.cell!r}; known are {', '.join(SPECS)}")
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NoPlan(f"the kernels compute in float32, float16 or bfloat16, not {problem.dtype}")
    amd = chip.warp_size == 64
    wide = problem.dtype == torch.float32
    # MIOpen has no tf32, and 16-bit operands are multiplied exactly whatever the switch says.
    precision = problem.precision if wide and not amd else "ieee"
    kind = precision if wide else "16-bit"
    largest = LARGEST_H_GFX[kind] if amd else LARGEST_H[kind][spec.gates]
    H = problem.hidden_size
    if largest < H:
        raise NoPlan(
            f"schedule resident holds W_hh in one program, which for {problem.cell} in {kind} "
            f"ends at H={largest}; H is {H}"
        )

    # Two warps cut a 16-wide tile into the 8 columns of an mma; wider ones keep more warps busy.
    # Below 32 columns a tile would be computed by several warps at once, hence no 16 in between.
    blocks = blocks_of(H, least=16 if H <= 16 else 32)
    padded = sum(width for _, width in blocks)
    num_warps = 2 if padded == 16 else 4 if amd or padded <= (32 if wide else 64) else 8
    # Latency, not occupancy: half the rows halve the special-function work of a step (10 per unit
    # and row for an LSTM), as long as there are SMs for twice the programs. The three products of
    # tf32x3 leave no registers for 16 rows; gfx942 has no matrix instruction for fewer.
    few = -(-problem.batch // 8) * problem.directions <= chip.sms
    block_b = 16 if amd else 8 if few or precision == "tf32x3" else 16

    i_blocks: tuple[tuple[int, int], ...] = ()
    if _projects_in_kernel(problem.input_size, padded, kind):
        i_blocks = blocks_of(problem.input_size)
    forward, backward = (
        Tiles(
            block_b,
            blocks,
            num_warps,
            None if amd else 255,
            precision,
            _shared_bytes(spec.gates, padded, columns, block_b, wide, precision),
        )
        for columns in (padded + sum(width for _, width in i_blocks), padded)
    )
    if forward.shared_bytes > chip.shared_bytes and i_blocks:
        i_blocks, forward = (), backward
    if forward.shared_bytes > chip.shared_bytes:
        raise NoPlan(
            f"schedule resident needs {forward.shared_bytes:,} bytes of shared memory for "
            f"{problem.cell} in {kind} at H={H}; {chip.name} has {chip.shared_bytes:,}"
        )
    return Plan("resident", forward, backward if problem.needs_grad else None, i_blocks)


def _projects_in_kernel(input_size: int, padded: int, kind: str) -> bool:
    """Whether x W_ih^T is memory-bound as a GEMM and W_ih small enough to stay on chip."""
    # Products on the FMA units keep their operands in registers: 40 bytes spill at H = 32.
    return input_size <= (64 if kind == "16-bit" else 16) and padded <= (
        16 if kind == "ieee" else 64
    )


def _shared_bytes(
    gates: int, padded: int, columns: int, block_b: int, wide: bool, precision: str
) -> int:
    """An upper bound: all weights, and the operands of every dot on their way through memory."""
    bytes_each = 4 if wide else 2
    weights = gates * padded * columns * bytes_each
    operands = max(block_b, 16) * (gates * padded + columns) * 4
    return (weights + operands) * (2 if precision == "tf32x3" else 1)


@lru_cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a device; for the CPU, where the interpreter runs, the limits of sm_90."""
    if device.type != "cuda":
        return CHIPS["sm_90"]
    properties = torch.cuda.get_device_properties(device)
    shared = (
        getattr(properties, "shared_memory_per_block_optin", 0)
        or properties.shared_memory_per_block
    )
    return Chip(properties.name, properties.multi_processor_count, shared, properties.warp_size)
