"""Rows and grid: the order of rows and the indices between them."""

from __future__ import annotations

import torch

from fusedrnn.kernels.rows import Rows
from fusedrnn.layout import Sequences, layout_of, rows_by_sequence

T, B, D = 4, 3, 2


def test_dense_rows_have_no_tables():
    x = torch.zeros(T, B, 5)
    layout = layout_of(x, B, D, Sequences(), True)
    assert layout == (Rows(T, B), None, None, None)
    assert layout.to_rows(x) is x
    assert layout.to_grid(x) is x
    assert layout.sort_states(x) is x
    assert layout.unsort_states(x) is x
    buffer = torch.zeros(2, T * B, 5)
    assert layout.trim(buffer) is buffer


def test_rows_by_sequence_of_wide_batch_first_input():
    x = torch.randn(B, T, 8)
    by_time = x.transpose(0, 1)
    assert rows_by_sequence(by_time, 4).data_ptr() == x.data_ptr()
    assert rows_by_sequence(by_time, 8) is None  # no wider than the result
    assert rows_by_sequence(by_time.contiguous(), 4) is None
    assert rows_by_sequence(by_time[:, :, ::2], 2) is None
    assert rows_by_sequence(x.flatten(0, 1), 4) is None
