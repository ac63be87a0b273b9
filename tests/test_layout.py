"""Rows and grid: the order of rows, the indices between them, and the states that enter them."""

from __future__ import annotations

import pytest
import torch

from fusedrnn.kernels.rows import INITIAL, PREVIOUS, SKIPPED, ZERO, Rows, origins_of, packed_rows
from fusedrnn.layout import (
    Sequences,
    entering,
    final_states,
    layout_of,
    previous_rows,
    rows_by_sequence,
    without_padding,
)

T, B, D, CPU = 4, 3, 2, torch.device("cpu")
LENGTHS = torch.tensor([3, 0, 2])
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[1, 0] = True


def test_origins_of_the_documented_example():
    """Compares with the table in docs/design.md."""
    origins = origins_of(T, B, D, CPU, LENGTHS, RESET)
    forward = [[INITIAL, ZERO, PREVIOUS, SKIPPED], [SKIPPED] * 4,
               [INITIAL, PREVIOUS, SKIPPED, SKIPPED]]  # fmt: skip
    backward = [[ZERO, PREVIOUS, INITIAL, SKIPPED], [SKIPPED] * 4,
                [PREVIOUS, INITIAL, SKIPPED, SKIPPED]]  # fmt: skip
    assert origins.transpose(1, 2).tolist() == [forward, backward]


def test_rows_of_packed_input():
    rows = packed_rows(torch.tensor([3, 2, 2, 1]), 2, CPU)
    assert rows.total == 8
    assert rows.starts.tolist() == [0, 3, 5, 7]
    assert rows.origins[0].tolist() == [[3, 3, 3], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert rows.origins[1].tolist() == [[1, 1, 3], [1, 1, 0], [1, 3, 0], [3, 0, 0]]


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


def rows_in_every_form():
    sizes = torch.tensor([3, 2, 2, 0])
    yield Rows(T, B), torch.full((B,), T)
    yield Rows(T, B, origins_of(T, B, D, CPU, LENGTHS, RESET)), LENGTHS
    yield packed_rows(sizes, D, CPU, RESET), torch.tensor([3, 3, 1])
    yield packed_rows(sizes, D, CPU, None, B + 1), torch.tensor([3, 3, 1, 0])


@pytest.mark.parametrize("d", [0, 1])
def test_entering_and_final_states(d):
    """Against one sequence after the other, step by step."""
    for rows, lengths in rows_in_every_form():
        initial = torch.randn(rows.B, 2)
        left, spans = torch.randn(rows.total, 2), rows.spans()
        origins = origins_of(T, rows.B, d + 1, CPU) if rows.origins is None else rows.origins
        want, ends = torch.zeros(rows.total, 2), initial.clone()
        for b, n in enumerate(lengths.tolist()):
            for t in range(n)[:: 1 if d == 0 else -1]:
                row = spans[t].start + b
                kind = origins[d][t, b]
                want[row] = {INITIAL: initial[b], ZERO: torch.zeros(2), PREVIOUS: ends[b]}[
                    int(kind)
                ]
                ends[b] = left[row]
        found = entering(previous_rows(rows, d, CPU), initial, left)
        assert torch.equal(found, want)
        assert torch.equal(final_states(rows, d, initial, left), ends)


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
