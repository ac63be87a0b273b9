"""The layout of a call: the grid of steps and sequences, and the rows that the layers compute.

``kernels/rows.py`` defines rows and origins. They follow from ``lengths`` and ``reset`` or from the
``batch_sizes`` of a PackedSequence; without these the rows are dense. On the CPU, where reading
lengths costs no synchronisation, lengths are packed too, so that missing steps cost nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.rows import (
    INITIAL,
    PREVIOUS,
    SKIPPED,
    Rows,
    origins_of,
    packed_rows,
    packed_table,
)


class Sequences(NamedTuple):
    """The sequences of a call; each field may be None."""

    lengths: Tensor | None = None  # [B], integers, on any device
    reset: Tensor | None = None  # bool [T, B]
    batch_sizes: Tensor | None = None  # int64 [T] on the CPU, as in a PackedSequence
    table: Tensor | None = None  # of these, ``packed_table`` on the input's device

    def with_table(self, B: int, device: torch.device) -> "Sequences":
        """Returns the sequences with the table of packed input, which backward needs too."""
        if self.batch_sizes is None or self.table is not None:
            return self
        return self._replace(table=packed_table(self.batch_sizes, B, device))


class Layout(NamedTuple):
    """The rows of a call, and the indices between them and the grid where their orders differ."""

    rows: Rows
    grid_index: Tensor | None = None  # [R], the grid position ``t * B + b`` of each row
    order: Tensor | None = None  # [B], the sequences by falling length
    row_index: Tensor | None = None  # [T*B], the row of each grid position, R where there is none

    def to_rows(self, grid: Tensor) -> Tensor:
        """Gathers ``[T, B, ...]`` into rows ``[R, ...]``; returns it as it is in the same order."""
        if self.grid_index is None:
            return grid
        return grid.flatten(0, 1).index_select(0, self.grid_index)

    def to_grid(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Gathers rows ``[R, C]``, or as of ``empty_rows``, into ``[T, B, C]`` with zeros between.

        Returns them as they are where the order is the same. ``out`` receives the result.
        """
        if self.row_index is None:
            return rows
        if rows.shape[0] == self.rows.total:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if out is not None:
            torch.index_select(rows, 0, self.row_index, out=out.view(-1, rows.shape[1]))
            return out
        return rows.index_select(0, self.row_index).unflatten(0, (self.rows.T, self.rows.B))

    def empty_rows(self, columns: int, like: Tensor) -> Tensor:
        """Allocates rows and, where ``to_grid`` needs it, a row of zeros behind them."""
        if self.row_index is None:
            return like.new_empty(self.rows.total, columns)
        buffer = like.new_empty(self.rows.total + 1, columns)
        buffer[-1].zero_()
        return buffer

    def sort_states(self, states: Tensor) -> Tensor:
        """Returns states ``[Z, B, H]`` in the order of the rows, contiguous."""
        return states.contiguous() if self.order is None else states.index_select(1, self.order)

    def unsort_states(self, states: Tensor) -> Tensor:
        """Returns states ``[Z, B, H]`` in the order of the call."""
        if self.order is None:
            return states
        return torch.empty_like(states).index_copy_(1, self.order, states)

    def trim(self, buffer: Tensor) -> Tensor:
        """Returns the beginning of a buffer ``[..., T*B, C]`` as ``[..., R, C]``, contiguous."""
        if buffer.numel() == 0 or buffer.shape[-2] == self.rows.total:
            return buffer.contiguous()
        shape = *buffer.shape[:-2], self.rows.total, buffer.shape[-1]
        return buffer.flatten()[: torch.Size(shape).numel()].view(shape)


def layout_of(input: Tensor, B: int, D: int, sequences: Sequences, compact: bool) -> Layout:
    """Returns the layout of a call with ``input [T, B, I]``, or packed ``[R, I]``.

    compact: whether lengths are packed, for which their values are read.
    """
    lengths, reset, batch_sizes, table = sequences.with_table(B, input.device)
    if batch_sizes is not None and table is not None:
        return Layout(packed_rows(batch_sizes, table, D))
    T = input.shape[0]
    if lengths is None and reset is None:
        return Layout(Rows(T, B))
    if lengths is None or not compact or B == 0:
        return Layout(Rows(T, B, origins_of(T, B, D, input.device, lengths, reset)))
    known, order = lengths.cpu().clamp(0, T).sort(descending=True, stable=True)
    times = torch.arange(T, device="cpu").unsqueeze(1)
    is_there = times < known
    reset = None if reset is None else reset.cpu().index_select(1, order)
    sizes = is_there.sum(1)
    rows = packed_rows(sizes, packed_table(sizes, B, input.device), D, reset)
    grid_index = (times * B + order)[is_there]
    return with_index(rows, grid_index, input.device)._replace(order=order.to(input.device))


def with_index(rows: Rows, grid_index: Tensor, device: torch.device) -> Layout:
    """Returns the layout of rows that are at ``grid_index`` (on the CPU) of the call's grid."""
    row_index = torch.full((rows.T * rows.B,), rows.total, device="cpu")
    row_index[grid_index] = torch.arange(rows.total, device="cpu")
    grid_index, row_index = (i.to(device, non_blocking=True) for i in (grid_index, row_index))
    return Layout(rows, grid_index, row_index=row_index)


def previous_rows(rows: Rows, d: int, device: torch.device) -> Tensor:
    """Returns for each row the state that enters it in direction d, ``[R]``.

    The index is one into ``[initial, zero, left]``, as in ``entering``. Reads no value.
    """
    T, B = rows.T, rows.B
    origins, starts = _table(rows, d, device)
    every = torch.arange(rows.total, device=device)
    time = torch.searchsorted(starts, every, right=True) - 1
    sequence = every - starts[time]
    before = (time - 1 if d == 0 else time + 1).clamp(0, max(T - 1, 0))
    origins = origins[time, sequence]
    begins = torch.where(origins == INITIAL, sequence, B)
    return torch.where(origins == PREVIOUS, starts[before] + sequence + B + 1, begins)


def entering(previous: Tensor, initial: Tensor, left: Tensor) -> Tensor:
    """Returns the state ``[R, H]`` that enters each row, by the index of ``previous_rows``.

    ``initial`` is the initial state ``[B, H]``, and ``left [R, H]`` the one that leaves each row.
    """
    zero = initial.new_zeros(1, initial.shape[1])
    return torch.cat([initial, zero, left]).index_select(0, previous)


def final_states(rows: Rows, d: int, initial: Tensor, left: Tensor) -> Tensor:
    """Returns the state ``[B, H]`` that leaves the last step of each sequence in direction d."""
    if not left.shape[0]:
        return initial
    origins, starts = _table(rows, d, left.device)
    length = (origins != SKIPPED).sum(0)
    last = (length - 1).clamp(min=0) if d == 0 else torch.zeros_like(length)
    row = starts[last] + torch.arange(rows.B, device=left.device)
    found = left.index_select(0, row.clamp(max=left.shape[0] - 1))
    return torch.where((length > 0).unsqueeze(1), found, initial)


def _table(rows: Rows, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the origins ``[T, B]`` of direction d and the first row ``[T]`` of each step."""
    T, B = rows.T, rows.B
    origins = origins_of(T, B, d + 1, device)[d] if rows.origins is None else rows.origins[d]
    starts = torch.arange(T, device=device) * B if rows.starts is None else rows.starts
    return origins, starts


def without_padding(x: Tensor, rows: Rows) -> Tensor:
    """Returns x ``[T, B, I]`` with zeros in place of the padding, which may be NaN."""
    if rows.origins is None or rows.sizes is not None:
        return x
    return x.masked_fill((rows.origins[0] == SKIPPED).unsqueeze(-1), 0.0)


def rows_by_sequence(x: Tensor, columns: int) -> Tensor | None:
    """Returns x ``[T, B, I]`` as its rows ``[B*T, I]`` if it lies in memory by sequence, else None.

    None too if x is no wider than the other factor of a product: copying x costs less.
    """
    if x.dim() != 3 or x.shape[-1] <= columns or x.is_contiguous():
        return None
    by_sequence = x.transpose(0, 1)
    return by_sequence.flatten(0, 1) if by_sequence.is_contiguous() else None
