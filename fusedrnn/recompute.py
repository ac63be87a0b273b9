"""Backward of a layer whose gates were not saved: they are made again, some steps at a time.

The forward pass keeps h and c of every step, 2 numbers a unit for an LSTM instead of 6. What
entered each step is therefore known, and the gates of any number of steps are *one* step of as many
sequences: a GEMM and an element-wise pass with nothing to wait for, by the same loop or kernel that
runs a step elsewhere, so the equations stand in one place. The loop stops behind the gates. A
dense sequence is cut into segments, the last first, and what backward holds at once does not grow
with T. (Trading arithmetic for memory along time: Chen et al. 2016, arXiv 1604.06174; Gruslys et
al. 2016, arXiv 1606.03401.)

Axes: T time, B batch, R rows, r rows of a segment, I input, H hidden, P columns of h, D directions,
G gates, S saved tiles, N gradient tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import onednn
from .gemm import add_product
from .grads import layer_grads
from .kernels.plan import Plan, Problem, chip_of, stepwise
from .kernels.rows import Rows
from .kernels.spec import Weights
from .launches import (
    Config,
    Launched,
    gemm_precision,
    hidden_size,
    project,
    run_backward,
    run_forward,
)
from .layout import Layout, Links, with_slack
from .loop import loop_gates, with_one_bias
from .segments import backward_by_segment, takes

#: Numbers of gates that are made again at once: 8 MiB in fp32, which a CPU's cache holds. Training
#: on one thread took 1.31 times as long as with saved gates (geometric mean of eight sizes; h and c
#: were made again as well), and 1.33, 1.35, 1.32, 1.36, 1.37 times at 2 ** (18, 19, 20, 22, 24).
#: A GPU, whose launches cost more, takes eight times as many (not measured).
SEGMENT = 1 << 21


class Segment(NamedTuple):
    """Some steps of each direction: the forward one's last, mirrored the reverse one's first."""

    rows: tuple[slice, ...]
    layout: Layout

    def of_out(self, out: Tensor) -> Tensor:
        """Of ``[R, D*P]`` each direction's rows in its columns, ``[r, D*P]``."""
        if self.rows[0] == self.rows[-1]:
            return out[self.rows[0]]
        parts = out.chunk(len(self.rows), 1)
        return torch.cat([part[own] for part, own in zip(parts, self.rows, strict=True)], 1)

    def of_each(self, states: Tensor | None) -> Tensor | None:
        """Of ``[D, R, H]`` each direction's rows, ``[D, r, H]``."""
        if states is None or self.rows[0] == self.rows[-1]:
            return states if states is None else states[:, self.rows[0]]
        return torch.stack([state[own] for state, own in zip(states, self.rows, strict=True)])


def backward_again(
    config: Config,
    plan: Plan | None,
    layer: Launched,
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    d_h_0: Tensor,
    d_c_0: Tensor | None,
    layout: Layout,
    links: Sequence[Links],
    needs_input: bool,
    groups: int,
) -> tuple[Tensor | None, list[Tensor]]:
    """Runs one layer backwards, fills d_h_0 and d_c_0, and returns dx ``[R, I]`` and d_weights.

    plan: of the recurrence, None for the loop; d_h_n, d_h_0 ``[D, B, P]`` and d_c_n, d_c_0
    ``[D, B, H]``; links: of each direction where rows are ragged or h is projected; needs_input:
    dx is None unless needed; groups: as of ``stack_backward``, d_weights are [] for 0.
    """
    D, B, H = config.directions, layer.h_0.shape[1], hidden_size(layer.h_0, layer.c_0)
    d_h, d_c = d_h_n, d_c_n
    (whole_x,), (whole_out,), columns = layer.xs, layer.outs, config.spec.gates * H
    outs = whole_out.unflatten(1, (D, -1)).transpose(0, 1)  # as cs lies, [D, R, P]
    by_loop = config.by_loop
    whole_x = whole_x.reshape(-1, whole_x.shape[-1])
    if links and takes(config, groups, layer.weights[0].w_hr is not None):
        # Ragged rows are one segment here; their gradients are made as if gates had been saved.
        h = [link.entering(*of) for link, *of in zip(links, outs, layer.h_0, strict=True)]
        gates = _gates(config, [whole_x] * D, layer.weights, h, None)
        given = layer._replace(xs=[whole_x]), gates, d_h_n, d_c_n, d_h_0, d_c_0
        return backward_by_segment(config, *given, layout, needs_input, groups > 0)
    d_x = torch.zeros_like(whole_x) if needs_input else None
    total: list[Tensor] = []
    segments = _segments(layout, D, B, columns, bool(links), whole_x.is_cuda, config.onednn)
    again = _c_again(config, layer, segments, whole_x, outs) if config.onednn else []
    for segment in segments:
        out = segment.of_out(whole_out)
        part = layer._replace(
            outs=[out],
            cs=segment.of_each(layer.cs),
            d_out=None if layer.d_out is None else segment.of_out(layer.d_out),
            d_cs=segment.of_each(layer.d_cs),
        )
        xs = [whole_x[own] for own in segment.rows]
        h, h_0 = _entering(layer.h_0, outs, segment, links)
        c, c_0 = None, again.pop() if again else layer.c_0
        if layer.c_0 is not None and layer.cs is not None and not (links and by_loop):
            c, c_0 = _entering(layer.c_0, layer.cs, segment, links)
        gates = _gates(config, xs, part.weights, h, c)
        dgates = with_slack(gates, (D, len(xs[0]), config.spec.grad_tiles * H))
        new_d_h, new_d_c = torch.empty_like(d_h), None if d_c is None else torch.empty_like(d_c)
        known = run_backward(
            config, plan, part.d_out, part.d_cs, d_h, d_c, layer.weights, (), h_0, c_0, part.outs,
            gates, part.cs, dgates, new_d_h, new_d_c, segment.layout,
        )  # fmt: skip
        with gemm_precision(config.precision, gates):
            if groups:
                found = layer_grads(
                    config.spec, layer.weights, xs, h_0, out, part.cs, part.d_out, d_h,
                    gates, dgates, links, layout.is_ragged, groups, h, known,
                )  # fmt: skip
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            if d_x is not None:
                for own, w, grads in zip(segment.rows, layer.weights, dgates, strict=True):
                    add_product(d_x[own], grads[:, :columns], w.w_ih, 1.0)
        d_h, d_c = new_d_h, new_d_c
    d_h_0.copy_(d_h)
    if d_c_0 is not None and d_c is not None:
        d_c_0.copy_(d_c)
    return d_x, total


def _segments(
    layout: Layout, D: int, B: int, columns: int, whole: bool, on_gpu: bool, by_onednn: bool
) -> list[Segment]:
    """The segments of a layer with ``columns = G*H``, in the order of backward."""
    T = layout.rows.T
    if whole:  # a row does not tell by its number what entered it
        return [Segment((slice(None),) * D, layout)]
    most = onednn.SEGMENT if by_onednn else SEGMENT * (8 if on_gpu else 1)
    steps, found = max(most // max(B * columns, 1), 1), []
    for stop in range(T, 0, -steps):
        start = max(stop - steps, 0)
        rows = slice(start * B, stop * B), slice((T - stop) * B, (T - start) * B)
        found.append(Segment(rows[:D], Layout(Rows(stop - start, B))))
    return found


def _c_again(
    config: Config,
    layer: Launched,
    segments: Sequence[Segment],
    whole_x: Tensor,
    outs: Tensor,
) -> list[Tensor]:
    """c that enters each segment, ``[D, B, H]``, in the order of forward, whose steps run again."""
    assert layer.c_0 is not None
    found = [layer.c_0]
    for segment in segments[:0:-1]:
        h, h_0 = _entering(layer.h_0, outs, segment, ())
        gx = _gates(config, [whole_x[own] for own in segment.rows], layer.weights, h, None)
        h_n, c_n = torch.empty_like(h_0), torch.empty_like(found[-1])
        out = gx.new_empty(len(h[0]), h_0.shape[0] * h_0.shape[2])
        given = (gx, layer.weights, (), h_0, found[-1], [out])
        run_forward(config, None, *given, h_n, c_n, None, None, segment.layout)
        found.append(c_n)
    return found


def _entering(
    initial: Tensor, left: Tensor, segment: Segment, links: Sequence[Links]
) -> tuple[list[Tensor], Tensor]:
    """The states that entered each step, ``[r, ...]`` of each direction, and the segment.

    initial: ``[D, B, ...]``; left: the states that left each step, ``[D, R, ...]``.
    """
    B = initial.shape[1]
    if links:
        entering = zip(links, left, initial, strict=True)
        return [link.entering(states, first) for link, states, first in entering], initial
    steps, firsts = [], []
    for d, own in enumerate(segment.rows):
        # Rows further on by a step, which for all segments but the first lie in one piece.
        shift = -B if d == 0 else B
        start, stop, states = own.start + shift, own.stop + shift, left[d]
        if start < 0:
            pieces = torch.cat([initial[d], states[:stop]])
        elif stop > len(states):
            pieces = torch.cat([states[start:], initial[d]])
        else:
            pieces = states[start:stop]
        steps.append(pieces)
        firsts.append(pieces[:B] if d == 0 else pieces[-B:])
    return steps, _stacked(firsts)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, of one part without a copy."""
    return torch.stack(list(parts)) if parts[1:] else parts[0].unsqueeze(0)


def _gates(
    config: Config,
    xs: Sequence[Tensor],
    weights: Sequence[Weights],
    h: Sequence[Tensor],
    c: Sequence[Tensor] | None,
) -> Tensor:
    """The gates ``[D, r, S*H]`` of r steps, as those of one step of r sequences; for oneDNN gx.

    h and c: what entered them, ``[r, ...]`` of each direction; the loop needs no c.
    """
    D, (r, P), H = len(xs), h[0].shape, weights[0].w_hh.shape[0] // config.spec.gates
    gates, columns = h[0].new_empty(D, r, config.spec.saved * H), config.spec.gates * H
    if config.by_loop:  # the loop turns gx into gates where it lies
        weights = [with_one_bias(config.cell, w) for w in weights]
        for d, x in enumerate(xs):
            project(x, weights[d : d + 1], config, gates[d : d + 1, :, :columns])
        if not config.onednn:
            loop_gates(config.cell, gates, weights, h)
        return gates
    gx = h[0].new_empty(D, r, columns)
    for d, x in enumerate(xs):
        project(x, weights[d : d + 1], config, gx[d : d + 1])
    proj_size = P if P != H else 0
    problem = Problem(
        config.cell, 1, H, r, D, gx.dtype, config.precision, True, proj_size=proj_size
    )
    # One GEMM for all of it: a matrix kept on chip gains nothing where nothing waits.
    plan = replace(stepwise(problem, chip_of(gx.device)), graph_steps=0)
    h_0, c_0 = _stacked(h), None if c is None else _stacked(c)
    run_forward(
        config, plan, gx, weights, (), h_0, c_0, [gx.new_empty(r, D * P)], torch.empty_like(h_0),
        None if c_0 is None else torch.empty_like(c_0), gates, None, Layout(Rows(1, r)),
    )  # fmt: skip
    return gates
