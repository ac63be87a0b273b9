"""The gradient of the gradients: what ``rnn_backward`` needs to be differentiable itself.

The first derivatives of a stack are a pullback of its results, the second are a pullback of that
one; both are taken of the reference, whose operations autograd knows. ``torch.func`` composes under
autograd and under its own transforms alike, so this serves ``create_graph=True``, ``hessian`` and a
third derivative too. Axes as in ``transforms.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .launches import Config, group_weights
from .layout import Ragged
from .reference import differentiable_stack

Tensors = Sequence[Tensor | None]


def second_gradients(
    directions: Tensors,
    cotangents: Tensors,
    primals: Tensors,
    dropout_masks: Sequence[Tensor],
    ragged: Ragged,
    config: Config,
    groups: int,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Pulls ``directions`` back through the gradients of a stack.

    Args:
        directions: one for each of d_input, d_h_0, d_c_0 and d_params; None where it is zero.
        cotangents: d_output, d_h_n, d_c_n, d_cs; None where no gradient arrived.
        primals: input, h_0, c_0 (None for a cell without c), and params.
        dropout_masks: as of ``transforms.rnn_stack``, likewise ragged and config.
        groups: more than one if d_params is that of so many groups of sequences.

    Returns:
        The gradients of the cotangents and of the primals; None for what is None.
    """
    own: list[Any] = list(primals)
    is_shared = groups > config.members
    if is_shared:  # each group's gradient is that of weights of its own
        own[3:] = [p.expand(groups, *p.shape) for p in own[3:] if p is not None]
    given = [i for i, t in enumerate(cotangents) if t is not None]
    present = [i for i, t in enumerate(own) if t is not None]
    wanted = [i for i in present if directions[i] is not None]

    def results(*tensors: Tensor) -> tuple[Any, ...]:
        every = _results(dict(zip(present, tensors, strict=True)), dropout_masks, ragged, config)
        return tuple(every[i] for i in given)

    def gradients(tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pull = torch.func.vjp(results, *tensors)[1]
        found = dict(zip(present, pull(grads), strict=True))
        return tuple(found[i] for i in wanted)

    given_grads = tuple(t for t in cotangents if t is not None)
    pull = torch.func.vjp(gradients, tuple(t for t in own if t is not None), given_grads)[1]
    of_primals, of_grads = pull(tuple(t for t in directions if t is not None))
    if is_shared:
        of_primals = [g.sum(0) if i > 2 else g for i, g in zip(present, of_primals, strict=True)]
    return _spread(given, of_grads, len(cotangents)), _spread(present, of_primals, len(own))


def _results(
    tensors: dict[int, Tensor], masks: Sequence[Tensor], ragged: Ragged, config: Config
) -> tuple[Tensor | None, ...]:
    """Output, h_n, c_n and c of every step of a stack, or of one for each group's weights."""
    input, h_0, c_0 = tensors[0], tensors[1], tensors.get(2)
    params = [tensor for i, tensor in tensors.items() if i > 2]
    if params[1].dim() == 2:
        weights = group_weights(params, config)
        return differentiable_stack(config.cell, input, h_0, c_0, weights, masks, ragged)
    groups = len(params[1])

    def part(tensor: Tensor | None, n: int, dim: int = 1) -> Any:
        return None if tensor is None else tensor.chunk(groups, dim)[n]

    found: list[Any] = []
    for n in range(groups):
        own = part(ragged.lengths, n, 0), part(ragged.reset, n)
        output, h_n, c_n, cs = differentiable_stack(
            config.cell,
            part(input, n),
            part(h_0, n),
            part(c_0, n),
            group_weights([p[n] for p in params], config),
            [part(mask, n) for mask in masks],
            Ragged(*own),
        )
        by_time = None if cs is None else cs.unflatten(1, (len(output), -1))
        found.append((output, h_n, c_n, by_time))
    every: Any = (
        None if each[0] is None else torch.cat(each, dim)
        for each, dim in zip(zip(*found, strict=True), (1, 1, 1, 2), strict=True)
    )
    output, h_n, c_n, by_time = every
    return output, h_n, c_n, None if by_time is None else by_time.flatten(1, 2)


def _spread(indices: Sequence[int], values: Sequence[Tensor], count: int) -> list[Tensor | None]:
    by_index = dict(zip(indices, values, strict=True))
    return [by_index.get(i) for i in range(count)]
