"""``fusedrnn::rnn_forward`` and ``fusedrnn::rnn_backward``: a stack of layers as one operator.

One name for CPU and CUDA, with fake kernels (so that compilers see one node with symbolic T and
B) and autograd. The gradient of ``rnn_backward`` is that of the reference, so derivatives of every
order are right. ``transforms.py`` takes them through ``torch.func``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import _VF
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from .launches import Config
from .layout import Ragged
from .second import second_gradients
from .stack import (
    Saved,
    again_if_refused,
    stack_backward,
    stack_forward,
)
from .threads import alone, are_few

#: torch's own operator of each cell it has one for.
ATEN: dict[str, Callable] = {
    "lstm": _VF.lstm,
    "gru": _VF.gru,
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
}
_RAGGED = "Tensor? lengths, Tensor? reset, Tensor? batch_sizes"
_CONFIG = (
    "str cell, str backend, bool has_bias, int num_layers, bool bidirectional, str precision, "
    "bool compact, int members, bool recompute, "
    "bool projected, bool onednn"
)
# dropout_masks are optional because a program packaged by AOTInductor has None for an empty list.
torch.library.define(
    "fusedrnn::rnn_forward",
    "(Tensor input, Tensor h_0, Tensor? c_0, Tensor[] params, Tensor[]? dropout_masks, "
    f"{_RAGGED}, {_CONFIG}, bool save)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cs, Tensor hidden)",
)
torch.library.define(
    "fusedrnn::rnn_backward",
    "(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_cs, Tensor input, Tensor h_0, "
    "Tensor? c_0, Tensor[] params, Tensor[] dropout_masks, Tensor output, Tensor? gates, "
    f"Tensor? cs, Tensor? hidden, {_RAGGED}, {_CONFIG}, bool needs_input, int groups)"
    " -> (Tensor d_input, Tensor d_h_0, Tensor d_c_0, Tensor[] d_params)",
)


def forward_impl(input, h_0, c_0, params, dropout_masks, ragged: Ragged, config: Config, save):
    """``rnn_forward`` on real tensors, without the dispatcher: None where it has empty tensors."""
    if forward_ad._current_level >= 0:
        _refuse_tangents()  # the reference takes such a call, but an exported program comes here
    if config.backend == "aten":
        return _forward_by_torch(input, h_0, c_0, params, config)
    output, h_n, c_n, saved = again_if_refused(
        stack_forward, input, h_0, c_0, params, dropout_masks or (), ragged, config, save
    )
    return output, h_n, c_n, *saved[1:]


def _refuse_tangents():
    raise NotImplementedError(
        "fusedrnn's operators carry no tangents; call the module itself, not what was exported "
        "or compiled from it, and call it where the tangents are, not before"
    )


def _forward_flat(input, h_0, c_0, params, dropout_masks, *rest):
    ragged, config, (save,) = sorted_out(rest)
    return as_results(forward_impl(input, h_0, c_0, params, dropout_masks, ragged, config, save))


def as_results(found) -> tuple[torch.Tensor, ...]:
    """What ``forward_impl`` found as an operator's results: tensors, each one of its own."""
    return tuple(found[0].new_empty(0) if tensor is None else tensor for tensor in found)


torch.library.impl("fusedrnn::rnn_forward", ("cpu", "cuda"), _forward_flat)


def by_one_thread(cell: str, shape: Sequence[int], w_hh: torch.Tensor) -> bool:
    """Whether torch's operator of an input ``[T, B, I]`` gains by one thread (``threads.py``): then
    all that it multiplies in MKL is a step's small product, or no more than those together."""
    T, B, I = shape
    # What an LSTM multiplies, oneDNN mostly does.
    return cell != "lstm" and w_hh.shape[-1] >= I and are_few(T, B, w_hh)


def _forward_by_torch(input, h_0, c_0, params, config: Config):
    """torch's own operator, for compilers one node; without autograd and whatever else it lacks."""
    with alone(by_one_thread(config.cell, input.shape, params[1])):
        output, h_n, *c_n = ATEN[config.cell](
            input,
            h_0 if c_0 is None else (h_0, c_0),
            params,
            config.has_bias,
            config.num_layers,
            0.0,  # dropout
            False,  # training
            config.bidirectional,
            False,  # batch_first
        )
    return output, h_n, *(c_n or [None]), None, None, None


@torch.library.register_fake("fusedrnn::rnn_forward")
def _forward_fake(input, h_0, c_0, params, dropout_masks, *rest):
    _, config, (save,) = sorted_out(rest)
    *rows, _ = input.shape
    room, P = math.prod(rows), h_0.shape[-1]
    L, D, H = config.num_layers, config.directions, (h_0 if c_0 is None else c_0).shape[-1]
    empty, keeps_c = input.new_empty, c_0 is not None and not config.onednn
    return (
        empty(*rows, D * P),
        empty(h_0.shape),
        empty(0) if c_0 is None else empty(c_0.shape),
        empty(L * D, room, config.spec.saved * H) if save and not config.recompute else empty(0),
        empty(L * D, room, H) if save and keeps_c else empty(0),
        empty(L - 1, room, D * P) if save and L > 1 else empty(0),
    )


def sorted_out(rest):
    """The arguments after the tensors of a call: ragged, config, and what is left."""
    n = len(Ragged._fields)
    m = n + len(Config._fields)
    return Ragged(*rest[:n]), Config(*rest[n:m]), rest[m:]


def backward_impl(given, call, saved, ragged: Ragged, config: Config, needs_input, groups):
    """``rnn_backward`` on real tensors, without the dispatcher.

    given: d_output, d_h_n, d_c_n, d_cs; call: input, h_0, c_0, params, dropout_masks; saved:
    output, gates, cs, hidden.
    """
    if forward_ad._current_level >= 0:
        grads = (grad for grad in given if grad is not None)
        if any(forward_ad.unpack_dual(grad).tangent is not None for grad in grads):
            _refuse_tangents()  # without a word they would be lost
    (d_output, d_h_n, d_c_n, d_cs), (input, h_0, c_0, params, dropout_masks) = given, call
    zeros = None
    if d_h_n is None:
        d_h_n = zeros = torch.zeros_like(h_0)
    if c_0 is not None and d_c_n is None:
        # Nobody writes to them.
        is_same = zeros is not None and zeros.shape == c_0.shape
        d_c_n = zeros if is_same else torch.zeros_like(c_0)
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
        Saved(*saved),
        ragged,
        config,
        needs_input,
        groups,
    )
    return (
        input.new_empty(0) if d_input is None else d_input,
        d_h_0,
        input.new_empty(0) if d_c_0 is None else d_c_0,
        d_params,
    )


def _backward_flat(*flat):
    ragged, config, (needs_input, groups) = sorted_out(flat[13:])
    return backward_impl(flat[:4], flat[4:9], flat[9:13], ragged, config, needs_input, groups)


torch.library.impl("fusedrnn::rnn_backward", ("cpu", "cuda"), _backward_flat)


def flat_backward(op: Callable) -> Callable:
    """``op``, which takes all as ``rnn_backward`` does, with the arguments of ``backward_impl``."""

    def backward(given, call, saved, ragged, config, needs_input, groups):
        return op(*given, *call, *saved, *ragged, *config, needs_input, groups)

    return backward


@torch.library.register_fake("fusedrnn::rnn_backward")
def _backward_fake(
    d_output, d_h_n, d_c_n, d_cs, input, h_0, c_0, params, dropout_masks, output, gates, cs, hidden,
    *rest,
):  # fmt: skip
    _, config, (needs_input, groups) = sorted_out(rest)
    of_groups = (groups,) if groups > config.members else ()
    return (
        input.new_empty(input.shape if needs_input else 0),
        h_0.new_empty(h_0.shape),
        h_0.new_empty(0 if c_0 is None else c_0.shape),
        [p.new_empty(*of_groups, *p.shape) for p in params] if groups else [],
    )


def setup_context(ctx, inputs, output):
    input, h_0, c_0, params, dropout_masks, *rest = inputs
    ragged, config, _ = sorted_out(rest)
    keep(ctx, (input, h_0, c_0, params, dropout_masks), ragged, config, output)


def keep(ctx, call, ragged: Ragged, config: Config, output) -> None:
    """Saves in ctx what ``pull_back`` needs."""
    input, h_0, c_0, params, dropout_masks = call
    out, _, _, gates, cs, hidden = output
    ctx.config, ctx.counts = config, (len(params), len(dropout_masks))
    ctx.mark_non_differentiable(*[tensor for tensor in (gates, hidden) if tensor is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, h_0, c_0, *ragged, out, gates, cs, hidden, *params, *dropout_masks)


def _each_of_batch(run: Callable, tensors):
    """``run(*tensors)``; of gradients that are a batch (``is_grads_batched``) one after the other.

    They are wrapped by an older vmap than torch.func's, for which a Function has no rule.
    """
    wrapped = [t is not None and is_legacy_batchedtensor(t) for t in tensors]
    if not any(wrapped):
        return run(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    every = list(zip(tensors, wrapped, strict=True))
    batches = [torch._remove_batch_dim(t, level, 0, 0) if is_one else t for t, is_one in every]
    count = len(batches[wrapped.index(True)])

    def nth(n):
        pairs = zip(batches, wrapped, strict=True)
        return [batch[n] if is_one else batch for batch, is_one in pairs]

    def together(*results):
        return None if results[0] is None else torch._add_batch_dim(torch.stack(results), 0, level)

    return tree_map(together, *[run(*nth(n)) for n in range(count)])


#: The gradients of what of a call is neither input, nor state, weight or mask.
_NO_TENSORS = (None,) * (len(Ragged._fields) + len(Config._fields) + 1)


def pull_back(ctx, grads, needs_input: bool, needs_params: bool, backward: Callable):
    """The gradients of ``rnn_forward`` in all its arguments, of those of its results.

    backward: ``backward_impl``, or what stands for it with its arguments.
    """
    input, h_0, c_0, lengths, reset, batch_sizes, out, gates, cs, hidden, *rest = ctx.saved_tensors
    ragged, saved = Ragged(lengths, reset, batch_sizes), (out, gates, cs, hidden)
    n_params, n_masks = ctx.counts
    params, masks = rest[:n_params], rest[n_params:]
    d_output, d_h_n, d_c_n, _, d_cs, _ = grads
    if c_0 is None:
        d_c_n = d_cs = None
    elif ctx.config.onednn:
        d_cs = None
    given = d_output, d_h_n, d_c_n, d_cs
    others = [None] * n_masks, *_NO_TENSORS
    if d_output is None and d_h_n is None and d_c_n is None and d_cs is None:
        return None, None, None, [None] * n_params, *others
    call = input, h_0, c_0, params, masks
    groups = ctx.config.members * needs_params

    def run(*given):
        return backward(given, call, saved, ragged, ctx.config, needs_input, groups)

    for grad in given:  # a loop, for its few calls
        if grad is not None and is_legacy_batchedtensor(grad):
            d_input, d_h_0, d_c_0, d_params = _each_of_batch(run, given)
            break
    else:
        d_input, d_h_0, d_c_0, d_params = run(*given)
    d_input = d_input if needs_input else None
    d_c_0 = None if c_0 is None else d_c_0
    return d_input, d_h_0, d_c_0, list(d_params) or [None] * n_params, *others


def _autograd(ctx, *grads):
    needs = ctx.needs_input_grad
    backward = flat_backward(torch.ops.fusedrnn.rnn_backward)
    return pull_back(ctx, grads, needs[0], any(needs[3]), backward)


torch.library.register_autograd("fusedrnn::rnn_forward", _autograd, setup_context=setup_context)


def setup_second_context(ctx, inputs, output):
    grads, (input, h_0, c_0, params, masks), rest = inputs[:4], inputs[4:9], inputs[13:]
    ragged, ctx.config, (ctx.needs_input, ctx.groups) = sorted_out(rest)
    ctx.set_materialize_grads(False)
    ctx.counts = len(params), len(masks)
    ctx.save_for_backward(*grads, *ragged, input, h_0, c_0, *params, *masks)


def second_autograd(ctx, v_input, v_h_0, v_c_0, v_params):
    """The gradients of ``rnn_backward`` in all its arguments, of those of its results."""
    n_params, n_masks = ctx.counts
    grads, ragged, rest = ctx.saved_tensors[:4], ctx.saved_tensors[4:7], ctx.saved_tensors[7:]
    primals, masks = rest[: 3 + n_params], rest[3 + n_params :]
    none = [None] * n_params
    directions = [
        v_input if ctx.needs_input else None,
        v_h_0,
        None if primals[2] is None else v_c_0,
        *(v_params or none),
    ]
    fixed = [None] * n_masks, *(None,) * (4 + len(Ragged._fields) + len(Config._fields) + 2)
    if all(direction is None for direction in directions):
        return *(None,) * 7, none, *fixed
    config, groups = ctx.config, ctx.groups

    def run(*directions):
        call = grads, primals, masks, Ragged(*ragged), config, groups
        return second_gradients(directions, *call)

    of_grads, of_primals = _each_of_batch(run, directions)
    # Of what the forward saved there is no gradient: it is a function of the others.
    return *of_grads, *of_primals[:3], of_primals[3:], *fixed


torch.library.register_autograd(
    "fusedrnn::rnn_backward", second_autograd, setup_context=setup_second_context
)
