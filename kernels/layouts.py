"""The layouts of schedule *cooperative*: the thread that holds each element of a tile.

``slices.py`` multiplies with them. All are Gluon's, written out, and chosen so that values change
hands at one place only, where the partial sums of the warps meet in shared memory.
"""

from collections.abc import Iterator
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
    groups: int  # of columns, one for each warp
    pitch: int  # of the rows of a slot
    chunks: tuple  # for each phase, of the columns: (first column, columns of a group)
    held: tuple  # for each phase, the chunks in registers; the rest is in shared memory
    wide: tuple  # for each phase and chunk [groups, columns of a group, BLOCK_B], as loaded
    pairs: tuple  # for each phase and chunk the first operand as backward loads it
    tile: Any  # [BLOCK_B, BLOCK_H], of one gate
    part: Any  # [BLOCK_B * BLOCK_H / 16, 16], the same elements as they lie in shared memory
    acc: Any  # [groups, rows, BLOCK_B], the partial sums of a product
    weight: Any  # its first operand
    operand: Any  # its second operand
    shared: Any  # the partial sums in shared memory
    store: Any  # a chunk of the first operand in shared memory


def chunks_of(columns: int, groups: int, itemsize: int, start: int = 0) -> tuple:
    """Cuts columns into chunks of ``groups`` equal powers of two: (first, columns of a group).

    A group has whole lines of four threads with 16 bytes each.

    >>> chunks_of(256, 4, 2), chunks_of(1056, 4, 2)
    (((0, 64),), ((0, 256), (1024, 32)))
    """
    line = 64 // itemsize
    chunks, rest = [], -(-columns // (line * groups)) * line
    while rest:
        width = 1 << (rest.bit_length() - 1)
        chunks.append((start, width))
        start, rest = start + width * groups, rest - width
    return tuple(chunks)


def _doubles(first: int, stop: int) -> Iterator[int]:
    while first < stop:
        yield first
        first *= 2


def _wide(groups: int, columns: int, block_b: int, itemsize: int) -> Any:
    vector = 16 // itemsize
    return gl.DistributedLinearLayout(
        reg_bases=[
            *([0, k, 0] for k in _doubles(1, vector)),
            *([0, k, 0] for k in _doubles(4 * vector, columns)),
            *([0, 0, b] for b in _doubles(8, block_b)),
        ],
        lane_bases=[[0, vector, 0], [0, 2 * vector, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        warp_bases=[[g, 0, 0] for g in _doubles(1, groups)],
        block_bases=[],
        shape=[groups, columns, block_b],
    )


def _tiles(groups: int, block_b: int, block_h: int) -> tuple[Any, Any]:
    """The layouts of a tile, and of its elements in shared memory.

    In shared memory a row is (8 sequences, 16 units, pair of units), a column (pair of sequences,
    one of them, unit of the pair). Half a warp reads it without bank conflicts.
    """
    pairs = block_h > 8
    in_tile: list = []  # the bases of unit of the pair, then pairs, then sequences
    in_part: list = []
    unit = 2 if pairs else 1
    half = ([0, 1], [0, 1])
    lanes = [([0, unit << n], [1 << n, 0]) for n in range(3)] + [([1, 0], [0, 2]), ([2, 0], [0, 4])]
    rest = [([4, 0], [0, 8])]
    rows = max(block_h // 2, 8)  # of 8 sequences
    rest += [([b, 0], [rows * b // 8, 0]) for b in _doubles(8, block_b)]
    rest += [([0, 2 * u], [u, 0]) for u in _doubles(8, block_h // 2)]
    warps = groups.bit_length() - 1
    few = pairs and len(rest) < warps  # elements for the threads
    registers = [] if few else [half] if pairs else [([0, 0], [0, 1])]
    if few:
        rest.append(half)
    rest += [([0, 0], [0, 0])] * (warps - len(rest))
    registers += rest[warps:]
    for n, found in enumerate((in_tile, in_part)):
        found += [[base[n] for base in bases] for bases in (registers, lanes, rest[:warps])]
    if not pairs:  # the two gates of a pair become two tiles
        in_tile[0] = in_tile[0][1:]
    shapes = [block_b, block_h], [block_b // 8 * rows, 16]
    tile, part = (
        gl.DistributedLinearLayout(
            reg_bases=bases[0], lane_bases=bases[1], warp_bases=bases[2], block_bases=[], shape=size
        )
        for bases, size in zip((in_tile, in_part), shapes, strict=True)
    )
    return tile, part


def _pairs(groups: int, columns: int, block_h: int, itemsize: int) -> Any:
    """A chunk of the first operand with its rows by unit, of which a thread has two beside."""
    width = 4 // itemsize
    return gl.DistributedLinearLayout(
        reg_bases=[
            [0, 1, 0],
            *([0, 0, k] for k in (*_doubles(1, width), *_doubles(4 * width, columns))),
            *([0, h, 0] for h in _doubles(16, block_h)),
        ],
        lane_bases=[[0, 0, width], [0, 0, 2 * width], [0, 2, 0], [0, 4, 0], [0, 8, 0]],
        warp_bases=[[g, 0, 0] for g in _doubles(1, groups)],
        block_bases=[],
        shape=[groups, block_h, columns],
    )


@lru_cache(maxsize=1024)
def slice_of(
    L: int, D: int, H: int, block_b: int, block_h: int, groups: int, itemsize: int,
    columns: tuple[int, ...], halved: bool = False,
) -> Slice:  # fmt: skip
    """Returns the sizes and layouts for elements of 2 or 4 bytes, and columns of each phase."""
    line = 64 // itemsize * groups
    halves = [-(-n // 2 // line) * line if halved else n for n in columns]
    held = [chunks_of(n, groups, itemsize) for n in halves]
    chunks = tuple(
        each + chunks_of(n - half, groups, itemsize, half) if halved else each
        for each, half, n in zip(held, halves, columns, strict=True)
    )
    wide = tuple(
        tuple(_wide(groups, width, block_b, itemsize) for _, width in each) for each in chunks
    )
    pairs = tuple(
        tuple(_pairs(groups, width, max(block_h, 16), itemsize) for _, width in each)
        for each in chunks
    )
    pitch = max(sum(width for _, width in each) * groups for each in chunks)
    acc = gl.NVMMADistributedLayout([2, 0], [groups, 1, 1], [1, 16, 8])
    weight, operand = (gl.DotOperandLayout(n, acc, 4 // itemsize) for n in (0, 1))
    tile, part = _tiles(groups, block_b, block_h)
    shared = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    store = gl.SwizzledSharedLayout(16 // itemsize, 1, 8, [2, 1, 0])
    return Slice(
        L, D, H, block_b, block_h, groups, pitch, chunks, tuple(map(len, held)), wide, pairs,
        tile, part, acc, weight, operand, shared, store,
    )  # fmt: skip
