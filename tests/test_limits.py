"""The limits by themselves; ``test_compile.py`` holds them against the compiler."""

import pytest

from fusedrnn.kernels.limits import (
    OPERAND_COLUMNS,
    k_chunks,
    padded_units,
    resident_bytes,
    slice_bytes,
)


@pytest.mark.parametrize("H", [1, 64, 65, 100, 128, 192, 200, 384, 600, 768, 1000, 2048])
@pytest.mark.parametrize("kind", OPERAND_COLUMNS)
def test_chunks_cover_h_in_equally_many_pieces(H, kind):
    chunks = k_chunks(H, kind)
    assert len({pieces for _, pieces, _ in chunks}) == 1
    ends = [start + pieces * width for start, pieces, width in chunks]
    assert [start for start, _, _ in chunks] == [0, *ends[:-1]]
    assert ends[-1] >= H
    # Powers of two of at least an mma, and no more than an operand may have.
    assert all(width & (width - 1) == 0 and width >= 16 for _, _, width in chunks)
    assert all(pieces * width <= OPERAND_COLUMNS[kind] for _, pieces, width in chunks)
    # At most a chunk is padding.
    assert ends[-1] - H < max(pieces * width for _, pieces, width in chunks)


def test_units_are_padded_to_a_power_of_two():
    assert [padded_units(H) for H in (1, 16, 17, 64, 65, 256)] == [16, 16, 32, 64, 128, 256]


def test_shared_memory_worked_out_by_hand():
    # W_hh of an LSTM with H = 128 in bf16, and 16 rows of h and of four gates.
    assert resident_bytes("16-bit", 4, 128, 8) == 4 * 128 * 128 * 2 + 16 * 5 * 128 * 2
    assert resident_bytes("tf32x3", 4, 64, 8) == 2 * resident_bytes("tf32", 4, 64, 8)
    # 16 units of it with H = 512, and 16 rows of h.
    assert slice_bytes("16-bit", 4, 1, 16, 16, 512) == 4 * 16 * 512 * 2 + 4 * 8 * 16 * 16 * 4
    assert slice_bytes("tf32", 1, 2, 8, 32, 512) == 2 * 8 * 512 * 4 + 32 * 512 * 4
