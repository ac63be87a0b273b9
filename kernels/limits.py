"""How much of W_hh one program can hold: found by compiling, by Triton 3.6 and 3.9, what spills.

``tests/compile_all.py`` compiles what stays within and fails if anything spills; its table is
``docs/compiled.csv``. "Gates" are the number of gates of the cell; "kinds" the ways to multiply.
"""

from __future__ import annotations

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
    return units <= most and units * columns <= room


def is_large(
    kind: str, gates: int, units: int, chunks: tuple[tuple[int, int, int], ...], direction: str
) -> bool:
    """Whether ptxas does better without being told that it may use 255 registers.

    Left to itself it stops at 128 in most kernels and spills 8 to 32 bytes; but it spills in the
    largest ones if told, by Triton 3.6.
    """
    columns = sum(pieces * width for _, pieces, width in chunks)
    if gates == 1:
        return False
    if kind == "tf32x3":
        return gates == 4 or direction == "backward"
    if kind == "tf32":
        return units * columns >= 8192
    return columns >= 768 if gates == 4 else units * columns > 16384
