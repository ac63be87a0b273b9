"""How much of W_hh one program can hold: found by compiling, by Triton 3.6 and 3.9, what spills.

``tests/compile_all.py`` compiles what stays within and fails if anything spills; its table is
``docs/compiled.csv``. "Gates" are the number of gates of the cell; "kinds" the ways to multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .spec import SPECS

if TYPE_CHECKING:
    from .plan import Problem

#: The largest H one program can hold, by number of gates. With the next block size a kernel on
#: sm_80, sm_90 or sm_100 spills registers or wants more shared memory than an SM has.
LARGEST_H = {
    "16-bit": {4: 128, 3: 128, 1: 256},
    "tf32": {4: 64, 3: 96, 1: 192},
    "tf32x3": {4: 64, 3: 64, 1: 128},
    "ieee": {4: 64, 3: 64, 1: 128},
}
#: The largest slice of one program in schedule cooperative, by number of gates: units, and units
#: times H with 16 rows and with 32. Beyond it a kernel spills by one Triton or the other.
LARGEST_SLICE = {
    "16-bit": {4: (32, 16384, 4096), 3: (32, 20480, 4096), 1: (64, 65536, 8192)},
    "tf32": {4: (16, 8192, 2048), 3: (32, 8192, 2048), 1: (64, 32768, 4096)},
    "tf32x3": {4: (8, 2048, 0), 3: (8, 2048, 0), 1: (64, 16384, 0)},
}
#: The same for ragged rows, whose kernels hold h_0 beside the step before: units, forward and
#: backward from and to, and their product with H. (A narrower slice can spill where a wider does
#: not: its operands are loaded for all gates at once.)
LARGEST_RAGGED_SLICE = {
    "16-bit": {
        4: {"forward": (8, 16, 12288), "backward": (8, 16, 10240)},
        3: {"forward": (8, 32, 15360), "backward": (8, 32, 15360)},
        1: {"forward": (8, 32, 32768), "backward": (8, 32, 32768)},
    },
    "tf32": {
        4: {"forward": (8, 16, 6144), "backward": (16, 16, 8192)},
        3: {"forward": (8, 32, 6144), "backward": (8, 32, 6144)},
        1: {"forward": (8, 32, 16384), "backward": (8, 32, 16384)},
    },
    "tf32x3": {
        4: {"forward": (8, 8, 1536), "backward": (8, 8, 0)},
        3: {"forward": (8, 8, 1536), "backward": (8, 8, 1536)},
        1: {"forward": (8, 32, 8192), "backward": (8, 32, 8192)},
    },
}
#: gfx942 has 64 KiB of shared memory a program, and its waves spill above this.
LARGEST_H_GFX = {"16-bit": 64, "ieee": 32}


def is_large_resident(kind: str, gates: int, units: int, direction: str, arch: str) -> bool:
    """Likewise for schedule resident, where one kernel is: on sm_90 it multiplies by wgmma."""
    return (kind, gates, units, direction, arch) == ("tf32x3", 4, 64, "backward", "sm_90")


def holds_in_registers(
    kind: str,
    gates: int,
    layers: int,
    ragged: bool,
    direction: str,
    units: int,
    rows: int,
    columns: int,
) -> bool:
    """Whether a cooperative program holds a slice of ``units`` by ``columns`` without spilling."""
    most, few_rows, many_rows = LARGEST_SLICE[kind][gates]
    room = few_rows if rows == 16 else many_rows
    if layers > 1:  # a second matrix
        room //= 2 if kind == "16-bit" else 4
    if ragged:
        least, most, ragged_room = LARGEST_RAGGED_SLICE[kind][gates][direction]
        if units < least or units * columns > ragged_room:
            return False
        spilled = rows == 32 if direction == "forward" else columns > 512  # 8 to 24 bytes
        if (kind, gates, units) == ("16-bit", 4, 16) and spilled:
            return False
    return (
        units <= most
        and units * columns <= room
        and not _spills(kind, gates, layers, direction, units, rows, columns)
    )


def _spills(
    kind: str, gates: int, layers: int, direction: str, units: int, rows: int, columns: int
) -> bool:
    """Whether a slice within the limits spills all the same, mostly by Triton 3.6 alone."""
    # No multiple of 128, that is cut into 4 pieces, which hold twice the columns each; of 64 few.
    in_fours = columns % 128 != 0 and columns > 64
    if kind == "16-bit" and gates > 1 and units == 32:
        if rows == 32:  # 144 to 1000 bytes
            return True
        if gates == 4 and direction == "forward":  # 8 to 80 bytes
            return in_fours or layers > 1
        return gates == 4 and in_fours and columns > 192  # 8 bytes
    if kind == "16-bit" and units == 64 and layers > 1:
        return in_fours  # 8 bytes
    # 8 to 56 bytes
    return kind == "tf32x3" and gates == 1 and (units == 64 or units * columns > 12288)


def operand_columns(
    kind: str, gates: int, layers: int, direction: str, H: int, ragged: bool
) -> int:
    """How many columns of an operand one chunk of schedule cooperative holds at most.

    A piece is at most 8 mma instructions deep, in tf32x3 6, and 8 warps have one each. Smaller
    chunks where kernels with these spill, 8 to 160 bytes by one Triton or the other: LSTM and GRU
    backward in tf32 and 16 bit, and ragged rows.
    """
    backward = direction == "backward"
    if kind == "tf32" and gates > 1 and backward and 384 < H <= 512:
        return 128
    if kind == "tf32" and gates == 4 and backward and H > 512:
        return 256
    if kind == "16-bit" and gates == 4 and layers > 1 and backward and 512 < H <= 640:
        return 128  # fp16 spills with more; by Triton 3.6 a step is 865 instructions, not 1090
    if kind == "16-bit" and gates == 3 and backward and 384 < H <= 512:
        return 128
    if kind == "16-bit" and gates > 1 and backward and H > 1024:
        return 512
    if ragged and kind == "tf32" and gates == 1 and not backward and H > 384:
        return 128
    if ragged and kind == "tf32" and gates == 4 and backward and 256 < H <= 384:
        return 256
    if ragged and kind == "16-bit" and (H <= 512 or (gates == 1 and not backward and H > 1536)):
        return 512
    return {"16-bit": 1024, "tf32x3": 128}.get(kind, 512)


def is_large(
    kind: str,
    gates: int,
    units: int,
    chunks: tuple[tuple[int, int, int], ...],
    direction: str,
    ragged: bool,
) -> bool:
    """Whether ptxas does better without being told that it may use 255 registers.

    Left to itself it stops at 128 in most kernels and spills 8 to 32 bytes; but it spills in the
    largest ones if told, by Triton 3.6.
    """
    widths = [pieces * width for _, pieces, width in chunks]
    columns, backward = sum(widths), direction == "backward"
    if gates == 1:
        return False
    if kind == "tf32x3":
        return gates == 4 and backward and columns > 128
    if kind == "tf32" and gates == 4 and backward and not ragged:
        return columns > 512
    if kind == "tf32":
        return units * columns >= 8192 and (ragged or max(widths) > 256)
    return columns >= 768 if gates == 4 else units * columns > 16384


def projects_in_kernel(input_size: int, padded: int, kind: str) -> bool:
    """Whether x W_ih^T is memory-bound as a GEMM and W_ih small enough to stay on chip."""
    # Products on the FMA units keep their operands in registers: 40 bytes spill at H = 32.
    return input_size <= (64 if kind == "16-bit" else 16) and padded <= (
        16 if kind == "ieee" else 64
    )


def shared_bytes(
    gates: int, padded: int, columns: int, block_b: int, wide: bool, precision: str
) -> int:
    """An upper bound: all weights, and the operands of every dot on their way through memory."""
    bytes_each = 4 if wide else 2
    weights = gates * padded * columns * bytes_each
    operands = max(block_b, 16) * (gates * padded + columns) * 4
    return (weights + operands) * (2 if precision == "tf32x3" else 1)


def slice_bytes(problem: Problem, kind: str, units: int, rows: int, columns: int) -> int:
    """An upper bound: the slice of W_hh (and W_ih above the first layer), and an operand."""
    gates, itemsize = SPECS[problem.cell].gates, problem.dtype.itemsize
    weights = gates * units * columns * itemsize * (2 if problem.layers > 1 else 1)
    # Triton 3.6 sums the warps' pieces through shared memory: 8 of each gate's tile.
    operand = max(rows * columns * itemsize, gates * 8 * rows * units * 4)
    return (weights + operand) * (2 if kind == "tf32x3" else 1)
