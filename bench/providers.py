"""Who is measured: torch.nn, fusedrnn by each backend and schedule, and other implementations.

A provider builds an RNN with torch's constructor arguments and says under which context it runs.
A peer stands in ``PROVIDERS`` whether it is installed or not: ``absent`` tells.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch

import fusedrnn

from . import peers
from .cases import Workload
from .forcing import scheduled

#: The provider that all others are compared with.
TORCH = "torch.nn"


@dataclass(frozen=True)
class Provider:
    """One contender.

    Attributes:
        classes: holds LSTM, GRU and RNN.
        context: is entered around every call.
        package: what must be importable, or ``""``.
        install: the line that brings it.
        devices: where it computes.
        backward: False for what only infers; its gate looks at outputs and final states.
        eps: the unit roundoff of its arithmetic where that is coarser than the dtype's.
        adapted: False where no adapter can be written; ``install`` says why.
    """

    classes: object
    context: Callable[[], AbstractContextManager] = nullcontext
    package: str = ""
    install: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    backward: bool = True
    eps: float | None = None
    adapted: bool = True


def _ours(backend: str, devices: tuple[str, ...] = ("cpu", "cuda")) -> Provider:
    return Provider(fusedrnn, lambda: fusedrnn.use_backend(backend), devices=devices)


def _forced(schedule: str) -> Provider:
    return Provider(fusedrnn, lambda: scheduled(schedule), devices=("cuda",))


PROVIDERS = {
    TORCH: Provider(torch.nn),
    "fusedrnn": _ours("auto"),
    "fusedrnn torch": _ours("torch"),
    "fusedrnn aten": _ours("aten"),
    "fusedrnn triton": _ours("triton", ("cuda",)),
    "fusedrnn resident": _forced("resident"),
    "fusedrnn cooperative": _forced("cooperative"),
    "fusedrnn stepwise": _forced("stepwise"),
    "eager loop": Provider(peers.both(peers.EagerLoop)),
    "compiled loop": Provider(peers.both(peers.CompiledLoop)),
    "keras": Provider(peers.both(peers.Keras), package="keras", install="pip install keras"),
    "jax": Provider(
        peers.both(peers.Jax), package="jax", install='pip install "jax[cpu]"', devices=("cpu",)
    ),
    "onnxruntime": Provider(
        peers.both(peers.OnnxRuntime),
        package="onnxruntime",
        install="pip install onnx onnxruntime",
        devices=("cpu",),
        backward=False,
    ),
    "flashrnn": Provider(
        peers.both(peers.FlashRNN),
        package="flashrnn",
        install="pip install flashrnn (compiles with nvcc)",
        devices=("cuda",),
    ),
    "torchrl": Provider(
        peers.both(peers.TorchRL),
        package="torchrl",
        install="pip install torchrl tensordict",
        devices=("cuda",),
    ),
    "haste": Provider(
        peers.both(peers.Haste),
        package="haste_pytorch",
        install="pip install haste_pytorch (compiles with nvcc)",
        devices=("cuda",),
    ),
    "fastlstm": Provider(
        None,
        package="fastlstm",
        install="no adapter: it is not released as a package, sets tf32 for the whole process when "
        "it is imported, and refuses the gradients of h_n and c_n that the gate asks for",
        devices=("cuda",),
        adapted=False,
    ),
}


def absent(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot take part on a device, or None where it can."""
    entry = PROVIDERS[provider]
    if not entry.adapted:
        return entry.install
    if entry.package and find_spec(entry.package) is None:
        return f"not installed: {entry.install}"
    if device.type not in entry.devices:
        return f"computes on {' and '.join(entry.devices)} only"
    return None


def contenders(device: torch.device) -> tuple[str, ...]:
    """All that can take part, torch.nn first."""
    return tuple(name for name in PROVIDERS if absent(name, device) is None)


def peer_versions() -> dict[str, str]:
    """The version of each peer that is installed."""
    packages = {entry.package for entry in PROVIDERS.values() if entry.package and entry.adapted}
    return {name: version(name) for name in sorted(packages) if find_spec(name) is not None}


def names_for(workload: Workload, device: torch.device) -> tuple[str, ...]:
    """Who takes part in the main job. On a GPU the sweep names Triton, and nothing in its place."""
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
