"""The rules by which ``torch.func.vmap`` maps the operators of ``ops.py``.

Sequences are independent, so a mapped axis of N calls with the same weights joins the batch: one
call of N * B sequences. Where every call has weights, or a gradient of the weights, for itself
(ensembles, per-sample gradients), and with packed input, the N calls run one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangents() -> bool:
    """Returns whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Returns whether a transform of ``torch.func`` or forward-mode derivatives are active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# TorchDynamo calls these while it traces and keeps the answer; it guards on transforms itself.
for _function in (has_tangents, is_transformed):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Fold(NamedTuple):
    """N calls of T steps and B sequences as one call of N * B sequences."""

    N: int
    T: int
    B: int

    def mapped(self, tensor: Tensor, dim: int | None) -> Tensor:
        """Returns the tensor with the mapped axis in front, expanded if there was none."""
        return tensor.expand(self.N, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def join(self, tensor: Tensor | None, dim: int | None, at: int = 1) -> Tensor | None:
        """Joins the mapped axis with axis ``at``, the batch."""
        if tensor is None:
            return None
        return self.mapped(tensor, dim).movedim(0, at).flatten(at, at + 1)

    def join_rows(self, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """Joins the mapped axis with the batch in ``[Z, T * B, C]``; placeholders stay 1-D."""
        if tensor is None:
            return None
        mapped = self.mapped(tensor, dim)
        if mapped.dim() == 2:
            return mapped[0]
        return mapped.unflatten(2, (self.T, self.B)).movedim(0, 2).flatten(1, 3)

    def split(self, tensor: Tensor) -> Tensor:
        """Reverses ``join``; the mapped axis is in front."""
        if tensor.dim() == 1:
            return tensor.expand(self.N, *tensor.shape)
        return tensor.unflatten(1, (self.N, self.B)).movedim(1, 0)

    def split_rows(self, tensor: Tensor) -> Tensor:
        """Reverses ``join_rows``; the mapped axis is in front."""
        if tensor.dim() == 1:
            return tensor.expand(self.N, *tensor.shape)
        return tensor.unflatten(1, (self.T, self.N, self.B)).movedim(2, 0).flatten(2, 3)


def map_forward(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Maps ``rnn_forward``."""
    forward = torch.ops.fusedrnn.rnn_forward
    input, h_0, c_0, params, masks, lengths, reset, batch_sizes, table, *config = arguments
    if batch_sizes is not None or any(dim is not None for dim in dims[3]):
        return _one_by_one(forward, info.batch_size, dims, arguments)
    fold = _fold(info, input, dims[0])
    results = forward(
        *map(fold.join, (input, h_0, c_0), dims[:3]),
        params,
        [fold.join(mask, dim) for mask, dim in zip(masks or (), dims[4] or (), strict=True)],
        fold.join(lengths, dims[5], 0),
        fold.join(reset, dims[6]),
        batch_sizes,
        table,
        *config,
    )
    of_batch = [fold.split(result) for result in results[:3]]
    return (*of_batch, *(fold.split_rows(result) for result in results[3:])), (0,) * len(results)


def map_backward(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Maps ``rnn_backward``, as one call unless weights need a gradient or are mapped."""
    backward = torch.ops.fusedrnn.rnn_backward
    d_output, d_h_n, d_c_n, d_cs, input, h_0, c_0, params, masks, *rest = arguments
    output, gates, cs, hidden, lengths, reset, batch_sizes, table, *config, needs_params = rest
    if batch_sizes is not None or needs_params or any(dim is not None for dim in dims[7]):
        return _one_by_one(backward, info.batch_size, dims, arguments)
    fold = _fold(info, input, dims[4])
    results = backward(
        *map(fold.join, (d_output, d_h_n, d_c_n), dims[:3]),
        fold.join_rows(d_cs, dims[3]),
        *map(fold.join, (input, h_0, c_0), dims[4:7]),
        params,
        [fold.join(mask, dim) for mask, dim in zip(masks, dims[8], strict=True)],
        fold.join(output, dims[9]),
        *map(fold.join_rows, (gates, cs, hidden), dims[10:13]),
        fold.join(lengths, dims[13], 0),
        fold.join(reset, dims[14]),
        batch_sizes,
        table,
        *config,
        needs_params,
    )
    return (*(fold.split(result) for result in results[:3]), []), (0, 0, 0, [])


def _fold(info: Any, input: Tensor, dim: int | None) -> _Fold:
    T, B = [size for i, size in enumerate(input.shape) if i != dim][:2]
    return _Fold(info.batch_size, T, B)


def _one_by_one(
    op: Callable, count: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """Runs the calls one after the other and stacks their results."""

    def nth(argument: Any, dims: Any, n: int) -> Any:
        if isinstance(argument, (list, tuple)):
            return [nth(each, dim, n) for each, dim in zip(argument, dims, strict=True)]
        return argument if dims is None else argument.select(dims, n)

    calls = [
        op(*(nth(argument, dims, n) for argument, dims in zip(arguments, in_dims, strict=True)))
        for n in range(count)
    ]

    def stacked(each: Any) -> Any:
        if isinstance(each[0], list):
            return [torch.stack(parts) for parts in zip(*each, strict=True)]
        return torch.stack(each)

    results = tuple(stacked(each) for each in zip(*calls, strict=True))
    return results, tuple([0] * len(r) if isinstance(r, list) else 0 for r in results)
