"""One layer as a loop over time in plain torch, in place: the backend of the CPU.

A step's state is the row of ``out`` (and of ``cs``) that it writes anyway, and gx is overwritten by
the gates. Step t of packed rows works on the first ``sizes[t]`` sequences. The equations are in
``loop_cells.py``.
"""

import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .kernels.rows import INITIAL, SKIPPED, ZERO, Rows
from .kernels.tensors import Grads, Layers
from .layout import entering, final_states
from .loop_cells import CELLS, Direction


def folded_bias(cell: str, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """Returns b_ih plus b_hh, but for the part of b_hh that the cell adds by itself."""
    if cell != "gru":
        return b_ih + b_hh
    shared = len(b_ih) // 3 * 2  # b_hn is multiplied by r
    return torch.cat([b_ih[:shared] + b_hh[:shared], b_ih[shared:]])


class _Steps:
    """The steps of one direction: how many sequences each has, and how its state enters."""

    def __init__(self, rows: Rows, d: int) -> None:
        self.sizes = [rows.B] * rows.T if rows.sizes is None else rows.sizes.tolist()
        self.order = range(rows.T)[:: 1 if d == 0 else -1]
        self.origins: Any = None if rows.origins is None else rows.origins[d]
        # Packed rows skip no step, and their order tells where a sequence begins.
        is_padded = self.origins is not None and rows.sizes is None
        self.initial = self._masks(INITIAL) if is_padded else {}
        self.skipped = self._masks(SKIPPED) if is_padded else {}
        self.zero = {} if self.origins is None else self._masks(ZERO)
        resized: set[int] = set()
        if rows.sizes is not None:
            before = [rows.B, *(self.sizes[t] for t in self.order)]
            resized = {t for t, n in zip(self.order, before, strict=False) if self.sizes[t] != n}
        #: The steps whose state is not simply the one that left the step before.
        self.cut = resized | self.initial.keys() | self.zero.keys()

    def _masks(self, kind: int) -> dict[int, Tensor]:
        """Returns the sequences ``[n, 1]`` of a kind for each step that has some."""
        masks = (self.origins == kind).unsqueeze(2)
        steps = masks.flatten(1).any(1).nonzero().flatten().tolist()
        return {t: masks[t, : self.sizes[t]] for t in steps}

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Cuts rows ``[R, .]`` into those of each step."""
        return rows.split_with_sizes(self.sizes)

    def prefix(self, state: Tensor) -> Sequence[Tensor]:
        """Returns for each step the sequences ``[n, .]`` that it has of a state ``[B, .]``."""
        views = {n: state[:n] for n in set(self.sizes)}
        return [views[n] for n in self.sizes]

    def entering(self, t: int, initial: Sequence[Tensor], left: Sequence[Tensor]) -> Sequence:
        """Returns the states ``[n, H]`` that enter step t.

        left: the states that left the step before, of its sequences.
        """
        n, known, pairs = self.sizes[t], left[0].shape[0], zip(initial, left, strict=True)
        if t in self.initial:
            left = [torch.where(self.initial[t], first, state) for first, state in pairs]
        elif known < n:
            left = [torch.cat([state, first[known:n]]) for first, state in pairs]
        elif known > n:
            left = [state[:n] for state in left]
        return [state.masked_fill(self.zero[t], 0) for state in left] if t in self.zero else left

    def clear_skipped(self, *tensors: Tensor) -> None:
        """Fills the rows of skipped steps with zeros."""
        if self.skipped:
            skipped = (self.origins == SKIPPED).view(-1, 1)
            for tensor in tensors:
                tensor.masked_fill_(skipped, 0)


@cache
def _survive_forks() -> None:
    """Gives forked processes one thread, as DataLoader does, for OpenMP's do not survive a fork."""
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def forward(cell: str, layers: Layers, rows: Rows) -> None:
    """Runs one layer: fills out, h_n, c_n and, if given, cs; turns gx into the gates.

    ``layers.gx [D, R, max(G, S)*H]`` holds in its first columns ``x W_ih^T`` plus the bias of
    ``folded_bias``; ``layers.gates`` is that buffer where gates are saved.
    """
    _survive_forks()
    H = layers.w_hh[0].shape[1]
    with torch._C._AutoDispatchBelowAutograd():
        for d, w_hh in enumerate(layers.w_hh):
            steps, gates = _Steps(rows, d), layers.gx[d]
            initial, left = [layers.h_0[d]], [layers.out[d][:, d * H : (d + 1) * H]]
            if layers.c_0 is not None:
                initial.append(layers.c_0[d])
                left.append(gates.new_empty(rows.total, H) if layers.cs is None else layers.cs[d])
            b_hh = None if layers.b_hh is None else layers.b_hh[d]
            scratch, new = steps.prefix(torch.empty_like(initial[0])), list(map(steps.split, left))
            step = CELLS[cell][0](Direction(gates, w_hh, b_hh, scratch, steps.split, *new))
            states, cut = list(zip(*new, strict=True)), steps.cut
            state: Sequence[Any] = initial
            for t in steps.order:
                if t in cut:
                    state = steps.entering(t, initial, state)
                step(t, *state)
                state = states[t]
            steps.clear_skipped(gates, *left)
            for final, *ends in zip((layers.h_n, layers.c_n), initial, left, strict=False):
                final[d] = final_states(rows, d, *ends)


def backward(cell: str, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs one layer backwards: fills ``grads.gates``, ``grads.h_0`` and ``grads.c_0``."""
    H = layers.w_hh[0].shape[1]
    with torch._C._AutoDispatchBelowAutograd():
        for d, w_hh in enumerate(layers.w_hh):
            steps, columns = _Steps(rows, d), slice(d * H, (d + 1) * H)
            states = [grads.h_0[d].copy_(grads.h_n[d])]
            arriving = [None if grads.out is None else grads.out[:, columns]]
            pair: Any = layers.h_0[d], layers.out[d][:, columns]
            if layers.c_0 is not None:
                states.append(grads.c_0[d].copy_(grads.c_n[d]))
                arriving.append(None if grads.cs is None else grads.cs[d])
                pair = layers.c_0[d], layers.cs[d]
            carried = list(map(steps.prefix, states))
            scratch = steps.prefix(torch.empty_like(states[0]))
            own = layers.gates[d], w_hh, None, scratch, steps.split, carried[0], carried[-1]
            saved = grads.gates[d], pair[1], partial(entering, rows, d, *pair)
            step = CELLS[cell][1](Direction(*own, *saved))
            pairs = zip(carried, arriving, strict=True)
            added = [(state, steps.split(grad)) for state, grad in pairs if grad is not None]
            skipped, zero = steps.skipped, steps.zero
            for t in reversed(steps.order):
                kept = [state.clone() for state in states] if t in skipped else ()
                for state, grad in added:
                    state[t].add_(grad[t])
                step(t)
                if t in skipped:
                    for old, state in zip(kept, states, strict=True):
                        torch.where(skipped[t], old, state, out=state)
                if t in zero:  # 0 times inf would be NaN
                    for state in states:
                        state[: len(zero[t])].masked_fill_(zero[t], 0)
            steps.clear_skipped(grads.gates[d])
