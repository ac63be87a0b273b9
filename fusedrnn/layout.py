"""Padded, packed and nested sequences as rows.

``kernels/rows.py`` defines rows and origins. They follow from ``lengths`` and ``reset`` or from the
``batch_sizes`` of packed rows; without these the rows are dense.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kernels.rows import INITIAL, PREVIOUS, SKIPPED, Rows, origins_of, packed_rows, packed_table
from .records import Sequences


def pack(lengths: Tensor, T: int, starts: Tensor, stride: int) -> PackedSequence:
    """Packs the numbers of rows, where step t of sequence b is row ``starts[b] + t * stride``.

    A sequence may have no step, which torch's own function refuses. All tensors are on the CPU.
    """
    lengths, order = lengths.sort(descending=True, stable=True)
    times = torch.arange(T, device="cpu").unsqueeze(1)
    is_there = times < lengths  # [T, B]
    return PackedSequence((starts[order] + times * stride)[is_there], is_there.sum(1), order)


def pack_nested(nested: Any) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
    """Packs a nested tensor, and returns its offsets with the packed row of each of its rows.

    It reads the lengths, hence waits for a GPU.
    """
    if nested.layout != torch.jagged:
        raise ValueError(f"input is a nested tensor of {nested.layout}; expected torch.jagged")
    values, offsets = nested.values(), nested.offsets()
    if values.dim() != 2 or nested.lengths() is not None or nested._ragged_idx != 1:
        raise ValueError("input is a nested tensor with holes or of other than [B, jagged, I]")
    lengths = offsets.cpu().diff()
    if not len(lengths) or not lengths.min():
        raise ValueError("input is a nested tensor with an empty sequence; expected none")
    rows, *order = pack(lengths, int(lengths.max()), offsets.cpu()[:-1], 1).to(values.device)
    return PackedSequence(values.index_select(0, rows), *order), (offsets, rows.argsort())


def to_grid(rows: Tensor, index: Tensor, T: int, B: int) -> Tensor:
    """Returns rows ``[R, C]`` at positions ``index`` of a grid ``[T, B, C]`` of zeros."""
    return rows.new_zeros(T * B, rows.shape[1]).index_copy_(0, index, rows).unflatten(0, (T, B))


def with_table(sequences: Sequences, input: Tensor, B: int, D: int) -> Sequences:
    """Returns the sequences with the table of their rows, which backward needs too."""
    lengths, reset, batch_sizes, table = sequences
    if table is not None or (lengths is None and reset is None and batch_sizes is None):
        return sequences
    if batch_sizes is not None:
        return sequences._replace(table=packed_table(batch_sizes, B, input.device))
    table = origins_of(input.shape[0], B, D, input.device, lengths, reset)
    return Sequences(lengths, reset, None, table)


def rows_of(input: Tensor, B: int, D: int, sequences: Sequences) -> Rows:
    """Returns the rows of a call with ``input [T, B, I]``, or packed ``[R, I]``."""
    _, reset, batch_sizes, table = with_table(sequences, input, B, D)
    if batch_sizes is not None and table is not None:
        return packed_rows(batch_sizes, table, D, reset)
    return Rows(input.shape[0], B, table)


def entering(rows: Rows, d: int, initial: Tensor, left: Tensor) -> Tensor:
    """Returns the state ``[R, H]`` that enters each row in direction d. Reads no value.

    ``initial`` is the initial state ``[B, H]``, and ``left [R, H]`` the one that leaves each row.
    """
    T, B, origins, device = rows.T, rows.B, rows.origins, left.device
    if origins is None:
        return torch.cat([initial, left[: (T - 1) * B]] if d == 0 else [left[B:], initial])
    # Otherwise each row's state is looked up among all states.
    starts = torch.arange(T, device=device) * B if rows.starts is None else rows.starts.long()
    every = torch.arange(left.shape[0], device=device)
    time = torch.searchsorted(starts, every, right=True) - 1
    sequence = every - starts[time]
    origin = origins[d][time, sequence]
    before = (time - 1 if d == 0 else time + 1).clamp(0, max(T - 1, 0))
    places = torch.where(origin == PREVIOUS, starts[before] + sequence + B + 1, B)
    places = torch.where(origin == INITIAL, sequence, places)
    zero = initial.new_zeros(1, initial.shape[1])
    return torch.cat([initial, zero, left]).index_select(0, places)


def final_states(rows: Rows, d: int, initial: Tensor, left: Tensor) -> Tensor:
    """Returns the state ``[B, H]`` that leaves the last step of each sequence."""
    if not left.shape[0]:
        return initial
    if rows.origins is None:
        return left[-rows.B :] if d == 0 else left[: rows.B]
    every = torch.arange(rows.B, device=left.device)
    length = (rows.origins[d] != SKIPPED).sum(0)
    last = (length - 1).clamp(min=0) if d == 0 else torch.zeros_like(length)
    row = every + (last * rows.B if rows.starts is None else rows.starts[last])
    found = left.index_select(0, row.clamp(max=left.shape[0] - 1))
    return torch.where((length > 0).unsqueeze(1), found, initial)


def without_padding(x: Tensor, rows: Rows) -> Tensor:
    """Returns x ``[T, B, I]`` with zeros in place of the padding, which may be NaN.

    Rows ``[R, I]`` have none, or zeros in its place.
    """
    if rows.origins is None or x.dim() == 2:
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
