"""Who is measured: torch.nn and fusedrnn under each of its backends.

A provider builds an RNN with torch's constructor arguments and says under which context it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

import fusedrnn

from .cases import Workload

#: The provider that all others are compared with.
TORCH = "torch.nn"


@dataclass(frozen=True)
class Provider:
    """``classes`` holds LSTM and GRU; ``context`` is entered around every call."""

    classes: object
    context: Callable[[], AbstractContextManager]


PROVIDERS = {
    TORCH: Provider(torch.nn, nullcontext),
    "fusedrnn": Provider(fusedrnn, lambda: fusedrnn.use_backend("auto")),
    "fusedrnn torch": Provider(fusedrnn, lambda: fusedrnn.use_backend("torch")),
    "fusedrnn triton": Provider(fusedrnn, lambda: fusedrnn.use_backend("triton")),
}


def names_for(workload: Workload, device: torch.device) -> tuple[str, ...]:
    """Who takes part. On a GPU the sweep names Triton, so that nothing runs in its place."""
    if workload.lesson == "sweep":
        return (TORCH, "fusedrnn triton")
    # On the CPU fusedrnn may hand over to torch's own operator; the fallback keeps it honest.
    return (TORCH, "fusedrnn") if device.type == "cuda" else (TORCH, "fusedrnn", "fusedrnn torch")


def build(provider: str, cell: str, workload: Workload, **options) -> torch.nn.RNNBase:
    """A batch-first RNN of the workload's sizes; ``options`` go to the constructor."""
    sizes = {
        "num_layers": workload.layers,
        "bidirectional": workload.bidirectional,
        "dropout": workload.dropout,
        "batch_first": True,
    }
    rnn_class = getattr(PROVIDERS[provider].classes, cell.upper())
    return rnn_class(workload.I, workload.H, **sizes | options)
