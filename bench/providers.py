"""The implementations that are compared; each builds RNNs with torch's constructor arguments."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedrnn
from fusedrnn import use_backend
from fusedrnn.kernels import plan

from .cases import Workload

#: The provider that all others are compared with.
TORCH = "torch.nn"
Tensors = tuple[Tensor, ...]


class Adapter(nn.RNNBase):
    """One layer in one direction of another implementation, with torch.nn's interface.

    It has torch.nn's parameters. The gate differentiates through ``convert``, which lays them out
    as the implementation wants them; for timing ``fix`` does so once.
    NotImplementedError says that the implementation does not support a cell, dtype or layout.
    """

    modes: tuple[str, ...] = ("LSTM", "GRU")
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def __init__(self, cell: str, *sizes: Any, **options: Any):
        super().__init__("RNN_TANH" if cell == "RNN" else cell, *sizes, **options)
        self.fixed: Tensors = ()
        if self.mode not in self.modes:
            raise NotImplementedError(f"supports {' and '.join(self.modes)} only")
        if self.num_layers > 1 or self.bidirectional:
            raise NotImplementedError("is measured with one layer in one direction only")

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensors:
        return w_ih, w_hh, b_ih, b_hh

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """Returns output ``[B, T, H]`` and final states ``[B, H]`` for ``x`` ``[B, T, I]``."""
        raise NotImplementedError

    def fix(self) -> list[Tensor]:
        """Converts the weights; returns what training differentiates from now on."""
        weights = self.convert(*self._flat_weights)  # type: ignore[arg-type]
        self.fixed = tuple(t.detach().clone().requires_grad_() for t in weights)
        return list(self.fixed)

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not isinstance(input, Tensor) or input.dtype not in self.dtypes:
            raise NotImplementedError(f"does not support packed sequences or {input.data.dtype}")
        if hx is None:
            zeros = input.new_zeros(1, len(input), self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        states = tuple(s[0] for s in (hx if self.mode == "LSTM" else (hx,)))
        weights = self.fixed or self.convert(*self._flat_weights)  # type: ignore[arg-type]
        output, final = self.layer(weights, input, states)
        h_n, *c_n = (state.unsqueeze(0) for state in final)
        return output, (h_n, *c_n) if c_n else h_n


def _loop(mode: str, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
    cell: Any = {"LSTM": torch.lstm_cell, "GRU": torch.gru_cell}.get(mode, torch.rnn_tanh_cell)
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

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        torch._dynamo.reset()  # it limits how often a function is compiled
        self.compiled = torch.compile(_loop, fullgraph=True, dynamic=False)

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        if x.shape[1] > 30:
            raise NotImplementedError("is not compiled for T > 30, because it is unrolled")
        return self.compiled(self.mode, weights, x, states)


def _reordered(tensor: Tensor, *order: int) -> Tensor:
    parts = tensor.chunk(len(order))
    return torch.cat([parts[n] for n in order])


class FlashRNN(Adapter):
    """flashrnn 1.0.8, which does not project the input; gates i, f, z, o, and g | r, z | n."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensors:
        H, bias = self.hidden_size, (b_ih + b_hh).view(-1, self.hidden_size)
        if self.mode == "GRU":  # g is the recurrent half of n, with its own bias
            w_hh = _reordered(w_hh, 2, 0, 1)
            bias = torch.stack((b_hh[2 * H :], bias[0], bias[1], b_ih[2 * H :]))
        return w_ih, w_hh.view(-1, 1, H, H), bias.unsqueeze(1)

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        from flashrnn import flashrnn

        projected = F.linear(x, weights[0]).unflatten(2, (-1, 1, self.hidden_size))
        kinds = {"function": self.mode.lower(), "dtype": str(x.dtype).removeprefix("torch.")}
        kinds |= {"backend": "cuda_fused"}
        stacked = torch.stack(states)[:, :, None, None]
        hidden, final = flashrnn(projected, *weights[1:], states=stacked, **kinds)
        return hidden[0, :, :, 0], tuple(final[:, :, -1, 0])


class Haste(Adapter):
    """haste_pytorch 0.5: gates i, g, f, o and z, r, n; weights are transposed."""

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensors:
        order = (0, 2, 1, 3) if self.mode == "LSTM" else (1, 0, 2)
        w_ih, w_hh, b_ih, b_hh = (_reordered(t, *order) for t in (w_ih, w_hh, b_ih, b_hh))
        biases = (b_ih + b_hh,) if self.mode == "LSTM" else (b_ih, b_hh)
        return w_ih.T.contiguous(), w_hh.T.contiguous(), *biases

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        import haste_pytorch

        made = vars(self).get("made")  # not in __init__, for it would become a submodule
        if made is None:
            kind = getattr(haste_pytorch, self.mode)
            made = kind(x.shape[2], self.hidden_size, batch_first=True).to(x.device)
            made._parameters.clear()  # replaced by plain attributes below
            vars(self)["made"] = made
        names = ("kernel", "recurrent_kernel", "bias", "recurrent_bias")
        vars(made.train(self.training)).update(zip(names, weights, strict=False))
        hx = tuple(state.unsqueeze(0) for state in states)
        output, final = made(x, hx if self.mode == "LSTM" else hx[0])
        return output, tuple(s[0] for s in (final if self.mode == "LSTM" else (final,)))


class TorchRL(Adapter):
    """The Triton kernels of torchrl's ``LSTMModule(recurrent_backend="triton")``."""

    def layer(self, weights: Tensors, x: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        from torchrl.modules.tensordict_module import _rnn_triton

        # It takes states for every step, and reads those of the first step and of resets.
        padded = [F.pad(state.unsqueeze(1), (0, 0, 0, x.shape[1] - 1)) for state in states]
        resets = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        run = getattr(_rnn_triton, f"{self.mode.lower()}_triton")
        result = run(x, *padded, *weights, resets, input_precision=rnn_fp32())
        return result[0], tuple(result[-len(states) :])


def rnn_fp32() -> str:
    """Returns how cuDNN, fusedrnn and torchrl multiply fp32 on CUDA."""
    rnns: Any = torch.backends.cudnn.rnn
    return "ieee" if rnns.fp32_precision == "ieee" else "tf32"


@contextmanager
def scheduled(name: str) -> Iterator[None]:
    """Runs every layer inside by one schedule of the triton backend, each in its own launch."""

    def planner(problem: Any, chip: Any) -> tuple:
        return (plan.SCHEDULES[name](problem._replace(layers=1), chip),) * problem.layers

    with use_backend("triton"), plan.forced(planner):
        yield


class Provider(NamedTuple):
    """An implementation that can be measured."""

    build: Callable  # from "LSTM", "GRU" or "RNN" and the arguments of torch's constructor
    context: Callable[[], AbstractContextManager] = nullcontext  # around every call
    package: str = ""  # if it may be absent
    devices: tuple[str, ...] = ("cpu", "cuda")
    layout: str = ""  # "padded" or "lengths", if it is not given packed sequences
    step: bool = False  # runs single steps forward only, by module.stream()


def _of(namespace: Any, **fixed: Any) -> Callable:
    return lambda cell, *sizes, **options: getattr(namespace, cell)(*sizes, **options, **fixed)


def _by(context: Callable, name: str, *devices: str, **fixed: Any) -> Provider:
    return Provider(_of(fusedrnn, **fixed), partial(context, name), devices=devices or ("cuda",))


PROVIDERS = {
    TORCH: Provider(_of(nn)),
    "fusedrnn": Provider(_of(fusedrnn)),
    "torch.nn padded": Provider(_of(nn), layout="padded"),
    "fusedrnn lengths": Provider(_of(fusedrnn), layout="lengths"),
    "fusedrnn stream": Provider(_of(fusedrnn), step=True),
    "fusedrnn torch": _by(use_backend, "torch", "cpu", "cuda"),
    "fusedrnn recompute": _by(use_backend, "torch", "cpu", "cuda", recompute=True),
    "fusedrnn aten": _by(use_backend, "aten", "cpu", "cuda"),
    "fusedrnn triton": _by(use_backend, "triton"),
    **{f"fusedrnn {name}": _by(scheduled, name) for name in plan.SCHEDULES},
    "eager loop": Provider(EagerLoop),
    "compiled loop": Provider(CompiledLoop),
    # FlashRNN's LSTM has tf32 only; Haste's GRU lets cuBLAS round to fp16, which is as coarse.
    "flashrnn": Provider(FlashRNN, package="flashrnn", devices=("cuda",)),
    "haste": Provider(Haste, package="haste_pytorch", devices=("cuda",)),
    "torchrl": Provider(TorchRL, package="torchrl", devices=("cuda",)),
}


def absent(provider: str, device: torch.device) -> str | None:
    """Returns why a provider cannot take part on a device, or None if it can."""
    entry = PROVIDERS[provider]
    if entry.package and find_spec(entry.package) is None:
        return f"not installed: pip install {entry.package}"
    return None if device.type in entry.devices else f"runs on {entry.devices[0]} only"


def build(provider: str, cell: str, workload: Workload, **options: Any) -> Any:
    """Builds a batch-first RNN of the sizes of a workload."""
    sizes = {
        "num_layers": workload.layers, "bidirectional": workload.bidirectional,
        "dropout": workload.dropout, "batch_first": True,
    }  # fmt: skip
    return PROVIDERS[provider].build(cell.upper(), workload.I, workload.H, **sizes | options)
