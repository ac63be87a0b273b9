"""The layouts of a slice: every column has one place, and shared memory no conflicts of banks."""

from functools import reduce
from operator import xor

import pytest

from fusedrnn.kernels.layouts import slice_of


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize(("columns", "itemsize"), [(256, 2), (200, 4), (1056, 2), (2048, 4)])
def test_chunks_are_all_columns_in_whole_lines_of_powers_of_two(columns, itemsize, halved):
    tile = slice_of(1, 1, columns, 16, 16, 4, itemsize, (columns,), halved=halved)
    (rounds,), line, stop = tile.rounds, 64 // itemsize, 0
    assert len(rounds) == 1 + halved
    for first, width, end in (chunk for chunks in rounds for chunk in chunks):
        assert (first, end) == (stop, first + 4 * width)
        assert width in [line << n for n in range(10)]
        stop = end
    assert columns <= tile.pitch == stop < columns + 4 * line


@pytest.mark.parametrize(
    ("block_b", "block_h", "warps"), [(8, 8, 4), (8, 16, 4), (16, 16, 8), (16, 32, 8)]
)
def test_partial_sums_meet_without_conflicts(block_b, block_h, warps):
    """Lanes that are served at once, 128 bytes of them, differ in their banks."""
    tile, places = slice_of(1, 1, 64, block_b, block_h, warps, 2, (64,)), {}
    for offset in range(warps * block_b * tile.rows):
        bases = [base for n, base in enumerate(tile.shared.offset_bases) if offset >> n & 1]
        places[reduce(lambda a, b: tuple(map(xor, a, b)), bases, (0, 0, 0))] = offset
    assert len(places) == warps * block_b * tile.rows
    _, _, pair = tile.parts.size_per_thread
    across = tile.parts.threads_per_warp[2]
    stores = [places[0, 2 * (lane % 4), 2 * (lane // 4)] for lane in range(32)]  # of 2 x 2 sums
    loads = [places[0, lane // across, pair * (lane % across)] for lane in range(32)]
    for offsets, words in ((stores, 4), (loads, pair)):
        for together in (offsets[n : n + 32 // words] for n in range(0, 32, 32 // words)):
            assert sorted(offset % 32 for offset in together) == list(range(0, 32, words))
