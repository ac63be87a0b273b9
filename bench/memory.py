"""Memory of a call: what autograd keeps for backward, and what is new of the system."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


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


def new_pages(call: Callable[[], object]) -> int | None:
    """How many pages of memory a call had to ask the system for; None where it does not say.

    glibc's malloc asks for everything beyond 32 MiB each time anew, unless its heap happens to have
    room. 6,000 pages take about 10 ms, which of a call of 17 ms is most.
    """
    if resource is None:
        return None
    counts = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return int(median(counts))
