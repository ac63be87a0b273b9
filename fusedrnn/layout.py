"""How the sequences of a call are laid out in rows, and which row follows which.

``kernels/rows.py`` says what rows and origins are. Here they are made of what a call brings:
nothing (dense), ``lengths`` and ``reset`` (dense with origins), or a PackedSequence's
``batch_sizes``. On the CPU, where lengths can be read without waiting for anybody, lengths are
packed too: the loop then does no work for steps that are not there. Axes: T time, B batch, R rows,
D directions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.rows import INITIAL, PREVIOUS, SKIPPED, SLACK, Rows, origins_of, packed_rows


class Ragged(NamedTuple):
    """What a call says about its sequences; each may be None."""

    lengths: Tensor | None = None  # [B], integers, on any device
    reset: Tensor | None = None  # bool [T, B]
    batch_sizes: Tensor | None = None  # int64 [T], on the CPU, as a PackedSequence has them


class Layout(NamedTuple):
    """Rows, and where the call's own tensors are in another order, the way there and back."""

    rows: Rows
    #: [R]: the dense row ``t * B + b`` of each row, or None where the call's order is kept.
    dense: Tensor | None = None
    order: Tensor | None = None  # [B]: the sequences by falling length
    #: [T*B]: the row of each dense row, or R where there is no step.
    source: Tensor | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether some step is missing or some state is not of the step before."""
        return self.rows.origins is not None

    def take(self, grid: Tensor) -> Tensor:
        """``[T, B, ...]`` as rows ``[R, ...]``; what is not reordered stays as it is."""
        return grid if self.dense is None else grid.flatten(0, 1).index_select(0, self.dense)

    def give(self, rows: Tensor) -> Tensor:
        """Rows ``[R, C]``, or as of ``room``, as ``[T, B, C]``, with zeros where there is no step.

        Reading rows in the grid's order takes a third of the time of writing them in theirs.
        """
        if self.source is None:
            return rows
        if rows.shape[0] == self.rows.total:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return rows.index_select(0, self.source).unflatten(0, (self.rows.T, self.rows.B))

    def room(self, columns: int, like: Tensor) -> Tensor:
        """An empty buffer for R rows in another order than the call's, which ``give`` takes without
        a copy: a row of zeros follows."""
        buffer = like.new_empty(self.rows.total + 1, columns)
        buffer[-1].zero_()
        return buffer

    def sort(self, states: Tensor) -> Tensor:
        """States ``[Z, B, H]`` in the order of the rows, contiguous."""
        return states.contiguous() if self.order is None else states.index_select(1, self.order)

    def unsort(self, states: Tensor) -> Tensor:
        """The way back from ``sort``."""
        if self.order is None:
            return states
        return torch.zeros_like(states).index_copy_(1, self.order, states)

    def part(self, buffer: Tensor) -> Tensor:
        """The beginning of a buffer ``[..., T * B, C]`` as ``[..., R, C]``, contiguous."""
        if buffer.numel() == 0 or buffer.shape[-2] == self.rows.total:
            return buffer
        shape = *buffer.shape[:-2], self.rows.total, buffer.shape[-1]
        return buffer.flatten()[: torch.Size(shape).numel()].view(shape)


@lru_cache
def _dense(T: int, B: int) -> Layout:
    return Layout(Rows(T, B))


def layout_of(input: Tensor, B: int, D: int, ragged: Ragged, compact: bool) -> Layout:
    """The layout of a call with ``input [T, B, I]``, or packed ``[R, I]``.

    compact: whether lengths are packed, for which their values must be known here.
    """
    lengths, reset, batch_sizes = ragged
    if batch_sizes is not None:
        return Layout(packed_rows(batch_sizes, D, input.device, None))
    T = input.shape[0]
    if lengths is None and reset is None:
        # A compiler looks through caches, and warns of it.
        return Layout(Rows(T, B)) if torch.compiler.is_compiling() else _dense(T, B)
    if lengths is None or not compact or B == 0:
        return Layout(Rows(T, B, origins_of(T, B, D, input.device, lengths, reset)))
    known, order = lengths.cpu().clamp(0, T).sort(descending=True, stable=True)
    is_there = torch.arange(T).unsqueeze(1) < known
    batch_sizes = is_there.sum(1)
    dense = torch.arange(T).unsqueeze(1) * B + order
    index = dense[is_there]
    reset = None if reset is None else reset.cpu().index_select(1, order)
    rows = packed_rows(batch_sizes, D, input.device, reset, B)
    return in_grid(rows, index, input.device)._replace(order=order.to(input.device))


def in_grid(rows: Rows, dense: Tensor, device: torch.device) -> Layout:
    """The layout of rows that the call's own tensors have at ``dense``, on the CPU."""
    source = torch.full((rows.T * rows.B,), rows.total)
    source[dense] = torch.arange(rows.total)
    return Layout(rows, dense.to(device), source=source.to(device))


class Links(NamedTuple):
    """For each row of one direction the rows beside it in time, ``[R]`` each."""

    sequence: Tensor  # b
    origins: Tensor
    source: Tensor  # the row of ``[initial, 0, left]`` that enters the step
    following: Tensor  # the row of the step after; any where ``goes_on`` is False
    goes_on: Tensor  # whether the step after enters with this one's state
    last: Tensor  # whether this step leaves the final state

    def entering(self, left: Tensor, initial: Tensor) -> Tensor:
        """The state ``[R, H]`` that entered each step.

        left: the state that left each step, ``[R, H]``; initial: ``[B, H]``.
        """
        zero = initial.new_zeros(1, initial.shape[1])
        return torch.cat([initial, zero, left]).index_select(0, self.source)


def links_of(rows: Rows, d: int, device: torch.device) -> Links:
    """The links of direction d. The host looks at no value, and at no row by itself."""
    T, B = rows.T, rows.B
    grid = origins_of(T, B, d + 1, device)[d] if rows.origins is None else rows.origins[d]
    starts = torch.arange(T, device=device) * B if rows.starts is None else rows.starts
    every = torch.arange(rows.total, device=device)
    time = torch.searchsorted(starts, every, right=True) - 1
    sequence = every - starts[time]
    before, after = (time - 1, time + 1) if d == 0 else (time + 1, time - 1)
    inside = (after >= 0) & (after < T)
    before, after = before.clamp(0, T - 1), after.clamp(0, T - 1)
    origins, following = grid[time, sequence], grid[after, sequence]
    begins = torch.where(origins == INITIAL, sequence, B)
    return Links(
        sequence=sequence,
        origins=origins,
        source=torch.where(origins == PREVIOUS, starts[before] + sequence + B + 1, begins),
        following=(starts[after] + sequence).clamp(max=max(rows.total - 1, 0)),
        goes_on=inside & (following == PREVIOUS),
        last=(~inside | (following == SKIPPED)) & (origins != SKIPPED),
    )


def without_padding(x: Tensor, rows: Rows) -> Tensor:
    """x ``[T, B, I]`` with zeros for the steps that are not there: what stands there may be NaN."""
    if rows.origins is None or rows.sizes is not None:
        return x
    return x.masked_fill((rows.origins[0] == SKIPPED).unsqueeze(-1), 0.0)


def with_slack(like: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """An empty ``[Z, R, C]`` with rows behind it that kernels may read of packed dgates."""
    return like.new_empty(shape[0] * shape[1] + SLACK, shape[2])[:-SLACK].view(shape)


def own_order(x: Tensor, columns: int) -> Tensor | None:
    """Of ``[T, B, I]`` that lies in memory by sequence its rows ``[B*T, I]`` as they lie, if they
    are wider than what they are multiplied into or by; else None, for a copy of x costs less.

    ``batch_first`` input would be copied to be multiplied time by time: with T = 100, B = 64,
    I = 300 that takes 1.2 ms in each direction, as long as the product itself.
    """
    if x.dim() != 3 or x.shape[-1] <= columns or x.is_contiguous():
        return None
    by_sequence = x.transpose(0, 1)
    return by_sequence.flatten(0, 1) if by_sequence.is_contiguous() else None


def by_time(rows: Tensor, like: Tensor) -> Tensor:
    """Rows ``[B*T, C]`` in the order of ``own_order`` as ``[T, B, C]``, without a copy."""
    return rows.unflatten(0, (like.shape[1], like.shape[0])).transpose(0, 1)


def by_sequence(rows: Tensor, like: Tensor) -> Tensor:
    """Rows ``[T*B, C]`` in the order of ``own_order``."""
    return rows.unflatten(0, like.shape[:2]).transpose(0, 1).flatten(0, 1)
