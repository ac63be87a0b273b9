"""The way to the operators, and through the transforms of ``torch.func``.

``grad`` and ``vjp`` need an ``autograd.Function``, whose formulas are the operators' own
(``ops.py``). With tangents (``jvp``, ``jacfwd``, ``hessian``) the reference runs instead.

What ``vmap`` makes of a call is more sequences, where it can. With weights that are shared, the
mapped axis N joins the batch: B sequences of N calls are N * B sequences of one, in one launch, and
gradients of the weights are those of N *groups* of sequences (``stack_backward``). So per-sample
gradients cost one backward. With weights of their own (an ensemble) the sequences are those of N
*members*, on the kernels in one launch too. With ``recompute``, in the loop, with packed input,
and where only gradients are mapped, the calls run one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .launches import Config, group_weights, takes_members
from .layout import Ragged
from .ops import (
    as_results,
    backward_impl,
    flat_backward,
    forward_impl,
    keep,
    pull_back,
    second_autograd,
    setup_context,
    setup_second_context,
    sorted_out,
)
from .reference import differentiable_stack


def rnn_stack(
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    ragged: Ragged,
    config: Config,
    *,
    keep_states: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
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
        step, ``[L*D, R, H]``, where it is kept.
    """
    h_0, c_0 = states[0], states[1] if len(states) == 2 else None
    if _has_tangents():
        weights = group_weights(params, config)
        output, h_n, c_n, cs = differentiable_stack(
            config.cell, input, h_0, c_0, weights, dropout_masks, ragged
        )
        return output, [h_n] if c_0 is None else [h_n, c_n], cs
    # Decided by requires_grad and never by a module's training flag: backward in eval() works.
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *states, *params))
    output, h_n, c_n, _, cs, _ = rnn_forward(
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


def _has_tangents() -> bool:
    """Whether tangents are carried along."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, or tangents are carried along."""
    found = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if found and "torch._dynamo" in sys.modules:
        # Dynamo looks into no Function that has a rule for vmap, but can leave it as it is.
        torch.compiler.allow_in_graph(_transformed)
    return found


# Dynamo calls these while it traces, when the transforms in what it traces are at work, and keeps
# the answer; it has guards on transforms of its own.
for _asked in (_has_tangents, is_transformed):
    _asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rnn_forward(*arguments: Any) -> Sequence[Any]:
    """The operator, or what stands for it under a transform or where nobody looks at operators."""
    if is_transformed():
        return _transformed(*_counts(arguments, 3), *_flat(arguments))
    if is_watched(arguments[0]):
        return torch.ops.fusedrnn.rnn_forward(*arguments)
    ragged, config, (save,) = sorted_out(arguments[5:])
    input, h_0, c_0, params, masks = arguments[:5]
    tensors = (input, h_0, *params) if c_0 is None else (input, h_0, c_0, *params)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    found = run_eagerly(input, h_0, c_0, params, masks, ragged, config, save, needs_grad)
    return as_results(found)


def _transformed(*flat: Any) -> Sequence[Any]:
    *others, save = flat
    # Dynamo does not know what a transform within its graph makes require a gradient.
    tensors = (t for t in others if isinstance(t, Tensor))
    save = save or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    return _Forward.apply(*others, save)


def run_eagerly(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    params: Sequence[Tensor],
    masks: Sequence[Tensor],
    ragged: Ragged,
    config: Config,
    save: bool,
    needs_grad: bool,
) -> Sequence[Any]:
    """What ``forward_impl`` finds, with autograd, where nobody looks at operators."""
    if needs_grad:
        apply = _Eager.apply if is_functorch_wrapped_tensor(input) else _apply_eagerly
        return apply((masks, ragged, config, save), input, h_0, c_0, *params)
    return forward_impl(input, h_0, c_0, params, masks, ragged, config, save)


def is_watched(tensor: Tensor) -> bool:
    """Whether a compiler, a mode, a profiler or a tensor subclass must see operators."""
    return type(tensor) is not Tensor or torch.compiler.is_compiling() or are_operators_watched()


def are_operators_watched() -> bool:
    """Likewise, but for what the tensor and a compiler tell."""
    return (
        torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def rnn_backward(*arguments: Any) -> Sequence[Any]:
    """Likewise."""
    if not is_transformed():
        return torch.ops.fusedrnn.rnn_backward(*arguments)
    d_input, d_h_0, d_c_0, *d_params = _Backward.apply(*_counts(arguments, 7), *_flat(arguments))
    return d_input, d_h_0, d_c_0, d_params


def _counts(arguments: Sequence[Any], at: int) -> tuple[int, int]:
    """How many params and masks there are, which stand side by side."""
    return len(arguments[at]), len(arguments[at + 1])


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """The arguments without lists, into which no Function looks for tensors."""
    flat: list[Any] = []
    for argument in arguments:
        flat += argument if isinstance(argument, (list, tuple)) else [argument]
    return flat


def _nested(flat: Sequence[Any], at: int, counts: tuple[int, int]) -> tuple[Any, ...]:
    """The way back from ``_flat``, of arguments whose params are number ``at``."""
    middle = at + counts[0]
    end = middle + counts[1]
    return *flat[:at], list(flat[at:middle]), list(flat[middle:end]), *flat[end:]


class _Eager(torch.autograd.Function):
    """``rnn_forward`` without the dispatcher; ``rest`` is what has no gradient.

    The autograd that ``torch.library`` makes walks through all arguments as trees: 0.2 ms a call.
    """

    @staticmethod
    def forward(ctx, rest, input, h_0, c_0, *params):
        masks, ragged, config, save = rest
        call = input, h_0, c_0, params, masks
        results = forward_impl(*call, ragged, config, save)
        keep(ctx, call, ragged, config, results)
        return results

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad
        # With create_graph the gradients are the operator's, which has second derivatives.
        differentiable = torch.is_grad_enabled()
        for grad in grads:  # a loop, for its few calls
            differentiable = differentiable or (grad is not None and is_watched(grad))
        backward = flat_backward(rnn_backward) if differentiable else backward_impl
        found = pull_back(ctx, grads, needs[1], True in needs[4:], backward)
        return None, *found[:3], *found[3]


#: ``_Eager.apply`` without a look at each argument, whether a finished transform left it behind,
#: which takes 4 us: what torch's own method does where no transform is at work.
_apply_eagerly = super(torch.autograd.Function, _Eager).apply


class _Forward(torch.autograd.Function):
    """``rnn_forward`` of ``n_params, n_masks`` and the flat arguments."""

    @staticmethod
    def forward(n_params, n_masks, *flat):
        return torch.ops.fusedrnn.rnn_forward(*_nested(flat, 3, (n_params, n_masks)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        setup_context(ctx, _nested(inputs[2:], 3, inputs[:2]), output)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[2:]
        needs_params = any(needs[3 : 3 + ctx.counts[0]])
        found = pull_back(ctx, grads, needs[0], needs_params, flat_backward(rnn_backward))
        return None, None, *_flat(found)

    @staticmethod
    def vmap(info, in_dims, n_params, n_masks, *flat):
        counts = n_params, n_masks
        return _map_forward(info, _nested(in_dims[2:], 3, counts), *_nested(flat, 3, counts))


class _Backward(torch.autograd.Function):
    """``rnn_backward`` of ``n_params, n_masks`` and the flat arguments; flat results."""

    @staticmethod
    def forward(n_params, n_masks, *flat):
        results = torch.ops.fusedrnn.rnn_backward(*_nested(flat, 7, (n_params, n_masks)))
        return tuple(_flat(results))

    @staticmethod
    def setup_context(ctx, inputs, output):
        setup_second_context(ctx, _nested(inputs[2:], 7, inputs[:2]), output)

    @staticmethod
    def backward(ctx, v_input, v_h_0, v_c_0, *v_params):
        return None, None, *_flat(second_autograd(ctx, v_input, v_h_0, v_c_0, v_params))

    @staticmethod
    def vmap(info, in_dims, n_params, n_masks, *flat):
        counts = n_params, n_masks
        results, dims = _map_backward(
            info, _nested(in_dims[2:], 7, counts), *_nested(flat, 7, counts)
        )
        return tuple(_flat(results)), tuple(_flat(dims))


class _Fold(NamedTuple):
    """N calls of T steps and B sequences as one call of N * B sequences, one call after another."""

    N: int
    T: int
    B: int
    members: int = 1  # N, if each call has weights of its own

    def config(self, config: Config) -> Config:
        # Of compact rows it could not be told whose they are.
        return config._replace(compact=False, members=self.members)

    def weights(self, params: Sequence[Tensor], dims: Sequence[int | None]) -> Sequence[Tensor]:
        if self.members == 1:
            return params
        return [self.mapped(p, dim) for p, dim in zip(params, dims, strict=True)]

    def mapped(self, tensor: Tensor, dim: int | None) -> Tensor:
        """The tensor with the mapped dimension in front, where it may have had none."""
        return tensor.expand(self.N, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def batch(self, tensor: Tensor | None, dim: int | None, at: int = 1) -> Tensor | None:
        """A tensor of one call whose dimension ``at`` is B, for all of them."""
        if tensor is None:
            return None
        return self.mapped(tensor, dim).movedim(0, at).flatten(at, at + 1)

    def rows(self, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """One whose dimension 1 is T * B; an empty stand-in stays one."""
        if tensor is None:
            return None
        mapped = self.mapped(tensor, dim)
        if mapped.dim() == 2:
            return mapped[0]
        return mapped.unflatten(2, (self.T, self.B)).movedim(0, 2).flatten(1, 3)

    def unbatch(self, tensor: Tensor) -> Tensor:
        """The way back from ``batch``, to the mapped dimension in front."""
        if tensor.dim() == 1:
            return tensor.expand(self.N, *tensor.shape)
        return tensor.unflatten(1, (self.N, self.B)).movedim(1, 0)

    def unrows(self, tensor: Tensor) -> Tensor:
        """The way back from ``rows``, likewise."""
        if tensor.dim() == 1:
            return tensor.expand(self.N, *tensor.shape)
        by_time = tensor.unflatten(1, (self.T, self.N, self.B)).movedim(2, 0)
        return by_time.flatten(2, 3)


def _map_forward(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """The rule of ``rnn_forward``: all calls as one, if they share their weights or are members."""
    input, h_0, c_0, params, masks, *rest = arguments
    ragged, config, (save,) = sorted_out(rest)
    # Here, one transform further out, it may show that something requires a gradient.
    tensors = (t for t in (input, h_0, c_0, *params) if t is not None)
    save = save or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    fold = _fold(info, (input, h_0, c_0), in_dims[:3], in_dims[3], ragged, config)
    if fold is None:
        arguments = *arguments[:-1], save
        return _one_by_one(rnn_forward, info.batch_size, in_dims, arguments)
    output, h_n, c_n, gates, cs, hidden = rnn_forward(
        fold.batch(input, in_dims[0]),
        fold.batch(h_0, in_dims[1]),
        fold.batch(c_0, in_dims[2]),
        fold.weights(params, in_dims[3]),
        [fold.batch(mask, dim) for mask, dim in zip(masks, in_dims[4], strict=True)],
        *_folded(fold, ragged, in_dims[5:8]),
        *fold.config(config),
        save,
    )
    results = [fold.unbatch(t) for t in (output, h_n, c_n)]
    results += [fold.unrows(t) for t in (gates, cs, hidden)]
    return tuple(results), (0,) * 6


def _map_backward(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """The rule of ``rnn_backward``: as one call where forward was one."""
    d_output, d_h_n, d_c_n, d_cs, input, h_0, c_0, params, masks = arguments[:9]
    output, gates, cs, hidden, *rest = arguments[9:]
    ragged, config, (needs_input, groups) = sorted_out(rest)
    dims = in_dims
    fold = _fold(info, (input, h_0, c_0), dims[4:7], dims[7], ragged, config)
    if fold is None or dims[10] is None or (fold.members > 1 and groups > 1):
        return _one_by_one(rnn_backward, info.batch_size, in_dims, arguments)
    d_input, d_h_0, d_c_0, d_params = rnn_backward(
        fold.batch(d_output, dims[0]),
        fold.batch(d_h_n, dims[1]),
        fold.batch(d_c_n, dims[2]),
        fold.rows(d_cs, dims[3]),
        fold.batch(input, dims[4]),
        fold.batch(h_0, dims[5]),
        fold.batch(c_0, dims[6]),
        fold.weights(params, dims[7]),
        [fold.batch(mask, dim) for mask, dim in zip(masks, dims[8], strict=True)],
        fold.batch(output, dims[9]),
        fold.rows(gates, dims[10]),
        fold.rows(cs, dims[11]),
        fold.rows(hidden, dims[12]),
        *_folded(fold, ragged, dims[13:16]),
        *fold.config(config),
        needs_input,
        fold.N * groups,
    )
    each = (fold.N, groups) if groups > 1 else (fold.N,)
    d_params = [d.unflatten(0, each) if fold.N * groups > 1 else d.unsqueeze(0) for d in d_params]
    results = *(fold.unbatch(t) for t in (d_input, d_h_0, d_c_0)), d_params
    return results, (0, 0, 0, [0] * len(d_params))


def _fold(
    info: Any,
    tensors: Sequence[Tensor | None],
    dims: Sequence[int | None],
    weight_dims: Sequence[int | None],
    ragged: Ragged,
    config: Config,
) -> _Fold | None:
    """How the calls become one, of input, h_0 and c_0; None where they do not."""
    if ragged.batch_sizes is not None or config.members > 1:
        return None
    input = tensors[0]
    assert input is not None
    T, B, _ = (size for i, size in enumerate(input.shape) if i != dims[0])
    if all(dim is None for dim in weight_dims):
        return _Fold(info.batch_size, T, B)
    if info.batch_size == 1 or config.backend != "triton":
        return None
    fold = _Fold(info.batch_size, T, B, members=info.batch_size)
    whole: Any = (fold.batch(t, dim) for t, dim in zip(tensors, dims, strict=True))
    is_ragged = any(t is not None for t in ragged)
    return fold if takes_members(fold.config(config), is_ragged, *whole) else None


def _folded(fold: _Fold, ragged: Ragged, dims: Sequence[int | None]) -> Ragged:
    return Ragged(fold.batch(ragged.lengths, dims[0], 0), fold.batch(ragged.reset, dims[1]))


def _one_by_one(
    op: Callable, count: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """The calls one after the other, and their results stacked."""

    def nth(argument: Any, dims: Any, n: int) -> Any:
        if isinstance(argument, (list, tuple)):
            return [nth(each, dim, n) for each, dim in zip(argument, dims, strict=True)]
        return argument if dims is None else argument.select(dims, n)

    calls = [
        op(*(nth(argument, dims, n) for argument, dims in zip(arguments, in_dims, strict=True)))
        for n in range(count)
    ]
    results: list[Any] = []
    out_dims: list[Any] = []
    for each in zip(*calls, strict=True):
        if isinstance(each[0], list):
            results.append([torch.stack(parts) for parts in zip(*each, strict=True)])
            out_dims.append([0] * len(each[0]))
        else:
            results.append(torch.stack(each))
            out_dims.append(0)
    return tuple(results), tuple(out_dims)
