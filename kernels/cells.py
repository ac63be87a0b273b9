"""The cells: one step of each recurrence and its adjoint, on tiles.

A cell knows no pointer of a schedule, no time loop and no batch tile. A schedule gives it rows of
tiles ``[block][n]`` (see ``common.py``) that together hold whole rows of H units, all in fp32, so
a cell may also reduce over a row (a normalised cell must).

Contract, with G gates in torch's order, ``s`` the states (h first, c second where there is one):

``operand(PHASE, ctx, gx, gh, state) -> [block]``
    the left operand of the recurrent product of this phase; ``gh`` holds the gates of the
    phases before it.
``forward(ctx, gx, gh, state) -> (state, saved)``
    ``gx[block][gate] = W_ih x_t + b_ih``, ``gh[block][gate] = W_hh u + b_hh``; ``saved`` are the
    tiles the adjoint will be given.
``adjoint(PHASE, ctx, d_state, du, saved, prev, new, carry) -> (grads, d_state, carry)``
    called with the phases in reverse. First ``d_state`` is the gradient of the new state, ``du``
    and ``carry`` are empty. Then ``du[block]`` is the gradient of the operand of the phase called
    before, and ``d_state``, ``carry`` are what that call returned. ``grads`` are the tiles named
    by ``CellSpec.grads[PHASE]``. Boundary: d_state at T is (dh_n, dc_n), plus dy_t in every step.
``fold(ctx, d_state, du) -> d_state``
    the adjoint of phase 0's operand, called last: adds du to the gradient of h.

``ctx = (aux_ptr, t, offs_b, mask_b, H, cols)``, with ``cols[block]`` the columns of each block, is
for cells with constants or masks of their own (gains of a normalisation, a dropout mask for each
sequence); the cells below ignore it. ``tests/test_extending.py`` has a cell that uses all of it.

Equations: LSTM Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; GRU Cho et
al. 2014 (arXiv 1406.1078) as ``gru_reset_before``, and with the reset after the product as torch
and cuDNN have it. The z of Cho's paper and of many textbooks is 1 - z here and in torch.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .common import tanh
from .spec import SPECS, CellSpec


@triton.jit
def _operand_h(PHASE: tl.constexpr, ctx, gx, gh, state):
    u = ()
    for j in tl.static_range(len(state)):
        u = u + (state[j][0],)
    return u


@triton.jit
def _fold_h(ctx, d_state, du):
    out = ()
    for j in tl.static_range(len(d_state)):
        out = out + ((d_state[j][0] + du[j],) + d_state[j][1:],)
    return out


@triton.jit
def _lstm_forward(ctx, gx, gh, state):
    """i, f, o = sigmoid, g = tanh of the sums; c' = f c + i g; h' = o tanh(c')."""
    new = ()
    saved = ()
    for j in tl.static_range(len(state)):
        i = tl.sigmoid(gx[j][0] + gh[j][0])
        f = tl.sigmoid(gx[j][1] + gh[j][1])
        g = tanh(gx[j][2] + gh[j][2])
        o = tl.sigmoid(gx[j][3] + gh[j][3])
        c = f * state[j][1] + i * g
        h = o * tanh(c)
        new = new + ((h, c),)
        saved = saved + ((i, f, g, o),)
    return new, saved


@triton.jit
def _lstm_adjoint(PHASE: tl.constexpr, ctx, d_state, du, saved, prev, new, carry):
    """dc += dh o (1 - tanh(c')^2); dc_prev = dc f; each gate times its activation's slope."""
    grads = ()
    d_prev = ()
    for j in tl.static_range(len(saved)):
        i, f, g, o = saved[j]
        dh, dc = d_state[j]
        tanh_c = tanh(new[j][1])
        dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
        di = dc * g * i * (1.0 - i)
        df = dc * prev[j][1] * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        do = dh * tanh_c * o * (1.0 - o)
        grads = grads + ((di, df, dg, do),)
        d_prev = d_prev + ((tl.zeros_like(dh), dc * f),)
    return grads, d_prev, ()


@triton.jit
def _gru_forward(ctx, gx, gh, state):
    """r, z = sigmoid of the sums; n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""
    new = ()
    saved = ()
    for j in tl.static_range(len(state)):
        r = tl.sigmoid(gx[j][0] + gh[j][0])
        z = tl.sigmoid(gx[j][1] + gh[j][1])
        n = tanh(gx[j][2] + r * gh[j][2])
        h = n + z * (state[j][0] - n)
        new = new + ((h,),)
        saved = saved + ((r, z, n, gh[j][2]),)
    return new, saved


@triton.jit
def _gru_adjoint(PHASE: tl.constexpr, ctx, d_state, du, saved, prev, new, carry):
    """The two parts of n have gradients dn and r dn, hence four tiles; dh_prev = z dh + product."""
    grads = ()
    d_prev = ()
    for j in tl.static_range(len(saved)):
        r, z, n, hn = saved[j]
        dh = d_state[j][0]
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dz = dh * (prev[j][0] - n) * z * (1.0 - z)
        dr = dn * hn * r * (1.0 - r)
        grads = grads + ((dr, dz, dn, dn * r),)
        d_prev = d_prev + ((dh * z,),)
    return grads, d_prev, ()


@triton.jit
def _gru_reset_before_operand(PHASE: tl.constexpr, ctx, gx, gh, state):
    u = ()
    for j in tl.static_range(len(state)):
        if PHASE == 0:
            u = u + (state[j][0],)
        else:
            u = u + (tl.sigmoid(gx[j][0] + gh[j][0]) * state[j][0],)
    return u


@triton.jit
def _gru_reset_before_forward(ctx, gx, gh, state):
    """r, z = sigmoid of the sums; n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    new = ()
    saved = ()
    for j in tl.static_range(len(state)):
        r = tl.sigmoid(gx[j][0] + gh[j][0])
        z = tl.sigmoid(gx[j][1] + gh[j][1])
        n = tanh(gx[j][2] + gh[j][2])
        h = n + z * (state[j][0] - n)
        new = new + ((h,),)
        saved = saved + ((r, z, n),)
    return new, saved


@triton.jit
def _gru_reset_before_adjoint(PHASE: tl.constexpr, ctx, d_state, du, saved, prev, new, carry):
    """Phase 1 gives dn and dh z; with du of r h, phase 0 gives dr = du h, and adds du r to dh."""
    grads = ()
    d_prev = ()
    kept = ()
    for j in tl.static_range(len(saved)):
        r, z, n = saved[j]
        h = prev[j][0]
        dh = d_state[j][0]
        if PHASE == 1:
            grads = grads + ((dh * (1.0 - z) * (1.0 - n * n),),)
            d_prev = d_prev + ((dh * z,),)
            kept = kept + (dh * (h - n) * z * (1.0 - z),)
        else:
            grads = grads + ((du[j] * h * r * (1.0 - r), carry[j]),)
            d_prev = d_prev + ((dh + du[j] * r,),)
    return grads, d_prev, kept


@triton.jit
def _rnn_tanh_forward(ctx, gx, gh, state):
    """h' = tanh(gx + gh)."""
    new = ()
    saved = ()
    for j in tl.static_range(len(state)):
        new = new + ((tanh(gx[j][0] + gh[j][0]),),)
        saved = saved + ((),)
    return new, saved


@triton.jit
def _rnn_tanh_adjoint(PHASE: tl.constexpr, ctx, d_state, du, saved, prev, new, carry):
    grads = ()
    d_prev = ()
    for j in tl.static_range(len(new)):
        dh = d_state[j][0]
        grads = grads + ((dh * (1.0 - new[j][0] * new[j][0]),),)
        d_prev = d_prev + ((tl.zeros_like(dh),),)
    return grads, d_prev, ()


@triton.jit
def _rnn_relu_forward(ctx, gx, gh, state):
    """h' = max(gx + gh, 0); a NaN stays one, as in torch."""
    new = ()
    saved = ()
    for j in tl.static_range(len(state)):
        a = gx[j][0] + gh[j][0]
        new = new + ((tl.where(a <= 0.0, 0.0, a),),)
        saved = saved + ((),)
    return new, saved


@triton.jit
def _rnn_relu_adjoint(PHASE: tl.constexpr, ctx, d_state, du, saved, prev, new, carry):
    grads = ()
    d_prev = ()
    for j in tl.static_range(len(new)):
        dh = d_state[j][0]
        grads = grads + ((tl.where(new[j][0] > 0.0, dh, 0.0),),)
        d_prev = d_prev + ((tl.zeros_like(dh),),)
    return grads, d_prev, ()


class Cell(NamedTuple):
    """The device functions of one cell, beside its tile counts."""

    spec: CellSpec
    operand: triton.JITFunction
    forward: triton.JITFunction
    adjoint: triton.JITFunction
    fold: triton.JITFunction = _fold_h


CELLS = {
    "lstm": Cell(SPECS["lstm"], _operand_h, _lstm_forward, _lstm_adjoint),
    "gru": Cell(SPECS["gru"], _operand_h, _gru_forward, _gru_adjoint),
    "gru_reset_before": Cell(
        SPECS["gru_reset_before"],
        _gru_reset_before_operand,
        _gru_reset_before_forward,
        _gru_reset_before_adjoint,
    ),
    "rnn_tanh": Cell(SPECS["rnn_tanh"], _operand_h, _rnn_tanh_forward, _rnn_tanh_adjoint),
    "rnn_relu": Cell(SPECS["rnn_relu"], _operand_h, _rnn_relu_forward, _rnn_relu_adjoint),
}
