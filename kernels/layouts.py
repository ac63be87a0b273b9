"""The layouts of schedule *cooperative*: the thread that holds each element of a tile.

``slices.py`` multiplies with them. They are chosen so that values change hands at one place only,
where the partial sums of the warps meet in shared memory.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl


class Slice(NamedTuple):
    """The compile-time sizes and layouts of a launch."""

    L: int
    D: int
    H: int
    block_b: int  # sequences of a program, a power of two of at least 8
    block_h: int  # its units, a power of two of at least 8
    rows: int  # of a product, at least 16
    gates: int  # of a product: two if a program has 8 units
    groups: int  # of columns, one for each warp
    transposed: bool  # the first operand is a slice of W_hh^T
    columns: tuple  # of the product of each phase
    rounds: tuple  # for each phase the chunks of weights in registers, then those in shared memory
    pitch: int  # of the rows of a slot
    slice: Any  # [groups, rows / 16, 8, lines, 4, values of a line, 2], the first operand as loaded
    wide: Any  # [groups, BLOCK_B, columns of a group], the second operand as loaded
    acc: Any  # [groups, rows, BLOCK_B], the partial sums of a product
    weight: Any  # its first operand
    operand: Any  # its second operand
    shared: Any  # [groups, BLOCK_B, rows], the partial sums in shared memory
    parts: Any  # the same as a thread reads them
    tile: Any  # [BLOCK_B, BLOCK_H], of one gate
    store: Any  # a chunk of the first operand in shared memory
    is_full: bool  # a step is loaded behind the product, whose operand has left its registers


def chunks_of(columns: int, groups: int, itemsize: int, start: int = 0) -> tuple:
    """Cuts columns into chunks of equal groups, powers of two: (first, columns of a group, stop).

    A group has whole lines of four threads with 16 bytes each.

    >>> chunks_of(256, 4, 2), chunks_of(1056, 4, 2)
    (((0, 64, 256),), ((0, 256, 1024), (1024, 32, 1152)))
    """
    line = 64 // itemsize
    chunks, rest = [], -(-columns // (line * groups)) * line
    while rest:
        width = 1 << (rest.bit_length() - 1)
        chunks.append((start, width, start + width * groups))
        start, rest = start + width * groups, rest - width
    return tuple(chunks)


def _rounds(columns: int, groups: int, itemsize: int, halved: bool) -> tuple:
    """The chunks that are loaded at once: all, or each half of the columns."""
    if not halved:
        return (chunks_of(columns, groups, itemsize),)
    line = 64 // itemsize * groups
    half = -(-columns // 2 // line) * line
    return chunks_of(half, groups, itemsize), chunks_of(columns - half, groups, itemsize, half)


def _sums_in_memory(groups: int, block_b: int, rows: int) -> Any:
    """Partial sums, so that the 2 x 2 of a thread lie side by side and no bank conflicts occur."""
    return gl.SharedLinearLayout(
        [
            *([0, 0, 1], [0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 0, 2], [0, 2, 4], [0, 4, 8]),
            *([0, 0, 16 << n] for n in range((rows // 16).bit_length() - 1)),
            *([0, 8 << n, 0] for n in range((block_b // 8).bit_length() - 1)),
            *([1 << n, 0, 0] for n in range(groups.bit_length() - 1)),
        ]
    )


@lru_cache(maxsize=1024)
def slice_of(
    L: int, D: int, H: int, block_b: int, block_h: int, groups: int, itemsize: int,
    columns: tuple[int, ...], transposed: bool = False, halved: bool = False,
    is_full: bool = False,
) -> Slice:  # fmt: skip
    """Returns the sizes and layouts for elements of 2 or 4 bytes, and columns of each phase."""
    rows, vector = max(block_h, 16), 16 // itemsize
    gates = rows // block_h
    rounds = tuple(_rounds(n, groups, itemsize, halved) for n in columns)
    pitch = max(each[-1][-1][2] for each in rounds)  # padded columns
    order = [6, 5, 4, 3, 2, 1, 0] if transposed else [5, 6, 4, 3, 2, 1, 0]
    threads, warps = [1, 1, 8, 1, 4, 1, 1], [groups, 1, 1, 1, 1, 1, 1]
    slice = gl.BlockedLayout([1, 1, 1, 1, 1, vector, 2], threads, warps, order)
    wide = gl.BlockedLayout([1, 1, vector], [1, 8, 4], [groups, 1, 1], [2, 1, 0])
    acc = gl.NVMMADistributedLayout([2, 0], [groups, 1, 1], [1, 16, 8])
    weight, operand = (gl.DotOperandLayout(n, acc, 4 // itemsize) for n in (0, 1))
    # A thread has pairs of units, but where there are more threads than pairs.
    pair = 2 if block_b * rows > 32 * groups or gates == 2 else 1
    lanes = [4, 8] if pair == 2 else [2, 16]
    warps = [min(groups, block_b // lanes[0])]
    warps.append(groups // warps[0])
    parts = gl.BlockedLayout([groups, 1, pair], [1, *lanes], [1, *warps], [2, 1, 0])
    tile = gl.BlockedLayout([1, pair // gates], lanes, warps, [1, 0])
    shared = _sums_in_memory(groups, block_b, rows)
    store = gl.SwizzledSharedLayout(vector, 1, 8, [2, 1, 0])
    return Slice(
        L, D, H, block_b, block_h, rows, gates, groups, transposed, columns, rounds, pitch,
        slice, wide, acc, weight, operand, shared, parts, tile, store, is_full,
    )  # fmt: skip
