"""The cells: one step of each recurrence and its adjoint, on tiles.

A cell is three functions on tuples of tiles (``tiles.py``). They contain no pointers and no loop
over time, so one text serves every schedule. The gates are in torch's order, and a state is
``(h,)`` or ``(h, c)``.

``operand(PHASE, gh, state) -> u``
    The operand of a phase's recurrent product, which in phase 0 is h. ``gh`` holds the products
    of the phases before it.
``forward(gx, gh, state) -> state, saved``
    The step. ``gx[gate] = W_ih x + b_ih`` and ``gh[gate] = W_hh u + b_hh + gx[gate]``, but without
    gx where the two are not just added: in the n of ``gru``. ``saved`` are the tiles that the
    adjoint needs.
``adjoint(PHASE, d_state, du, saved, before, after, carry) -> dgates, d_state, carry``
    The step backwards, called for the phases in reverse order. ``before`` and ``after`` are the
    states that enter and leave the step. In the first call, ``d_state`` is the gradient of
    ``after``. In the next one, ``du`` is the gradient of the operand of the phase just called, and
    ``d_state`` and ``carry`` are what that call returned. ``dgates`` are the gradient tiles
    ``CellSpec.grads[PHASE]``. The schedule adds the gradient of phase 0's operand to that of h.

``squash`` computes non-linearities of several tiles; a schedule may replace it by a faster one.

Equations: LSTM of Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; GRU of
Cho et al. 2014 (arXiv 1406.1078) as ``gru_reset_before``, and with the reset after the product, as
in torch and cuDNN, as ``gru``. The z of Cho's paper is 1 - z in torch and below.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .spec import SPECS, CellSpec
from .tiles import squash, zeros_like

SIGMOID, TANH = tl.constexpr(False), tl.constexpr(True)


@triton.jit
def operand_h(PHASE: tl.constexpr, gh, state, SQUASH: tl.constexpr = squash):
    return state[0]


@triton.jit
def lstm_forward(gx, gh, state, SQUASH: tl.constexpr = squash):
    i, f, g, o = SQUASH(gh, (SIGMOID, SIGMOID, TANH, SIGMOID))
    c = f * state[1] + i * g
    (tanh_c,) = SQUASH((c,), (TANH,))
    return (o * tanh_c, c), (i, f, g, o)


@triton.jit
def lstm_adjoint(
    PHASE: tl.constexpr, d_state, du, saved, before, after, carry, SQUASH: tl.constexpr = squash
):
    i, f, g, o = saved
    dh, dc = d_state
    (tanh_c,) = SQUASH((after[1],), (TANH,))
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    di = dc * g * i * (1.0 - i)
    df = dc * before[1] * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dh * tanh_c * o * (1.0 - o)
    return (di, df, dg, do), (zeros_like(dh), dc * f), ()


@triton.jit
def gru_forward(gx, gh, state, SQUASH: tl.constexpr = squash):
    r, z = SQUASH(gh[:2], (SIGMOID, SIGMOID))
    (n,) = SQUASH((gx[2] + r * gh[2],), (TANH,))
    return (n + z * (state[0] - n),), (r, z, n, gh[2])


@triton.jit
def gru_adjoint(
    PHASE: tl.constexpr, d_state, du, saved, before, after, carry, SQUASH: tl.constexpr = squash
):
    r, z, n, hn = saved
    dh = d_state[0]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dz = dh * (before[0] - n) * z * (1.0 - z)
    dr = dn * hn * r * (1.0 - r)
    return (dr, dz, dn, dn * r), (dh * z,), ()


@triton.jit
def gru_reset_before_operand(PHASE: tl.constexpr, gh, state, SQUASH: tl.constexpr = squash):
    if PHASE == 0:
        return state[0]
    else:
        both = SQUASH(gh[:2], (SIGMOID, SIGMOID))
        return both[0] * state[0]


@triton.jit
def gru_reset_before_forward(gx, gh, state, SQUASH: tl.constexpr = squash):
    r, z = SQUASH(gh[:2], (SIGMOID, SIGMOID))
    (n,) = SQUASH(gh[2:], (TANH,))
    return (n + z * (state[0] - n),), (r, z, n)


@triton.jit
def gru_reset_before_adjoint(
    PHASE: tl.constexpr, d_state, du, saved, before, after, carry, SQUASH: tl.constexpr = squash
):
    r, z, n = saved
    h, dh = before[0], d_state[0]
    if PHASE == 1:
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dz = dh * (h - n) * z * (1.0 - z)
        return (dn,), (dh * z,), (dz,)
    else:  # du is the gradient of r * h
        dr = du * h * r * (1.0 - r)
        return (dr, carry[0]), (dh + du * r,), ()


@triton.jit
def rnn_tanh_forward(gx, gh, state, SQUASH: tl.constexpr = squash):
    return SQUASH(gh, (TANH,)), ()


@triton.jit
def rnn_tanh_adjoint(
    PHASE: tl.constexpr, d_state, du, saved, before, after, carry, SQUASH: tl.constexpr = squash
):
    dh = d_state[0]
    return (dh * (1.0 - after[0] * after[0]),), (zeros_like(dh),), ()


@triton.jit
def rnn_relu_forward(gx, gh, state, SQUASH: tl.constexpr = squash):
    (a,) = gh
    return (tl.where(a <= 0.0, 0.0, a),), ()  # unlike a maximum it keeps NaN


@triton.jit
def rnn_relu_adjoint(
    PHASE: tl.constexpr, d_state, du, saved, before, after, carry, SQUASH: tl.constexpr = squash
):
    dh = d_state[0]
    return (tl.where(after[0] > 0.0, dh, 0.0),), (zeros_like(dh),), ()


class Cell(NamedTuple):
    """The device functions and tile counts of one cell, a compile-time argument of every kernel.

    Counts are tuples ``(0, 1, ...)``, whose length Triton takes as a constant.
    """

    operand: Any
    forward: Any
    adjoint: Any
    gates: tuple
    saved: tuple
    tiles: tuple  # of dgates
    phases: tuple  # for each recurrent product the gates that it serves
    grads: tuple  # for each of these the tiles of dgates that its adjoint returns
    parts: tuple  # phases, and behind them all gates: the product with the layer's input
    factors: tuple  # for each gate of each part the tile of dgates, counted from the part's first
    merged: tuple  # for each gate whether its two pre-activations are only added


def cell_of(spec: CellSpec, forward: Any, adjoint: Any, operand: Any = operand_h) -> Cell:
    """The cell with these tile counts and device functions."""
    gates, saved, tiles = (tuple(range(n)) for n in (spec.gates, spec.saved, spec.grad_tiles))
    parts, factors = (*spec.phases, gates), (*spec.factors, gates)
    merged = tuple(gate == tile for gate, tile in enumerate(spec.recurrent))
    return Cell(
        operand, forward, adjoint, gates, saved, tiles,
        spec.phases, spec.grads, parts, factors, merged,
    )  # fmt: skip


CELLS = {
    "lstm": cell_of(SPECS["lstm"], lstm_forward, lstm_adjoint),
    "gru": cell_of(SPECS["gru"], gru_forward, gru_adjoint),
    "gru_reset_before": cell_of(
        SPECS["gru_reset_before"],
        gru_reset_before_forward,
        gru_reset_before_adjoint,
        gru_reset_before_operand,
    ),
    "rnn_tanh": cell_of(SPECS["rnn_tanh"], rnn_tanh_forward, rnn_tanh_adjoint),
    "rnn_relu": cell_of(SPECS["rnn_relu"], rnn_relu_forward, rnn_relu_adjoint),
}
