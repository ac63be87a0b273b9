"""The gradients of one layer's weights: library GEMMs and sums over all steps at once.

Every schedule leaves ``dgates``, the gradients of the pre-activations; with what entered each step
they make the gradients of the weights. Axes: T time, B batch, R rows, H hidden, P columns of h.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .gemm import outer
from .kernels.rows import SKIPPED
from .kernels.spec import CellSpec, Weights, runs_of
from .layout import Links, by_sequence, own_order

#: Up to so many numbers of h, h_0 and the others are multiplied as one, after a copy, which takes
#: less time than one more product (10 us on the CPU). With eight times as many it would do so too,
#: but a sum that goes on from h_0's terms, which are large, errs twice as much: with T = 30,
#: B = H = 32 dW_hh left its budget.
_COPIED = 1 << 14
#: Up to so many multiplications of a cell's every tile of dgates with h.
_LITTLE = 1 << 24


class Recurrent(NamedTuple):
    """Gradients of a direction that whoever ran its steps found on the way."""

    dw_hh: Tensor  # [G*H, H]
    db: Tensor  # [G*H], of either bias


def layer_grads(
    spec: CellSpec,
    weights: Sequence[Weights],
    xs: Sequence[Tensor],
    h_0: Tensor,
    out: Tensor,
    cs: Tensor | None,
    d_out: Tensor | None,
    d_h_n: Tensor,
    gates: Tensor,
    dgates: Tensor,
    links: Sequence[Links],
    is_ragged: bool,
    groups: int,
    entering: Sequence[Tensor] | None = None,
    known: Sequence[Recurrent] | None = None,
) -> list[Tensor]:
    """The gradients of a layer's weights in torch's order, each summed over all rows.

    Each tensor has an entry for each direction, ``[D, ...]``, but for out and d_out ``[R, D*P]``;
    xs: its input in each direction, as of ``weight_grads``; links: where rows are ragged or h is
    projected; entering: the h that entered each step, ``[R, P]`` each, where it is known; known:
    what need not be computed, not of groups.
    """
    found: list[Tensor] = []
    for d, w in enumerate(weights):
        if entering is not None:
            h = [(slice(None), entering[d])]
        else:
            columns = slice(d * w.w_hh.shape[-1], (d + 1) * w.w_hh.shape[-1])
            own = links[d] if is_ragged else None
            h = _entering(out.flatten(0, -2)[:, columns], h_0[d], d, own)
        given = None if known is None or groups > 1 else known[d]
        found += weight_grads(spec, w, xs[d], h, gates[d], dgates[d], h_0.shape[1], groups, given)
        if w.w_hr is not None:
            assert cs is not None
            found += projection_grad(
                d, w, d_out, d_h_n[d], gates[d], cs[d], dgates[d], links[d], groups
            )
    return found


def weight_grads(
    spec: CellSpec,
    w: Weights,
    x: Tensor,
    entering: list[tuple[slice, Tensor]],
    gates: Tensor | None,
    dgates: Tensor,
    B: int,
    groups: int = 1,
    known: Recurrent | None = None,
) -> list[Tensor]:
    """dW_ih, dW_hh and, with biases, db_ih, db_hh of a direction, each summed over all rows.

    x: ``[R, I]`` or ``[T, B, I]``; entering: rows, and the h that entered each of them; gates
    ``[R, S*H]``, or None where no operand is of them; dgates ``[R, N*H]``; groups: how many equal
    parts of B have sums of their own, of dense rows only: the results then have one dimension more,
    the first; known: of one group, what need not be computed.
    """
    columns = w.w_hh.shape[-2]
    H = columns // spec.gates
    cut = partial(by_group, B=B, groups=groups)
    if groups > 1:
        entering = [(slice(None), torch.cat([h for _, h in entering]))]
    grads, h_parts = cut(dgates), [(rows, cut(h)) for rows, h in entering]
    dgx = grads if spec.grad_tiles == spec.gates else grads.narrow(-1, 0, columns)
    own = own_order(x, columns) if groups == 1 else None
    if not w.w_ih.shape[-1]:  # the input was projected
        dw_ih = dgx.new_empty(*grads.shape[:-2], columns, 0)
    elif own is None:
        dw_ih = _outer(dgx, cut(x.reshape(-1, x.shape[-1])))
    else:
        dw_ih = _outer(by_sequence(dgx, x), own)
    if known is not None:
        found = [dw_ih, known.dw_hh]
        return found if w.b_ih is None else [*found, known.db.clone(), known.db]
    runs = []
    for phase, operand in zip(spec.phases, spec.operands, strict=True):
        operands = h_parts
        if operand == "r*h":
            assert gates is not None
            operands = [(rows, cut(gates)[..., rows, :H] * h) for rows, h in h_parts]
        runs += [(operands, *run) for run in runs_of(phase, spec.recurrent)]
    dw_hh = _by_run(grads, runs, H, len(spec.phases) == 1)
    if w.b_ih is None:
        return [dw_ih, dw_hh]
    of_tiles = grads.sum(-2)
    if spec.grad_tiles == spec.gates:
        # Without a part of its own for the recurrence both biases stand in the same sum.
        return [dw_ih, dw_hh, of_tiles.clone(), of_tiles]
    recurrent = [of_tiles.narrow(-1, tile * H, H) for tile in spec.recurrent]
    return [dw_ih, dw_hh, of_tiles[..., :columns].clone(), torch.cat(recurrent, -1)]


def by_group(rows: Tensor, B: int, groups: int) -> Tensor:
    """``[R, C]`` by group of sequences, ``[groups, R / groups, C]``; of one group as it is."""
    if groups == 1:
        return rows
    by_time = rows.unflatten(0, (-1, groups, B // groups))
    return by_time.transpose(0, 1).flatten(1, 2)


def from_groups(groups: Tensor, B: int) -> Tensor:
    """The way back from ``by_group``."""
    by_time = groups.unflatten(1, (-1, B // len(groups))).transpose(0, 1)
    return by_time.flatten(0, 2)


def _by_run(
    grads: Tensor, runs: list[tuple[list[tuple[slice, Tensor]], int, int, int]], H: int, alike: bool
) -> Tensor:
    """dW_hh of runs of gates: their operands, first gate, first tile, and how many; alike: whether
    all have the same operands.

    Where there is little to multiply on the CPU, a product of all tiles at once takes less time
    than one for each run: with it weight_grads of a GRU at T = 50, B = H = 32 took 172 us instead
    of 247, by a script.
    """
    if len(runs) == 1:
        ((operands, _, tile, count),) = runs
        return _sum_of_products(grads.narrow(-1, tile * H, count * H), operands)
    if alike and not grads.is_cuda and grads.numel() * H <= _LITTLE:
        every = _sum_of_products(grads, runs[0][0])
        return torch.cat([every.narrow(-2, tile * H, n * H) for _, _, tile, n in runs], -2)
    gates = sum(count for *_, count in runs)
    dw_hh = grads.new_empty(*grads.shape[:-2], gates * H, runs[0][0][0][1].shape[-1])
    for operands, gate, tile, count in runs:
        of_run = grads.narrow(-1, tile * H, count * H)
        _sum_of_products(of_run, operands, dw_hh.narrow(-2, gate * H, count * H))
    return dw_hh


def _sum_of_products(
    grads: Tensor, operands: list[tuple[slice, Tensor]], out: Tensor | None = None
) -> Tensor:
    for part, (rows, operand) in enumerate(operands):
        out = _outer(grads[..., rows, :], operand, out, float(part > 0))
    assert out is not None
    return out


def _outer(grads: Tensor, operand: Tensor, out: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """``grads^T operand + beta out``, summed over rows, into ``out`` if given; of each group."""
    if grads.dim() == 2:
        return outer(grads, operand, out, beta)
    if out is None:
        return grads.mT @ operand
    return torch.baddbmm(out, grads.mT, operand, beta=beta, out=out)


def _entering(hs: Tensor, h_0: Tensor, d: int, links: Links | None) -> list[tuple[slice, Tensor]]:
    """The h that entered each step, in parts by their order: some rows, and their h."""
    if links is not None:
        return in_parts([links.entering(hs, h_0)])
    # Of all steps but the direction's first it lies in `hs`, one step further on.
    B, rest = h_0.shape[0], hs.shape[0] - h_0.shape[0]
    if not rest:
        return in_parts([h_0])
    return in_parts([h_0, hs[:rest]] if d == 0 else [hs[B:], h_0])


def in_parts(pieces: Sequence[Tensor]) -> list[tuple[slice, Tensor]]:
    """The h that entered each row, given in pieces by their order, as ``weight_grads`` takes it."""
    if len(pieces) > 1 and sum(h.numel() for h in pieces) <= _COPIED:
        pieces = [torch.cat(list(pieces))]
    sizes = [h.shape[0] for h in pieces]
    ends = accumulate(sizes)
    return [(slice(end - n, end), h) for n, end, h in zip(sizes, ends, pieces, strict=True)]


def projection_grad(
    d: int,
    w: Weights,
    d_out: Tensor | None,
    d_h_n: Tensor,
    gates: Tensor,
    cs: Tensor,
    dgates: Tensor,
    links: Links,
    groups: int = 1,
) -> list[Tensor]:
    """dW_hr, with ``groups`` as in ``weight_grads``.

    The gradient of every h is made again of what reached it: that of out, of h_n, and dgates of the
    step that follows times W_hh, which no schedule keeps.
    """
    assert w.w_hr is not None
    P, H = w.w_hr.shape[-2:]
    if w.w_hh.dim() == 3:  # of members
        dh = from_groups(by_group(dgates, len(d_h_n), groups) @ w.w_hh, len(d_h_n))
    else:
        dh = dgates @ w.w_hh
    dh = dh.index_select(0, links.following)
    dh = torch.where(links.goes_on.unsqueeze(1), dh, 0.0)
    dh += torch.where(links.last.unsqueeze(1), d_h_n.index_select(0, links.sequence), 0.0)
    if d_out is not None:
        dh += d_out.flatten(0, -2)[:, d * P : (d + 1) * P]
    dh.masked_fill_((links.origins == SKIPPED).unsqueeze(1), 0.0)  # padding's may be NaN
    cut = partial(by_group, B=len(d_h_n), groups=groups)
    grads = cut(dh)
    return [_outer(grads, cut(gates[:, 3 * H :] * cs.tanh()))]  # of o tanh(c)
