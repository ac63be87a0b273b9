"""Rows and grid: the order of rows and the indices between them."""

from __future__ import annotations

import torch

from fusedrnn.kernels.rows import Rows, origins_of
from fusedrnn.layout import Sequences, layout_of, rows_by_sequence, without_padding

T, B, D, CPU = 4, 3, 2, torch.device("cpu")
LENGTHS = torch.tensor([3, 0, 2])
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[1, 0] = True


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


def test_compact_rows_there_and_back():
    x = torch.randn(T, B, 5)
    layout = layout_of(x, B, D, Sequences(LENGTHS, RESET), True)
    rows = layout.to_rows(x)
    assert rows.shape == (5, 5)
    assert torch.equal(rows, torch.stack([x[0, 0], x[0, 2], x[1, 0], x[1, 2], x[2, 0]]))
    there = torch.arange(T).unsqueeze(1) < LENGTHS
    want = torch.where(there.unsqueeze(2), x, 0.0)
    assert torch.equal(layout.to_grid(rows), want)
    spare = layout.empty_rows(5, x)
    spare[:-1] = rows
    out = torch.full_like(x, float("nan"))
    assert torch.equal(layout.to_grid(spare, out=out), want)
    assert torch.equal(out, want)
    states = torch.randn(2, B, 4)
    assert torch.equal(layout.sort_states(states), states[:, [0, 2, 1]])
    assert torch.equal(layout.unsort_states(layout.sort_states(states)), states)
    buffer = torch.zeros(2, T * B, 4)
    part = layout.trim(buffer)
    assert part.shape == (2, 5, 4)
    assert part.is_contiguous()
    assert part.data_ptr() == buffer.data_ptr()


def test_lengths_stay_dense_unless_they_may_be_read():
    layout = layout_of(torch.zeros(T, B, 5), B, D, Sequences(LENGTHS), False)
    assert layout.grid_index is None
    assert layout.rows.sizes is None
    assert layout.rows.origins.shape == (D, T, B)


def test_padding_is_zeroed_only_where_there_is_some():
    x = torch.full((T, B, 2), float("nan"))
    assert without_padding(x, Rows(T, B)) is x
    found = without_padding(x, Rows(T, B, origins_of(T, B, 1, CPU, LENGTHS)))
    there = torch.arange(T).unsqueeze(1) < LENGTHS
    assert (found[~there] == 0).all()
    assert found[there].isnan().all()


def test_rows_by_sequence_of_wide_batch_first_input():
    x = torch.randn(B, T, 8)
    by_time = x.transpose(0, 1)
    assert rows_by_sequence(by_time, 4).data_ptr() == x.data_ptr()
    assert rows_by_sequence(by_time, 8) is None  # no wider than the result
    assert rows_by_sequence(by_time.contiguous(), 4) is None
    assert rows_by_sequence(by_time[:, :, ::2], 2) is None
    assert rows_by_sequence(x.flatten(0, 1), 4) is None
