"""Who is measured: torch.nn, fusedrnn by each backend and schedule, and other implementations.

A provider builds an RNN with torch's constructor arguments and says under which context it runs.
A peer stands in ``PROVIDERS`` whether it is installed or not: ``absent`` tells.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch

import fusedrnn
from fusedrnn.dispatch import precision

from . import peers, peers_cuda, peers_outside
from .cases import Workload
from .forcing import scheduled
from .peer import both

#: The provider that all others are compared with.
TORCH = "torch.nn"
#: How fp32 may be multiplied, coarsest first, and the unit roundoff of those coarser than fp32:
#: tf32 and fp16 both have 10 bits of fraction.
ROUNDOFF = {"fp16": 2**-11, "tf32": 2**-11, "tf32x3": None, "ieee": None}


def rnn_switch(cell: str) -> str:
    """torch's switch for RNNs, which cuDNN follows, or ``fusedrnn.use_precision``."""
    return precision()


def matmul_switch(cell: str) -> str:
    """torch's switch for matrix products; where nobody has set it, it is "none", and then ieee."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def either_switch(cell: str) -> str:
    """Of what multiplies under both switches: the coarser."""
    return min(rnn_switch(cell), matmul_switch(cell), key=list(ROUNDOFF).index)


def of_flashrnn(cell: str) -> str:
    """Its fused kernel has tf32 fragments alone; the GRU runs on products of cuBLAS."""
    return "tf32" if cell == "lstm" else matmul_switch(cell)


def of_haste(cell: str) -> str:
    """Its GRU allows cuBLAS any tensor core (TENSOR_OP_MATH), which may round fp32 to fp16."""
    return "fp16" if cell == "gru" else matmul_switch(cell)


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
        fp32: how it multiplies fp32 on CUDA, of a cell: a key of ``ROUNDOFF``.
        adapted: False where no adapter can be written; ``install`` says why.
    """

    classes: object
    context: Callable[[], AbstractContextManager] = nullcontext
    package: str = ""
    install: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    backward: bool = True
    fp32: Callable[[str], str] = matmul_switch
    adapted: bool = True

    def precision(self, dtype: torch.dtype, device: torch.device, cell: str) -> str:
        """How it multiplies: of fp32 a key of ``ROUNDOFF``, on the CPU ieee, else the dtype."""
        if dtype != torch.float32:
            return str(dtype).removeprefix("torch.")
        return self.fp32(cell) if device.type == "cuda" else "ieee"

    def eps(self, dtype: torch.dtype, device: torch.device, cell: str) -> float | None:
        """The unit roundoff of its gate, or None where it is the dtype's own."""
        return ROUNDOFF.get(self.precision(dtype, device, cell))


def _ours(backend: str, **options) -> Provider:
    return Provider(fusedrnn, lambda: fusedrnn.use_backend(backend), fp32=rnn_switch, **options)


def _forced(schedule: str) -> Provider:
    context = partial(scheduled, schedule)
    return Provider(fusedrnn, context, devices=("cuda",), fp32=rnn_switch)


PROVIDERS = {
    TORCH: Provider(torch.nn, fp32=rnn_switch),
    "fusedrnn": _ours("auto"),
    # The loop's own products follow the switch of matrix products, its projections ours.
    "fusedrnn torch": replace(_ours("torch"), fp32=either_switch),
    "fusedrnn aten": _ours("aten"),
    "fusedrnn compiled": _ours("compiled", devices=("cpu",)),
    "fusedrnn triton": _ours("triton", devices=("cuda",)),
    "fusedrnn resident": _forced("resident"),
    "fusedrnn cooperative": _forced("cooperative"),
    "fusedrnn stepwise": _forced("stepwise"),
    "eager loop": Provider(both(peers.EagerLoop)),
    "compiled step": Provider(both(peers.CompiledStep)),
    "compiled loop": Provider(both(peers.CompiledLoop)),
    # Without a mask it hands over to cuDNN on CUDA, with one it multiplies step by step.
    "keras": Provider(
        both(peers.Keras), package="keras", install="pip install keras", fp32=either_switch
    ),
    "jax": Provider(
        both(peers_outside.Jax),
        package="jax",
        install='pip install "jax[cpu]"',
        devices=("cpu",),
    ),
    "onnxruntime": Provider(
        both(peers_outside.OnnxRuntime),
        package="onnxruntime",
        install="pip install onnx onnxruntime",
        devices=("cpu",),
        backward=False,
    ),
    "flashrnn": Provider(
        both(peers_cuda.FlashRNN),
        package="flashrnn",
        install="pip install flashrnn (compiles with nvcc)",
        devices=("cuda",),
        fp32=of_flashrnn,
    ),
    "torchrl": Provider(
        both(peers_cuda.TorchRL),
        package="torchrl",
        install="pip install torchrl tensordict",
        devices=("cuda",),
        fp32=rnn_switch,
    ),
    "haste": Provider(
        both(peers_cuda.Haste),
        package="haste_pytorch",
        install="pip install haste_pytorch (compiles with nvcc)",
        devices=("cuda",),
        fp32=of_haste,
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
