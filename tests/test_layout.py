"""Packed rows, and their places in a grid."""

import torch

from fusedrnn.kernels.rows import Rows
from fusedrnn.layout import pack, rows_by_sequence, rows_of, to_grid
from fusedrnn.records import Sequences

T, B, D = 4, 3, 2


def test_dense_rows_have_no_tables():
    assert rows_of(torch.zeros(T, B, 5), B, D, Sequences()) == Rows(T, B)


def test_rows_are_packed_by_falling_length_and_return_to_their_places():
    grid, lengths = torch.randn(T, B, 5), torch.tensor([2, 0, 3])
    places, sizes, order, _ = pack(lengths, T, torch.arange(B), B)
    assert order.tolist() == [2, 0, 1]
    assert sizes.tolist() == [2, 2, 1, 0]
    rows = grid.flatten(0, 1)[places]
    assert torch.equal(rows[:2], grid[0, [2, 0]])
    grid[torch.arange(T).unsqueeze(1) >= lengths] = 0
    assert torch.equal(to_grid(rows, places, T, B), grid)


def test_rows_by_sequence_of_wide_batch_first_input():
    x = torch.randn(B, T, 8)
    by_time = x.transpose(0, 1)
    assert rows_by_sequence(by_time, 4).data_ptr() == x.data_ptr()
    assert rows_by_sequence(by_time, 8) is None  # no wider than the result
    assert rows_by_sequence(by_time.contiguous(), 4) is None
    assert rows_by_sequence(by_time[:, :, ::2], 2) is None
    assert rows_by_sequence(x.flatten(0, 1), 4) is None
