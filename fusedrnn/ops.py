"""``fusedrnn::rnn_forward`` and ``fusedrnn::rnn_backward``: a stack of layers as one operator.

One name for CPU and CUDA, with fake kernels (so that compilers see one node with symbolic T and
B) and autograd. Backward under ``create_graph=True`` differentiates the reference instead, so
derivatives of every order are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Ragged
from .reference import differentiable_stack
from .stack import (
    Config,
    Saved,
    again_if_refused,
    group_weights,
    stack_backward,
    stack_forward,
)

_RAGGED = "Tensor? lengths, Tensor? reset, Tensor? batch_sizes"
_CONFIG = (
    "str cell, str backend, bool has_bias, int num_layers, bool bidirectional, str precision, "
    "bool compact"
)
torch.library.define(
    "fusedrnn::rnn_forward",
    "(Tensor input, Tensor h_0, Tensor? c_0, Tensor[] params, Tensor[] dropout_masks, "
    f"{_RAGGED}, {_CONFIG}, bool save)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cs, Tensor hidden)",
)
torch.library.define(
    "fusedrnn::rnn_backward",
    "(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_cs, Tensor input, Tensor h_0, "
    "Tensor? c_0, Tensor[] params, Tensor[] dropout_masks, Tensor output, Tensor gates, "
    f"Tensor cs, Tensor hidden, {_RAGGED}, {_CONFIG}, bool needs_input, bool needs_params)"
    " -> (Tensor d_input, Tensor d_h_0, Tensor d_c_0, Tensor[] d_params)",
)


def rnn_stack(
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    ragged: Ragged,
    config: Config,
    *,
    keep_states: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Runs a stack of layers through the operator.

    Args:
        input: ``[T, B, I]``, any strides; or packed ``[R, I]``.
        states: h_0 ``[L*D, B, P]``, and for an LSTM c_0 ``[L*D, B, H]``. P is H but for an LSTM
            with a projection.
        params: flat, in torch's order; without biases if not ``config.has_bias``; with a projection
            each layer and direction ends with ``weight_hr [P, H]``.
        dropout_masks: for each layer but the last ``[T, B, D*P]``, packed ``[R, D*P]``, scaled by
            1/(1-p); or empty.
        ragged: lengths and resets of the sequences, or the batch sizes of packed input.
        keep_states: whether c of every step is wanted.

    Returns:
        output ``[T, B, D*P]`` or ``[R, D*P]``, the final states, like ``states``, and c of every
        step, ``[L, D, R, H]``, which is empty unless kept or of a cell without c.
    """
    h_0, c_0 = states[0], states[1] if len(states) == 2 else None
    # Decided by requires_grad and never by a module's training flag: backward in eval() works.
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *states, *params))
    output, h_n, c_n, _, cs, _ = torch.ops.fusedrnn.rnn_forward(
        input,
        h_0,
        c_0,
        list(params),
        list(dropout_masks),
        *ragged,
        *config,
        save or keep_states,
    )
    return output, [h_n] if c_0 is None else [h_n, c_n], cs


@torch.library.impl("fusedrnn::rnn_forward", ("cpu", "cuda"))
def _forward(input, h_0, c_0, params, dropout_masks, *rest):
    ragged, config, (save,) = _sorted_out(rest)
    output, h_n, c_n, saved = again_if_refused(
        stack_forward, input, h_0, c_0, params, dropout_masks, ragged, config, save
    )
    return output, h_n, input.new_empty(0) if c_n is None else c_n, *saved[1:]


@torch.library.register_fake("fusedrnn::rnn_forward")
def _forward_fake(input, h_0, c_0, params, dropout_masks, *rest):
    _, config, (save,) = _sorted_out(rest)
    *rows, _ = input.shape
    room, P = math.prod(rows), h_0.shape[-1]
    L, D, H = config.num_layers, config.directions, (h_0 if c_0 is None else c_0).shape[-1]
    empty = input.new_empty
    return (
        empty(*rows, D * P),
        empty(h_0.shape),
        empty(0) if c_0 is None else empty(c_0.shape),
        empty(L, D, room, config.spec.saved * H) if save else empty(0),
        empty(L, D, room, H) if save and c_0 is not None else empty(0),
        empty(L - 1, room, D * P) if save else empty(0),
    )


def _sorted_out(rest):
    """The arguments after the tensors of a call: ragged, config, and what is left."""
    n = len(Ragged._fields)
    m = n + len(Config._fields)
    return Ragged(*rest[:n]), Config(*rest[n:m]), rest[m:]


@torch.library.impl("fusedrnn::rnn_backward", ("cpu", "cuda"))
def _backward(
    d_output, d_h_n, d_c_n, d_cs, input, h_0, c_0, params, dropout_masks, output, gates, cs, hidden,
    *rest,
):  # fmt: skip
    ragged, config, (needs_input, needs_params) = _sorted_out(rest)
    d_h_n = torch.zeros_like(h_0) if d_h_n is None else d_h_n
    if c_0 is not None:
        d_c_n = torch.zeros_like(c_0) if d_c_n is None else d_c_n
    d_input, d_h_0, d_c_0, d_params = again_if_refused(
        stack_backward,
        input,
        d_output,
        d_h_n,
        d_c_n,
        d_cs,
        h_0,
        c_0,
        params,
        dropout_masks,
        Saved(output, gates, cs, hidden),
        ragged,
        config,
        needs_input,
        needs_params,
    )
    none = input.new_empty(0)
    return (
        none if d_input is None else d_input,
        d_h_0,
        none if d_c_0 is None else d_c_0,
        d_params,
    )


@torch.library.register_fake("fusedrnn::rnn_backward")
def _backward_fake(
    d_output, d_h_n, d_c_n, d_cs, input, h_0, c_0, params, dropout_masks, output, gates, cs, hidden,
    *rest,
):  # fmt: skip
    *_, needs_input, needs_params = rest
    return (
        input.new_empty(input.shape if needs_input else 0),
        h_0.new_empty(h_0.shape),
        h_0.new_empty(0 if c_0 is None else c_0.shape),
        [p.new_empty(p.shape) for p in params] if needs_params else [],
    )


def _setup_context(ctx, inputs, output):
    input, h_0, c_0, params, dropout_masks, *rest = inputs
    ragged, ctx.config, _ = _sorted_out(rest)
    out, _, _, gates, cs, hidden = output
    ctx.mark_non_differentiable(gates, hidden)
    ctx.set_materialize_grads(False)
    ctx.counts = len(params), len(dropout_masks)
    ctx.save_for_backward(input, h_0, c_0, *ragged, out, gates, cs, hidden, *params, *dropout_masks)


def _autograd(ctx, d_output, d_h_n, d_c_n, _, d_cs, __):
    input, h_0, c_0, *rest = ctx.saved_tensors
    ragged, saved, rest = Ragged(*rest[:3]), rest[3:7], rest[7:]
    n_params, n_masks = ctx.counts
    params, masks = rest[:n_params], rest[n_params:]
    d_c_n, d_cs = (None, None) if c_0 is None else (d_c_n, d_cs)
    grads = d_output, d_h_n, d_c_n, d_cs
    needs = ctx.needs_input_grad
    if all(grad is None for grad in grads):
        d_input = d_h_0 = d_c_0 = None
        d_params: list[Tensor | None] = [None] * n_params
    elif torch.is_grad_enabled():
        d_input, d_h_0, d_c_0, d_params = _differentiable_grads(
            grads, input, h_0, c_0, params, masks, ragged, ctx.config
        )
    else:
        d_input, d_h_0, d_c_0, d_params = torch.ops.fusedrnn.rnn_backward(
            *grads,
            input,
            h_0,
            c_0,
            params,
            masks,
            *saved,
            *ragged,
            *ctx.config,
            needs[0],
            any(needs[3]),
        )
        d_input = d_input if needs[0] else None
        d_params = d_params or [None] * n_params
    d_c_0 = None if c_0 is None else d_c_0
    others = len(Ragged._fields) + len(Config._fields) + 1
    return d_input, d_h_0, d_c_0, d_params, [None] * n_masks, *(None,) * others


def _differentiable_grads(grads, input, h_0, c_0, params, masks, ragged, config: Config):
    """The gradients as differentiable functions of everything, by autograd over the reference."""
    inputs = [input, h_0, c_0, *params]
    wanted = {i: t for i, t in enumerate(inputs) if t is not None and t.requires_grad}
    results = differentiable_stack(
        config.cell, input, h_0, c_0, group_weights(params, config), masks, ragged
    )
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [r for r, _ in pairs if r is not None],
        list(wanted.values()),
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    by_index = dict(zip(wanted, found, strict=True))
    all_grads = [by_index.get(i) for i in range(len(inputs))]
    return *all_grads[:3], all_grads[3:]


torch.library.register_autograd("fusedrnn::rnn_forward", _autograd, setup_context=_setup_context)
