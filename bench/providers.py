"""The implementations that are compared; each builds RNNs with torch's constructor arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

from .cases import Workload

#: The provider that all others are compared with.
TORCH = "torch.nn"
Tensors = tuple[Tensor, ...]


class Adapter(nn.RNNBase):
    """Another implementation of one layer and direction, with the interface of torch.nn.

    It has torch.nn's parameters. The gate differentiates through ``convert``; for timing,
    ``fix`` converts the weights once. Layers, directions and dropout are composed in ``forward``.

    Raises:
        NotImplementedError: the implementation does not support the cell, dtype, or sequences.
    """

    modes: tuple[str, ...] = ("LSTM", "GRU")
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def __init__(self, mode: str, *sizes: Any, **options: Any):
        if mode not in self.modes:
            raise NotImplementedError(f"supports {' and '.join(self.modes)} only")
        super().__init__(mode, *sizes, **options)
        self.fixed: list[Tensors] | None = None

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensors:
        """Returns the weights of a layer in the layout of the implementation."""
        return w_ih, w_hh, b_ih, b_hh

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """Returns output ``[B, T, H]`` and final states ``[B, H]`` for ``x`` ``[B, T, I]``."""
        raise NotImplementedError

    def _converted(self) -> list[Tensors]:
        return [self.convert(*(getattr(self, n) for n in names)) for names in self._all_weights]

    def fix(self) -> list[Tensor]:
        """Converts the weights once; returns the tensors that training differentiates."""
        self.fixed = [
            tuple(t.detach().clone().requires_grad_() for t in w) for w in self._converted()
        ]
        return [tensor for weights in self.fixed for tensor in weights]

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            raise NotImplementedError("does not support packed sequences")
        if input.dtype not in self.dtypes:
            raise NotImplementedError(f"does not support {input.dtype}")
        directions = 1 + self.bidirectional
        if hx is None:
            zeros = input.new_zeros(self.num_layers * directions, len(input), self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        given = hx if isinstance(hx, tuple) else (hx,)
        x, weights, finals = input, self.fixed or self._converted(), []
        for n in range(0, self.num_layers * directions, directions):
            x = F.dropout(x, self.dropout, self.training) if n and self.dropout else x
            outputs = []
            for z in range(n, n + directions):
                output, final = self.layer(
                    weights[z], x.flip(1) if z > n else x, tuple(s[z] for s in given)
                )
                outputs.append(output.flip(1) if z > n else output)
                finals.append(final)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return x, states if self.mode == "LSTM" else states[0]


def _loop(mode: str, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
    cell = {"LSTM": torch.lstm_cell, "GRU": torch.gru_cell, "RNN_TANH": torch.rnn_tanh_cell}[mode]
    outputs = []
    for x_t in x.unbind(1):
        new = cell(x_t, states if mode == "LSTM" else states[0], *weights)
        states = new if mode == "LSTM" else (new,)
        outputs.append(states[0])
    return torch.stack(outputs, 1), states


class EagerLoop(Adapter):
    modes = ("LSTM", "GRU", "RNN_TANH")
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        return _loop(self.mode, weights, x, states)


class CompiledLoop(EagerLoop):
    """torch.compile of the loop, which Dynamo unrolls."""

    longest = 30

    def __init__(self, mode: str, *sizes: Any, **options: Any):
        super().__init__(mode, *sizes, **options)
        # Dynamo limits the compilations of a code object, so each module gets its own.
        own = FunctionType(_loop.__code__.replace(), _loop.__globals__)
        self.compiled = torch.compile(own, fullgraph=True, dynamic=False)

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        if x.shape[1] > self.longest:
            raise NotImplementedError(f"is not compiled for T > {self.longest}: it is unrolled")
        return self.compiled(self.mode, weights, x, states)


def _reordered(tensor: Tensor, gates: int, order: tuple[int, ...]) -> Tensor:
    parts = tensor.chunk(gates)
    return torch.cat([parts[n] for n in order])


class FlashRNN(Adapter):
    """flashrnn 1.0.8, which does not project the input; gates i, f, z, o, and g | r, z | n."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensors:
        H, gates = self.hidden_size, 4 if self.mode == "LSTM" else 3
        bias = (b_ih + b_hh).view(4, H) if self.mode == "LSTM" else b_ih
        if self.mode == "GRU":  # g is the recurrent half of n, with its own bias
            w_hh = _reordered(w_hh, 3, (2, 0, 1))
            (r, z, n), (r_h, z_h, n_h) = b_ih.chunk(3), b_hh.chunk(3)
            bias = torch.stack((n_h, r + r_h, z + z_h, n))
        return w_ih, w_hh.reshape(gates, 1, H, H), bias.unsqueeze(1)

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        from flashrnn import flashrnn

        w_ih, recurrent, bias = weights
        projected = F.linear(x, w_ih).unflatten(2, (-1, 1, self.hidden_size))
        given = torch.stack(states)[:, :, None, None]
        hidden, final = flashrnn(
            projected, recurrent, bias, states=given, function=self.mode.lower(),
            backend="cuda_fused", dtype=str(x.dtype).removeprefix("torch."),
        )  # fmt: skip
        return hidden[0, :, :, 0], tuple(final[:, :, -1, 0])


class Haste(Adapter):
    """haste_pytorch 0.5: gates i, g, f, o and z, r, n; weights are transposed."""

    names = ("kernel", "recurrent_kernel", "bias", "recurrent_bias")

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensors:
        order = (4, (0, 2, 1, 3)) if self.mode == "LSTM" else (3, (1, 0, 2))
        w_ih, w_hh, b_ih, b_hh = (_reordered(t, *order) for t in (w_ih, w_hh, b_ih, b_hh))
        biases = (b_ih + b_hh,) if self.mode == "LSTM" else (b_ih, b_hh)
        return w_ih.T.contiguous(), w_hh.T.contiguous(), *biases

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        import haste_pytorch

        made = self.__dict__.setdefault("made", {})  # a module for each input size
        if (width := x.shape[2]) not in made:
            rnn_class = getattr(haste_pytorch, self.mode)
            made[width] = rnn_class(width, self.hidden_size, batch_first=True).to(x.device)
            made[width]._parameters.clear()  # replaced by plain attributes below
        rnn = made[width].train(self.training)
        vars(rnn).update(zip(self.names, weights, strict=False))
        given = tuple(state.unsqueeze(0) for state in states)
        output, final = rnn(x, given if self.mode == "LSTM" else given[0])
        return output, tuple(s[0] for s in (final if self.mode == "LSTM" else (final,)))


class TorchRL(Adapter):
    """The Triton kernels of torchrl's ``LSTMModule(recurrent_backend="triton")``."""

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        from torchrl.modules.tensordict_module import _rnn_triton

        # It takes states for every step, and reads those of the first step and of resets.
        given = [F.pad(state.unsqueeze(1), (0, 0, 0, x.shape[1] - 1)) for state in states]
        resets = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        run = getattr(_rnn_triton, f"{self.mode.lower()}_triton")
        result = run(x, *given, *weights, resets, input_precision=rnn_fp32())
        return result[0], tuple(result[-len(states) :])


def rnn_fp32() -> str:
    """Returns how cuDNN, fusedrnn and torchrl multiply fp32 by default on CUDA."""
    return "ieee" if torch.backends.cudnn.rnn.fp32_precision == "ieee" else "tf32"  # type: ignore[attr-defined]


def matmul_fp32() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@contextmanager
def scheduled(name: str) -> Iterator[None]:
    """Runs every layer inside by one schedule of the triton backend, each in its own launch.

    Raises:
        NotImplementedError: the schedule does not support a call, or cannot be forced.
    """
    from fusedrnn.kernels import plan

    if not hasattr(plan, "forced"):
        raise NotImplementedError("this version of fusedrnn cannot force a schedule")

    def planner(problem: Any, chip: Any) -> tuple:
        one = getattr(plan, name)(problem._replace(layers=1), chip)
        return (one,) * problem.layers

    with fusedrnn.use_backend("triton"), plan.forced(planner):
        yield


class Provider(NamedTuple):
    """An implementation that can be measured.

    Attributes:
        build: takes ``"LSTM"``, ``"GRU"`` or ``"RNN"`` and the arguments of torch's constructor.
        context: is entered around every call.
        install: package and the line that installs it, for what may be absent.
        devices: where it computes.
        fp32: returns how it multiplies fp32 on CUDA.
        layout: ``"padded"`` or ``"lengths"``, if it is not given packed sequences.
        step: it only runs single steps forward, by ``module.stream()``.
    """

    build: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    install: tuple[str, str] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    fp32: Callable[[], str] = rnn_fp32
    layout: str = ""
    step: bool = False


def _of(namespace: Any) -> Callable[..., nn.Module]:
    return lambda cell, *sizes, **options: getattr(namespace, cell)(*sizes, **options)


def _ours(backend: str, *devices: str) -> Provider:
    context = lambda: fusedrnn.use_backend(backend)  # noqa: E731
    return Provider(_of(fusedrnn), context, devices=devices or ("cpu", "cuda"))


def _forced(schedule: str) -> Provider:
    return Provider(_of(fusedrnn), lambda: scheduled(schedule), devices=("cuda",))


def _adapted(adapter: type[Adapter], install: tuple[str, str] | None = None, **options: Any):
    def build(cell: str, *sizes: Any, **of_torch: Any) -> Adapter:
        return adapter("RNN_TANH" if cell == "RNN" else cell, *sizes, **of_torch)

    devices = ("cuda",) if install else ("cpu", "cuda")
    return Provider(build, nullcontext, install, devices, **{"fp32": matmul_fp32} | options)


def _recomputing(cell: str, *sizes: Any, **options: Any) -> nn.Module:
    return getattr(fusedrnn, cell)(*sizes, recompute=True, **options)


PROVIDERS = {
    TORCH: Provider(_of(nn)),
    "fusedrnn": Provider(_of(fusedrnn)),
    "torch.nn padded": Provider(_of(nn), layout="padded"),
    "fusedrnn lengths": Provider(_of(fusedrnn), layout="lengths"),
    "fusedrnn stream": Provider(_of(fusedrnn), step=True),
    "fusedrnn recompute": _ours("torch")._replace(build=_recomputing),
    "fusedrnn torch": _ours("torch"),
    "fusedrnn aten": _ours("aten"),
    "fusedrnn triton": _ours("triton", "cuda"),
    "fusedrnn resident": _forced("resident"),
    "fusedrnn cooperative": _forced("cooperative"),
    "fusedrnn stepwise": _forced("stepwise"),
    "eager loop": _adapted(EagerLoop),
    "compiled loop": _adapted(CompiledLoop),
    # Its LSTM kernel has tf32 fragments only.
    "flashrnn": _adapted(FlashRNN, ("flashrnn", "pip install flashrnn"), fp32=lambda: "tf32"),
    # Its GRU lets cuBLAS round fp32 to fp16, which has as many fraction bits as tf32.
    "haste": _adapted(Haste, ("haste_pytorch", "pip install haste_pytorch"), fp32=lambda: "tf32"),
    "torchrl": _adapted(TorchRL, ("torchrl", "pip install torchrl tensordict"), fp32=rnn_fp32),
}


def absent(provider: str, device: torch.device) -> str | None:
    """Returns why a provider cannot take part on a device, or None if it can."""
    entry = PROVIDERS[provider]
    if device.type not in entry.devices:
        return f"runs on {entry.devices[0]} only"
    if entry.install and find_spec(entry.install[0]) is None:
        return f"not installed: {entry.install[1]}"
    return None


def peer_versions() -> dict[str, str]:
    """Returns the versions of the other implementations that are installed."""
    packages = [entry.install[0] for entry in PROVIDERS.values() if entry.install]
    return {name: version(name) for name in packages if find_spec(name) is not None}


def build(provider: str, cell: str, workload: Workload, **options: Any) -> Any:
    """Builds a batch-first RNN of the sizes of a workload."""
    sizes = {
        "num_layers": workload.layers, "bidirectional": workload.bidirectional,
        "dropout": workload.dropout, "batch_first": True,
    }  # fmt: skip
    return PROVIDERS[provider].build(cell.upper(), workload.I, workload.H, **sizes | options)
