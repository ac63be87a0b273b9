"""One layer as a loop over time in plain torch, in place: the backend of the CPU.

A step's state is the row of ``out`` (and of ``cs``) that it writes anyway, gx is overwritten by the
gates, and backward computes all that does not depend on the gradients before its loop. Step t of
packed rows works on the first ``sizes[t]`` sequences. The equations are in ``loop_cells.py``.
"""

import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .kernels.rows import INITIAL, SKIPPED, ZERO, Rows
from .kernels.spec import SPECS
from .kernels.tensors import Grads, Layers
from .layout import entering, final_states, previous_rows
from .loop_cells import CELLS, Backward, Forward


def workspace_tiles(cell: str) -> int:
    """Returns the tiles of H of the buffer that holds gx, and the gates in its place."""
    return max(SPECS[cell].gates, SPECS[cell].saved)


def folded_bias(cell: str, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """Returns b_ih plus b_hh, but for the part of b_hh that the cell adds by itself."""
    if cell != "gru":
        return b_ih + b_hh
    bias, shared = b_ih.clone(), len(b_ih) // 3 * 2  # b_hn is multiplied by r
    bias[:shared].add_(b_hh[:shared])
    return bias


class _Steps:
    """The steps of one direction: how many sequences each has, and how its state enters."""

    def __init__(self, rows: Rows, d: int) -> None:
        self.rows, self.d = rows, d
        self.sizes = [rows.B] * rows.T if rows.sizes is None else rows.sizes.tolist()
        self.order = range(rows.T)[:: 1 if d == 0 else -1]
        # Packed rows skip no step, and their order tells where a sequence begins.
        kinds = (ZERO,) if rows.sizes is not None else (INITIAL, ZERO, SKIPPED)
        self.masks: dict[int, Sequence[Any]] = {}
        origins: Any = rows.origins
        for kind in kinds if origins is not None else ():
            mask = origins[d].unsqueeze(2) == kind
            if bool(mask.any()):
                some = mask.flatten(1).any(1).tolist()
                parts = zip(mask.unbind(), self.sizes, some, strict=True)
                self.masks[kind] = [m[:n] if any_ else None for m, n, any_ in parts]
        self.is_dense = rows.sizes is None and not self.masks

    def mask(self, kind: int, t: int) -> Tensor | None:
        """Returns the sequences ``[n, 1]`` whose step t is of a kind, or None for none."""
        return self.masks[kind][t] if kind in self.masks else None

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Cuts rows ``[R, .]`` into those of each step."""
        return rows.split_with_sizes(self.sizes)

    def prefix(self, state: Tensor) -> Sequence[Tensor]:
        """Returns for each step the sequences ``[n, .]`` that it has of a state ``[B, .]``."""
        B = state.shape[0]
        views = {n: state if n == B else state[:n] for n in set(self.sizes)}
        return [views[n] for n in self.sizes]

    def entering(self, t: int, initial: Any, left: Tensor) -> Tensor:
        """Returns the state ``[n, H]`` that enters step t.

        left: the state that left the step before, of its sequences.
        """
        n, known = self.sizes[t], left.shape[0]
        state = left
        if known != n:
            state = left[:n] if known > n else torch.cat([left, initial[known:n]])
        if (mask := self.mask(INITIAL, t)) is not None:
            state = torch.where(mask, initial[:n], state)
        if (mask := self.mask(ZERO, t)) is not None:
            state = state.masked_fill(mask, 0)
        return state

    def all_entering(self, initial: Tensor, left: Tensor) -> Tensor:
        """Returns the state ``[R, H]`` that enters each row, from those that leave the rows."""
        if not self.is_dense:
            return entering(previous_rows(self.rows, self.d, left.device), initial, left)
        rest = left.shape[0] - self.rows.B
        if rest < 0:
            return left
        parts = [initial, left[:rest]] if self.d == 0 else [left[self.rows.B :], initial]
        return torch.cat(parts)

    def final(self, initial: Tensor, left: Any) -> Tensor:
        """Returns the state ``[B, H]`` that leaves the last step of each sequence."""
        if not self.is_dense:
            return final_states(self.rows, self.d, initial, left)
        if not self.sizes:
            return initial
        return left[-self.rows.B :] if self.d == 0 else left[: self.rows.B]


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
            steps, h_0 = _Steps(rows, d), layers.h_0[d]
            hs = layers.out[d][:, d * H : (d + 1) * H]
            c_0, c, cs = None, None, None
            if layers.c_0 is not None:
                c_0 = layers.c_0[d]
                cs = c_0.new_empty(rows.total, H) if layers.cs is None else layers.cs[d]
                c = steps.split(cs)
            b_hh = None if layers.b_hh is None else layers.b_hh[d]
            scratch = steps.prefix(torch.empty_like(h_0))
            operands = Forward(layers.gx[d], steps.split(hs), c, w_hh, b_hh, scratch, steps.split)
            _run_steps(steps, CELLS[cell].forward(operands), operands, h_0, c_0)
            layers.h_n[d] = steps.final(h_0, hs)
            if c_0 is not None:
                layers.c_n[d] = steps.final(c_0, cs)


def _run_steps(steps: _Steps, step: Any, on: Forward, h_0: Tensor, c_0: Any) -> None:
    """Runs the steps of one direction in their order."""
    c_left: Any = c_0
    h_left = h_0
    if steps.is_dense:
        for t in steps.order:
            step(t, h_left, c_left)
            h_left, c_left = on.h[t], None if on.c is None else on.c[t]
        return
    gates = steps.split(on.gates) if SKIPPED in steps.masks else ()
    n = steps.sizes[steps.order[0]] if steps.order else 0
    h_left, c_left = h_0[:n], None if c_0 is None else c_0[:n]
    for t in steps.order:
        h = steps.entering(t, h_0, h_left)
        step(t, h, None if c_0 is None else steps.entering(t, c_0, c_left))
        h_left, c_left = on.h[t], None if on.c is None else on.c[t]
        if (skipped := steps.mask(SKIPPED, t)) is not None:
            for written in (h_left, c_left, gates[t]):
                if written is not None:
                    written.masked_fill_(skipped, 0)


def backward(cell: str, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs one layer backwards: fills ``grads.gates``, ``grads.h_0`` and ``grads.c_0``."""
    H = layers.w_hh[0].shape[1]
    with torch._C._AutoDispatchBelowAutograd():
        for d, w_hh in enumerate(layers.w_hh):
            steps, columns = _Steps(rows, d), slice(d * H, (d + 1) * H)
            hs, dh = layers.out[d][:, columns], grads.h_0[d].copy_(grads.h_n[d])
            arriving = [] if grads.out is None else [(dh, grads.out[:, columns])]
            c = dc = None
            if layers.c_0 is None:
                before = steps.all_entering(layers.h_0[d], hs)
            else:
                c, dc = layers.cs[d], grads.c_0[d].copy_(grads.c_n[d])
                before = steps.all_entering(layers.c_0[d], c)
                arriving += [] if grads.cs is None else [(dc, grads.cs[d])]
            operands = Backward(
                layers.gates[d], grads.gates[d], hs, c, before, steps.prefix(dh),
                None if dc is None else steps.prefix(dc), w_hh,
                steps.prefix(torch.empty_like(dh)), steps.split,
            )  # fmt: skip
            states = [dh] if dc is None else [dh, dc]
            _run_steps_back(steps, CELLS[cell].backward(operands), operands, arriving, states)


def _run_steps_back(
    steps: _Steps,
    step: Any,
    on: Backward,
    arriving: Sequence[tuple[Tensor, Tensor]],
    states: Sequence[Tensor],
) -> None:
    """Runs the steps of one direction against their order.

    ``arriving`` pairs gradients that are carried ``[B, H]`` with what reaches them ``[R, H]``.
    """
    added = [(steps.prefix(state), steps.split(grad)) for state, grad in arriving]
    if steps.is_dense:
        for t in reversed(steps.order):
            for carried, grad in added:
                carried[t].add_(grad[t])
            step(t)
        return
    dgates = steps.split(on.dgates)
    state: Tensor
    for t in reversed(steps.order):
        skipped, zero = steps.mask(SKIPPED, t), steps.mask(ZERO, t)
        kept = [state.clone() for state in states] if skipped is not None else []
        for carried, grad in added:
            carried[t].add_(grad[t])
        step(t)
        if skipped is not None:
            dgates[t].masked_fill_(skipped, 0)
            for old, state in zip(kept, states, strict=True):
                torch.where(skipped, old, state, out=state)
        if zero is not None:  # 0 times inf would be NaN
            for state in states:
                state[: len(zero)].masked_fill_(zero, 0)
