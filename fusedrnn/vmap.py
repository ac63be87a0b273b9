"""The rules by which ``torch.func.vmap`` maps the operators of ``ops.py``.

Sequences are independent, so a mapped axis of N calls with the same weights joins the batch. Calls
with weights of their own, or gradients of the weights, run one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map


def has_tangents() -> bool:
    """Returns whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Returns whether a transform of ``torch.func`` or forward-mode derivatives are active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_grad(*tensors: Any) -> bool:
    """Returns whether autograd records a call of these; no module's training flag matters."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def is_eager(tensor: Tensor) -> bool:
    """Returns whether values are there to be read: no compiler, transform, mode or subclass."""
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


# TorchDynamo calls these while it traces and keeps the answer; it guards on transforms itself.
for _function in (has_tangents, is_transformed):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


#: The axis of the sequences in each tensor of an operator, None where there is none; 2 stands for
#: rows ``[Z, T*B, C]``, whose axis of the sequences it becomes.
_FORWARD = (1, 1, 1, None, 1, 0, 1, None, None)
_BACKWARD = (1, 1, 1, 2, 1, 1, 1, None, 1, 1, 1, 1, 2, 2, 2, 0, 1, None, None)
_RESULTS = {len(_FORWARD): (1, 1, 1, 2, 2, 2), len(_BACKWARD): (1, 1, 1, None)}


def map_forward(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Maps ``rnn_forward``."""
    return _map(torch.ops.fusedrnn.rnn_forward, _FORWARD, info.batch_size, dims, arguments)


def map_backward(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Maps ``rnn_backward``."""
    return _map(torch.ops.fusedrnn.rnn_backward, _BACKWARD, info.batch_size, dims, arguments)


def _map(op: Callable, axes: tuple, N: int, dims: Sequence[Any], arguments: Any) -> tuple[Any, Any]:
    """Runs the N calls as one, but one by one if rows are packed or weights differ."""
    needs_params = axes is _BACKWARD and arguments[-1]
    has_params = any(dim is not None for dim in dims[axes.index(None)])
    if needs_params or has_params or arguments[len(axes) - 2] is not None:
        calls = []
        for n in range(N):
            own = tree_map(lambda t, d, n=n: t if d is None else t.select(d, n), arguments, dims)
            calls.append(op(*own))
        results = tree_map(lambda *parts: torch.stack(parts), *calls)
        return results, tree_map(lambda _: 0, results)
    place = axes.index(None) - 3
    T = arguments[place].shape[dims[place] == 0]

    def join(tensor: Any, dim: Any, axis: int | None) -> Any:
        if tensor is None or axis is None:
            return tensor
        if isinstance(tensor, (list, tuple)):
            return [join(each, d, axis) for each, d in zip(tensor, dim, strict=True)]
        mapped = tensor.expand(N, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        if mapped.dim() == 2 and axis:
            return mapped[0]  # a placeholder
        mapped = mapped.unflatten(2, (T, mapped.shape[2] // T)) if axis == 2 else mapped
        return mapped.movedim(0, axis).flatten(min(axis, 1), axis + 1)

    def split(tensor: Any, axis: int | None) -> Any:
        if axis is None:
            return tensor  # no gradient of a weight
        if tensor.dim() == 1:
            return tensor.expand(N, *tensor.shape)
        if axis == 2:
            tensor = tensor.unflatten(1, (T, tensor.shape[1] // T))
        tensor = tensor.unflatten(axis, (N, tensor.shape[axis] // N)).movedim(axis, 0)
        return tensor.flatten(2, 3) if axis == 2 else tensor

    joined = [join(*each) for each in zip(arguments, dims, axes, strict=False)]
    results = op(*joined, *arguments[len(axes) :])
    found = tuple(split(*each) for each in zip(results, _RESULTS[len(axes)], strict=True))
    return found, tuple([] if axis is None else 0 for axis in _RESULTS[len(axes)])
