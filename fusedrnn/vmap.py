"""The rules of ``torch.func`` for the operators of ``ops.py``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
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


def map_operator(op: Callable, info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    """Runs the mapped calls of an operator one after the other and stacks their results."""

    def nth(argument: Any, dims: Any, n: int) -> Any:
        if isinstance(argument, (list, tuple)):
            return [nth(each, dim, n) for each, dim in zip(argument, dims, strict=True)]
        return argument if dims is None else argument.select(dims, n)

    def stacked(each: Any) -> Any:
        if isinstance(each[0], list):
            return [torch.stack(parts) for parts in zip(*each, strict=True)]
        return torch.stack(each)

    calls = [op(*nth(arguments, in_dims, n)) for n in range(info.batch_size)]
    results = tuple(stacked(each) for each in zip(*calls, strict=True))
    return results, tuple([0] * len(r) if isinstance(r, list) else 0 for r in results)
