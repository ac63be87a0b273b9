"""Memory of a call: what autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def kept(module: nn.Module, x: Tensor | PackedSequence, weights: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward, but for weights and the input.

    Args:
        module: what is called, with ``x``.
        x: the input.
        weights: those that are no Parameters of the module.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x)
    data = x.data if isinstance(x, PackedSequence) else x
    for tensor in (data, *module.parameters(), *weights):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())
