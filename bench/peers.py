"""Other implementations of LSTM and GRU, each behind the call signature of torch.nn's.

An adapter is an ``nn.RNNBase``: it has torch.nn's Parameters, so one ``state_dict`` fills all. What
is the peer's own is how it lays them out (``convert``) and one layer in one direction (``layer``);
layers, directions and dropout between layers are composed here, by the same few operators for all.

For the gate the conversion is part of the graph, and every gradient arrives in torch's layout. For
timing it is done once, by ``fix``: a peer's training would hold its own layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.dispatch import precision

#: One layer's weights, and its states h (and c), in whatever layout the peer has.
Weights = tuple[Tensor, ...]
States = tuple[Tensor, ...]


def both(peer: type[Peer]) -> SimpleNamespace:
    """What ``Provider.classes`` wants: constructors of torch.nn's names."""

    def constructor(mode: str) -> Callable[..., Peer]:
        return lambda *sizes, **options: peer(mode, *sizes, **options)

    names = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN_TANH"}
    return SimpleNamespace(**{name: constructor(mode) for name, mode in names.items()})


class Peer(nn.RNNBase):
    """``[B, T, I]`` and states ``[layers * directions, B, H]`` in, the same as torch.nn out.

    Raises:
        NotImplementedError: the peer does not take the cell, sequences, dtype or sizes.
    """

    #: LSTM and GRU, unless a peer says more.
    modes: tuple[str, ...] = ("LSTM", "GRU")
    #: In fp32 alone, unless a peer says more.
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def __init__(self, mode: str, *sizes: Any, **options: Any):
        if mode not in self.modes:
            raise NotImplementedError(f"has {' and '.join(self.modes)} only")
        super().__init__(mode, *sizes, **options)
        self.fixed: list[Weights] | None = None

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Weights:
        """The peer's layout of one layer's weights, by differentiable operations."""
        return w_ih, w_hh, b_ih, b_hh

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        """Output ``[B, T, H]`` and final states ``[B, H]`` of an input ``[B, T, I]``."""
        raise NotImplementedError

    def fix(self) -> list[Tensor]:
        """Converts once and for all; returns what is differentiated from here on."""
        self.fixed = [
            tuple(t.detach().clone().requires_grad_() for t in weights)
            for weights in self._native()
        ]
        return [tensor for weights in self.fixed for tensor in weights]

    def _native(self) -> list[Weights]:
        return [self.convert(*(getattr(self, n) for n in names)) for names in self._all_weights]

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            raise NotImplementedError("takes no packed sequences")
        if input.dtype not in self.dtypes:
            raise NotImplementedError(f"does not compute in {input.dtype}")
        rows = (self.num_layers * (1 + self.bidirectional), len(input), self.hidden_size)
        if hx is None:
            hx = tuple(input.new_zeros(rows) for _ in range(1 + (self.mode == "LSTM")))
        given = hx if isinstance(hx, tuple) else (hx,)
        weights = self.fixed if self.fixed is not None else self._native()
        finals: list[States] = []
        x = input
        for depth in range(self.num_layers):
            if depth and self.training and self.dropout:
                x = F.dropout(x, self.dropout)
            outputs = []
            for direction in range(1 + self.bidirectional):
                n = depth * (1 + self.bidirectional) + direction
                walked = x.flip(1) if direction else x
                output, final = self.layer(weights[n], walked, tuple(s[n] for s in given))
                outputs.append(output.flip(1) if direction else output)
                finals.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        stacked = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return x, stacked if self.mode == "LSTM" else stacked[0]


def loop(mode: str, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
    """The loop of a tutorial: what nn.LSTMCell, nn.GRUCell and nn.RNNCell call, once a step."""
    outputs = []
    for x_t in x.unbind(1):
        if mode == "LSTM":
            states = torch.lstm_cell(x_t, states, *weights)
        elif mode == "GRU":
            states = (torch.gru_cell(x_t, states[0], *weights),)
        else:
            states = (torch.rnn_tanh_cell(x_t, states[0], *weights),)
        outputs.append(states[0])
    return torch.stack(outputs, 1), states


class EagerLoop(Peer):
    modes = ("LSTM", "GRU", "RNN_TANH")
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        return loop(self.mode, weights, x, states)


class CompiledLoop(EagerLoop):
    """Dynamo unrolls the loop: T = 9 took a minute to compile on a CPU core, both ways."""

    longest = 4

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Dynamo counts compilations by code object: each module has one of its own.
        own = FunctionType(loop.__code__.replace(), loop.__globals__)
        self._compiled = torch.compile(own, fullgraph=True, dynamic=False)

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        if x.shape[1] > self.longest:
            raise NotImplementedError(
                f"unrolls all steps when it compiles: not tried beyond T = {self.longest}"
            )
        return self._compiled(self.mode, weights, x, states)


class Keras(Peer):
    """Keras on torch; reset_after=True, its default, is torch's GRU."""

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Weights:
        if self.mode == "LSTM":  # i, f, c, o: torch's order, and one bias
            return w_ih.T, w_hh.T, b_ih + b_hh
        # z, r, h; the biases stay two
        w_ih, w_hh, b_ih, b_hh = (_swapped(t, 3, (1, 0, 2)) for t in (w_ih, w_hh, b_ih, b_hh))
        return w_ih.T, w_hh.T, torch.stack((b_ih, b_hh))

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        rnn = self.__dict__.setdefault("_keras", {}).get(x.shape[2:])
        if rnn is None:
            os.environ.setdefault("KERAS_BACKEND", "torch")
            import keras

            rnn_class = getattr(keras.layers, self.mode)
            rnn = rnn_class(self.hidden_size, return_sequences=True, return_state=True)
            rnn.build(tuple(x.shape))
            self.__dict__["_keras"][x.shape[2:]] = rnn
        others = [variable.value for variable in rnn.non_trainable_variables]
        (output, *final), _ = rnn.stateless_call(
            list(weights), others, x, initial_state=list(states), training=self.training
        )
        return output, tuple(final)


class Haste(Peer):
    """haste_pytorch 0.5: gates i, g, f, o and z, r, n; weights are transposed."""

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Weights:
        if self.mode == "LSTM":
            order = (4, (0, 2, 1, 3))
            w_ih, w_hh, bias = (_swapped(t, *order) for t in (w_ih, w_hh, b_ih + b_hh))
            return w_ih.T.contiguous(), w_hh.T.contiguous(), bias
        w_ih, w_hh, b_ih, b_hh = (_swapped(t, 3, (1, 0, 2)) for t in (w_ih, w_hh, b_ih, b_hh))
        return w_ih.T.contiguous(), w_hh.T.contiguous(), b_ih, b_hh

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        import haste_pytorch

        rnn = getattr(haste_pytorch, self.mode)(x.shape[2], self.hidden_size, batch_first=True)
        names = ("kernel", "recurrent_kernel", "bias", "recurrent_bias")
        given = tuple(state.unsqueeze(0) for state in states)
        output, final = torch.func.functional_call(
            rnn.to(x.device),
            dict(zip(names, weights, strict=False)),
            (x, given if self.mode == "LSTM" else given[0]),
        )
        final = final if self.mode == "LSTM" else (final,)
        return output, tuple(state[0] for state in final)


class FlashRNN(Peer):
    """flashrnn 1.0.8: no projection of its own; gates i, f, z, o, in the GRU g | r, z | n."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    backend = "cuda_fused"

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Weights:
        H = self.hidden_size
        gates = 4 if self.mode == "LSTM" else 3
        if self.mode == "GRU":  # g is what r multiplies: n's recurrent half, with its own bias
            w_hh = _swapped(w_hh, 3, (2, 0, 1))
            r, z, n = b_ih.chunk(3)
            r_h, z_h, n_h = b_hh.chunk(3)
            bias = torch.stack((n_h, r + r_h, z + z_h, n))
        else:
            bias = (b_ih + b_hh).view(4, H)
        return w_ih, w_hh.reshape(gates, 1, H, H), bias.unsqueeze(1)

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        from flashrnn import flashrnn

        w_ih, recurrent, bias = weights
        projected = F.linear(x, w_ih).unflatten(2, (-1, 1, self.hidden_size))
        given = torch.stack(states)[:, :, None, None]
        kinds = {
            "function": self.mode.lower(),
            "backend": self.backend,
            "dtype": str(x.dtype).removeprefix("torch."),
        }
        hidden, final = flashrnn(projected, recurrent, bias, states=given, **kinds)
        return hidden[0, :, :, 0], tuple(final[:, :, -1, 0])


class TorchRL(Peer):
    """The Triton kernels behind ``LSTMModule(recurrent_backend="triton")``: torch's layout."""

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        from torchrl.modules.tensordict_module import _rnn_triton

        B, T, _ = x.shape
        begins = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        # States are given for every step, of which only those at a reset and the first are read.
        given = [F.pad(state.unsqueeze(1), (0, 0, 0, T - 1)) for state in states]
        run = getattr(_rnn_triton, f"{self.mode.lower()}_triton")
        result = run(x, *given, *weights, begins, input_precision=precision())
        return result[0], tuple(result[-len(states) :])


class OnnxRuntime(Peer):
    """ONNX Runtime on the CPU, from ``fusedrnn.to_torch``; it has no backward."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._run: Callable[[list[Tensor]], list[Tensor]] | None = None

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            raise NotImplementedError("takes no packed sequences")
        if input.dtype != torch.float32:
            raise NotImplementedError(f"does not compute in {input.dtype}")
        if hx is None:
            rows = self.num_layers * (1 + self.bidirectional)
            hx = input.new_zeros(rows, len(input), self.hidden_size)
            hx = (hx, hx) if self.mode == "LSTM" else hx
        given = [input, *(hx if isinstance(hx, tuple) else (hx,))]
        if self._run is None:
            self._run = onnx_session(self, given)
        output, *final = self._run(given)
        return output, tuple(final) if self.mode == "LSTM" else final[0]


def onnx_session(rnn: nn.RNNBase, given: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Exports an RNN for one shape and opens it in ONNX Runtime, with torch's count of threads."""
    import tempfile
    import warnings

    import onnxruntime

    import fusedrnn

    sizes = (rnn.input_size, rnn.hidden_size, rnn.num_layers)
    options = {"batch_first": True, "bidirectional": rnn.bidirectional}
    model = getattr(fusedrnn, rnn.mode)(*sizes, **options)
    model.load_state_dict(rnn.state_dict())
    names = ["input", "h_0", "c_0"][: len(given)]
    arguments = (given[0], given[1] if len(given) == 2 else tuple(given[1:]))
    with (
        tempfile.NamedTemporaryFile(suffix=".onnx") as file,
        warnings.catch_warnings(),  # of torch about its own exporter, and about a fixed batch
    ):
        warnings.simplefilter("ignore")
        theirs = fusedrnn.to_torch(model).eval()
        torch.onnx.export(theirs, arguments, file.name, dynamo=False, input_names=names)
        program = file.read()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program, settings, providers=["CPUExecutionProvider"])

    def run(tensors: list[Tensor]) -> list[Tensor]:
        arrays = [tensor.detach().numpy() for tensor in tensors]
        return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, arrays)))]  # noqa: B905

    return run


class Jax(Peer):
    """``jax.lax.scan`` over the equations of torch's cells, by ``jax.jit``."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.num_layers > 1 or self.bidirectional:
            raise NotImplementedError("one layer in one direction only")

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        """For the gate: through numpy, with the gradient by ``jax.vjp``."""
        output, *final = cast(tuple[Tensor, ...], JaxCall.apply(self.mode, x, *states, *weights))
        return output, tuple(final)

    def timed(self, mode: str, x: Tensor, cotangents: list[Tensor]) -> Callable[[], object]:
        """What is timed has no torch in it; each call waits for its results."""
        import jax

        scan = jax_scan(self.mode)
        weights, input = _to_jax([*self.parameters()]), _to_jax([x])[0]
        state = [jax.numpy.zeros((len(x), self.hidden_size))] * (1 + (self.mode == "LSTM"))
        given = _to_jax(cotangents)
        given = [given[0], *(t[0] for t in given[1:])]

        @jax.jit
        def forward(weights: Any, input: Any, state: Any) -> Any:
            return scan(input, state, weights)

        @jax.jit
        def both_ways(weights: Any, input: Any, state: Any) -> Any:
            results, back = jax.vjp(lambda w, i: scan(i, state, w), weights, input)
            return results, back(tuple(given))

        def call() -> object:
            nonlocal state
            if mode == "fw":
                results = gradients = forward(weights, input, state)
            else:
                results, gradients = both_ways(weights, input, state)
            jax.block_until_ready(gradients)
            state = list(results[1:])
            return gradients

        return call


class JaxCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        import jax

        states = 1 + (mode == "LSTM")
        arrays = _to_jax([x, *tensors])
        scan = jax_scan(mode)
        results, ctx.back = jax.vjp(
            lambda a: scan(a[0], a[1 : 1 + states], a[1 + states :]), arrays
        )
        return tuple(_from_jax(results))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, *_from_jax(ctx.back(tuple(_to_jax(list(grads))))[0]))


def jax_scan(mode: str) -> Callable[[Any, Any, Any], Any]:
    """Output ``[B, T, H]`` and final states of input, states and torch's four weights."""
    import jax
    from jax import numpy as jnp

    def step(weights: Any, states: Any, projected: Any) -> Any:
        _, w_hh, _, b_hh = weights
        recurrent = states[0] @ w_hh.T + b_hh
        if mode == "LSTM":
            i, f, g, o = jnp.split(projected + recurrent, 4, -1)
            c = jax.nn.sigmoid(f) * states[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return [h, c], h
        r, z, n = jnp.split(projected, 3, -1)
        r_h, z_h, n_h = jnp.split(recurrent, 3, -1)
        n = jnp.tanh(n + jax.nn.sigmoid(r + r_h) * n_h)
        h = n + jax.nn.sigmoid(z + z_h) * (states[0] - n)
        return [h], h

    def scan(input: Any, states: Any, weights: Any) -> Any:
        projected = jnp.swapaxes(input @ weights[0].T + weights[2], 0, 1)
        final, output = jax.lax.scan(lambda s, p: step(weights, s, p), list(states), projected)
        return jnp.swapaxes(output, 0, 1), *final

    return scan


def _to_jax(tensors: list[Tensor]) -> list[Any]:
    from jax import numpy as jnp

    return [jnp.asarray(tensor.detach().cpu().numpy()) for tensor in tensors]


def _from_jax(arrays: Any) -> list[Tensor]:
    import numpy as np

    return [torch.from_numpy(np.array(array)) for array in arrays]


def _swapped(tensor: Tensor, gates: int, order: tuple[int, ...]) -> Tensor:
    """The gates along the first axis, in another order."""
    parts = tensor.chunk(gates)
    return torch.cat([parts[n] for n in order])
