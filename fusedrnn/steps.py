"""The rows of one direction cut into steps, for a loop in torch: views, masks and entering states.

Axes: T time, B batch, H hidden, D directions, R rows (``kernels/rows.py``), n the sequences that a
step has. A step's state is a row of the history that the loop writes anyway (``out``, and c of
every step), so no state is carried beside it, and nothing is copied from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.rows import INITIAL, SKIPPED, ZERO, Rows


class Part(NamedTuple):
    """Some steps that follow each other, in the order of time, with rows of their own."""

    times: range
    rows: slice  # of all rows
    sizes: list[int]

    @property
    def total(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def most(self) -> int:
        """The sequences of its largest step, the first: they only ever fall."""
        return self.sizes[0] if self.sizes else 0

    def split(self, own: Tensor) -> tuple[Tensor, ...]:
        """Of what has the rows of the part, those of each step."""
        return own.split_with_sizes(self.sizes)

    def prefix(self, state: Tensor) -> list[Tensor]:
        """Of what has B rows, or as many as the largest step, those of each step."""
        sizes, B = self.sizes, state.shape[0]
        if not sizes or sizes[-1] == B:
            return [state] * len(sizes)
        views = {n: state[:n] for n in set(sizes)}
        return [views[n] for n in sizes]

    def within(self, other: Part) -> slice:
        """Its rows among those of a part that has it."""
        return slice(self.rows.start - other.rows.start, self.rows.stop - other.rows.start)


class Steps:
    """The rows of one direction, cut into steps.

    Packed sequences stand by falling length, so a step works on the first n of them: in the forward
    direction those behind have ended, in the backward direction they have yet to begin.
    """

    def __init__(self, rows: Rows, d: int) -> None:
        self.rows, self.T, self.B, self.d = rows, rows.T, rows.B, d
        self.sizes = [rows.B] * rows.T if rows.sizes is None else rows.sizes.tolist()
        self.starts = [0, *accumulate(self.sizes)]
        self.whole = Part(range(self.T), slice(0, self.starts[-1]), self.sizes)
        self.order = range(self.T) if d == 0 else range(self.T - 1, -1, -1)
        #: Whether every step has all sequences and enters with the state of the step before.
        self.is_dense = rows.sizes is None and rows.origins is None
        kinds = (ZERO, SKIPPED, INITIAL)
        self.zero, self.skipped, self.initial = (self._masks(rows, kind) for kind in kinds)
        self.skips = any(mask is not None for mask in self.skipped)

    def _masks(self, rows: Rows, kind: int) -> list[Tensor | None]:
        """A mask ``[n, 1]`` for each step, or None where the CPU sees that it masks nothing."""
        if rows.origins is None or (rows.sizes is not None and kind != ZERO):
            return [None] * self.T  # what is packed skips nothing, and its order tells INITIAL
        of_all = rows.origins[self.d] == kind
        # A look at a GPU's values would wait for it.
        needed = [True] * self.T if of_all.is_cuda else of_all.any(1).tolist()
        if not any(needed):
            return [None] * self.T
        masks = zip(of_all.unsqueeze(2).unbind(0), self.sizes, needed, strict=True)
        return [mask[:n] if need else None for mask, n, need in masks]

    def entering(self, initial: Tensor, history: Sequence[Tensor]) -> Iterable[Tensor]:
        """The state ``[n, .]`` that enters each step, in the order of the direction; not to be
        written to.

        initial: ``[B, .]``; history: what left each step, read when the next one asks.
        """
        if self.is_dense:
            left = history if self.d == 0 else history[::-1]
            return [initial, *left[:-1]]
        return self._entering(initial, history)

    def _entering(self, initial: Tensor, history: Sequence[Tensor]) -> Iterator[Tensor]:
        left, known = initial, 0
        for t in self.order:
            n = self.sizes[t]
            if not known:
                state = initial if n == self.B else initial[:n]
            elif known < n:
                state = torch.cat([left, initial[known:n]])
            else:
                state = left if known == n else left[:n]
            if (mask := self.initial[t]) is not None:
                state = torch.where(mask, initial, state)
            if (mask := self.zero[t]) is not None:
                # Whatever it holds: a product with 0 would keep inf and NaN.
                state = state.masked_fill(mask, 0)
            yield state
            left, known = history[t], n

    def finish(self, initial: Tensor, by_row: Tensor, to: Tensor) -> None:
        """Fills ``to [B, .]`` with each sequence's final state; one without a step keeps initial.

        by_row: what left each step, ``[R, .]``.
        """
        sizes, starts = self.sizes, self.starts
        if self.rows.sizes is not None:
            first = sizes[0]
            to[first:] = initial[first:]
            if self.d:
                to[:first] = by_row[:first]
                return
            for t, (n, after) in enumerate(zip(sizes, [*sizes[1:], 0], strict=True)):
                if after < n:
                    to[after:n] = by_row[starts[t] + after : starts[t + 1]]
            return
        if not self.skips:
            start = starts[self.order[-1]]
            to.copy_(by_row[start : start + self.B])
            return
        by_time = by_row.unflatten(0, (self.T, self.B))
        assert self.rows.origins is not None
        there = self.rows.origins[self.d] != SKIPPED
        last = there.sum(0).sub_(1).clamp_min_(0) if self.d == 0 else there.new_zeros(self.B).long()
        left = by_time[last, torch.arange(self.B, device=last.device)]
        torch.where(there.any(0).unsqueeze(1), left, initial, out=to)

    def cut(self, whole: Part, limit: int) -> list[Part]:
        """A part in parts of at most ``limit`` rows, but of one step at least, in the order of
        backward."""
        if whole.total <= limit:
            return [whole] if whole.sizes else []
        found, first, stop = [], whole.times.start, whole.times.stop
        for t in range(first + 1, stop + 1):
            if t == stop or self.starts[t + 1] - self.starts[first] > limit:
                rows = slice(self.starts[first], self.starts[t])
                found.append(Part(range(first, t), rows, self.sizes[first:t]))
                first = t
        return found[::-1] if self.d == 0 else found

    def entered(self, initial: Tensor, by_row: Tensor) -> Callable[[Part], list[Tensor]]:
        """What gives the states that entered a part, in pieces by their order; not to be written
        to.

        initial: ``[B, .]``; by_row: what left each step, ``[R, .]``.
        """
        history = () if self.is_dense else self.whole.split(by_row)

        def gathered(part: Part) -> list[Tensor]:
            pieces = []
            for t in part.times:
                n, previous = self.sizes[t], t - 1 if self.d == 0 else t + 1
                known = self.sizes[previous] if 0 <= previous < self.T else 0
                if known:
                    pieces.append(history[previous] if known <= n else history[previous][:n])
                if known < n or n == 0:
                    pieces.append(initial[known:n])
            entering = torch.cat(pieces)
            for t, state in zip(part.times, part.split(entering), strict=True):
                if (mask := self.initial[t]) is not None:
                    torch.where(mask, initial, state, out=state)
                if (mask := self.zero[t]) is not None:
                    state.masked_fill_(mask, 0)
            return [entering]

        def next_to_it(part: Part) -> list[Tensor]:
            """Dense: the rows of a step before, which lie in one piece but at the first step."""
            shift = -self.B if self.d == 0 else self.B
            first, last = part.rows.start + shift, part.rows.stop + shift
            total = by_row.shape[0]
            if first >= 0 and last <= total:
                return [by_row[first:last]]
            if self.d == 0:
                return [initial, by_row[:last]] if last else [initial]
            return [by_row[first:], initial] if first < total else [initial]

        return next_to_it if self.is_dense else gathered
