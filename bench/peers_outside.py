"""Other implementations outside torch: JAX, and ONNX Runtime. What is timed has no torch in it.

Both take layers, directions and padding as a whole, so nothing is composed in torch here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .peer import Padded, Peer


class OnnxRuntime(Peer):
    """ONNX Runtime on the CPU, from ``fusedrnn.to_torch``; it has no backward."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._sessions: dict[tuple, Callable[[list[Tensor]], list[Tensor]]] = {}

    def forward(self, input: Any, hx: Any = None) -> Any:
        self.check(input)
        padded = Padded.of(input) if isinstance(input, PackedSequence) else None
        states = self.initial(input, hx)
        if padded is None:
            given = [input, *states]
        else:
            given = [padded.x, padded.lengths, *padded.states_in(states)]
        key = (padded is None, *given[0].shape)
        if key not in self._sessions:
            self._sessions[key] = onnx_session(self, given, packed=padded is not None)
        output, *rest = self._sessions[key](given)
        finals = tuple(rest)
        result: Any = output
        if padded is not None:
            result, finals = padded.pack(output), padded.states_out(finals)
        return result, finals if self.mode == "LSTM" else finals[0]


class Unpadded(nn.Module):
    """Padded sequences and their lengths in, padded ones out: ONNX's operators take lengths."""

    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        hx: Any = states if len(states) == 2 else states[0]
        output, final = self.rnn(pack_padded_sequence(x, lengths, batch_first=True), hx)
        output, _ = pad_packed_sequence(output, batch_first=True)
        return output, *(final if isinstance(final, tuple) else (final,))


def onnx_session(
    rnn: nn.RNNBase, given: list[Tensor], packed: bool = False
) -> Callable[[list[Tensor]], list[Tensor]]:
    """Exports an RNN for one shape and opens it in ONNX Runtime, with torch's count of threads.

    Args:
        rnn: the weights.
        given: input, lengths if ``packed``, h_0 and of an LSTM c_0.
        packed: whether sequences are of unequal length.
    """
    import tempfile
    import warnings

    import onnxruntime

    import fusedrnn

    sizes = (rnn.input_size, rnn.hidden_size, rnn.num_layers)
    options = {"batch_first": True, "bidirectional": rnn.bidirectional}
    model = getattr(fusedrnn, rnn.mode)(*sizes, **options)
    model.load_state_dict(rnn.state_dict())
    theirs = fusedrnn.to_torch(model).eval()
    names = ["input", *(["lengths"] if packed else []), "h_0", "c_0"][: len(given)]
    if packed:
        theirs = Unpadded(theirs).eval()
        arguments: tuple = tuple(given)
    else:
        arguments = (given[0], given[1] if len(given) == 2 else tuple(given[1:]))
    with (
        tempfile.NamedTemporaryFile(suffix=".onnx") as file,
        warnings.catch_warnings(),  # of torch about its own exporter, and about a fixed batch
        _quiet_stderr(),  # where its C++ says the same of packed sequences, a line an operator
    ):
        warnings.simplefilter("ignore")
        torch.onnx.export(theirs, arguments, file.name, dynamo=False, input_names=names)
        program = file.read()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    # Else its idle threads spin beside whoever is timed next: torch.nn took 4 times as long.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(program, settings, providers=["CPUExecutionProvider"])

    def run(tensors: list[Tensor]) -> list[Tensor]:
        arrays = [tensor.detach().numpy() for tensor in tensors]
        return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, arrays)))]  # noqa: B905

    return run


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Layout(NamedTuple):
    """Where the data of a packed sequence stand in ``[B, T]``; arrays of JAX."""

    rows: Any  # [N]
    steps: Any  # [N]
    mask: Any  # [B, T], True where there is a step

    @classmethod
    def of(cls, packed: PackedSequence) -> Layout:
        sizes, order = packed.batch_sizes, packed.sorted_indices
        places = torch.cat([torch.arange(int(size)) for size in sizes])
        rows = places if order is None else order.cpu()[places]
        steps = torch.arange(len(sizes)).repeat_interleave(sizes)
        mask = torch.zeros(int(sizes[0]), len(sizes), dtype=torch.bool)
        mask[rows, steps] = True
        return cls(*to_jax([rows, steps, mask]))


class Jax(Peer):
    """``jax.lax.scan`` over the equations of torch's cells, by ``jax.jit``; on the CPU."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """For the gate: what is timed, through numpy, with the gradient by ``jax.vjp``."""
        self.check(input)
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input  # a Tensor's would be detached
        layout = Layout.of(input) if packed else None
        network = jax_network(self)
        states = self.initial(input, hx)

        def run(arrays: Any) -> Any:
            x, given, weights = arrays[0], arrays[1 : 1 + len(states)], arrays[1 + len(states) :]
            return network(weights, x, given, layout, None)

        output, *finals = JaxCall.apply(run, data, *states, *self._flat_weights)
        result = input._replace(data=output) if packed else output
        return result, tuple(finals) if self.mode == "LSTM" else finals[0]

    def timed(self, mode: str, input: Any, input_grad: bool) -> Callable[[], object]:
        """Each call waits for all its results, and the next starts from its final states."""
        import jax

        dropped = bool(self.dropout and self.num_layers > 1 and mode == "fwbw")
        network = jax_network(self)
        layout = Layout.of(input) if isinstance(input, PackedSequence) else None
        weights, x = to_jax(self._flat_weights), to_jax([input.data])[0]
        state = to_jax(self.initial(input, None))
        key = jax.random.key(0) if dropped else None

        @jax.jit
        def forward(weights: Any, x: Any, state: Any, layout: Any, key: Any) -> Any:
            return network(weights, x, state, layout, key)

        shapes = jax.eval_shape(forward, weights, x, state, layout, key)
        cotangents = tuple(to_jax([torch.randn(s.shape) for s in shapes]))

        @jax.jit
        def both_ways(
            weights: Any, x: Any, state: Any, layout: Any, key: Any, cotangents: Any
        ) -> Any:
            def differentiated(weights: Any, x: Any) -> Any:
                return network(weights, x, state, layout, key)

            if input_grad:
                results, back = jax.vjp(differentiated, weights, x)
            else:
                results, back = jax.vjp(lambda w: differentiated(w, x), weights)
            return results, back(cotangents)

        def call() -> object:
            nonlocal state, key
            if dropped:
                key, own = jax.random.split(key)
            else:
                own = None
            if mode == "fw":
                results = gradients = forward(weights, x, state, layout, own)
            else:
                results, gradients = both_ways(weights, x, state, layout, own, cotangents)
            jax.block_until_ready((results, gradients))
            state = list(results[1:])
            return gradients

        return call


class JaxCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Any], Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        import jax

        results, ctx.back = jax.vjp(run, to_jax(tensors))
        return tuple(_from_jax(results))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, *_from_jax(ctx.back(tuple(to_jax(grads)))[0]))


def jax_network(rnn: nn.RNNBase) -> Callable[..., Any]:
    """Output and final states of torch's flat weights, input, states, layout and key.

    The input is ``[B, T, I]``, or packed data with their ``Layout``: they are padded, and the
    output is packed again. Of the key come the zeros of dropout between layers; None is without.
    """
    import jax
    from jax import numpy as jnp

    directions = 1 + rnn.bidirectional
    share = rnn.dropout

    def network(weights: Any, x: Any, states: Any, layout: Layout | None, key: Any) -> Any:
        mask = None
        if layout is not None:
            mask = layout.mask
            x = jnp.zeros((*mask.shape, x.shape[-1])).at[layout.rows, layout.steps].set(x)
        finals = []
        for depth in range(rnn.num_layers):
            if depth and key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, depth), 1 - share, x.shape)
                x = jnp.where(kept, x / (1 - share), 0.0)
            outputs = []
            for direction in range(directions):
                n = depth * directions + direction
                own = weights[4 * n : 4 * n + 4]
                start = [state[n] for state in states]
                final, output = jax_layer(rnn.mode, own, x, start, mask, reverse=bool(direction))
                outputs.append(output)
                finals.append(final)
            x = jnp.concatenate(outputs, -1)
        if layout is not None:
            x = x[layout.rows, layout.steps]
        return x, *(jnp.stack(parts) for parts in zip(*finals, strict=True))

    return network


def jax_layer(mode: str, weights: Any, x: Any, states: Any, mask: Any, reverse: bool) -> Any:
    """Final states and output ``[B, T, H]`` of torch's four weights in one direction."""
    import jax
    from jax import numpy as jnp

    w_ih, w_hh, b_ih, b_hh = weights

    def step(states: Any, projected: Any) -> Any:
        recurrent = states[0] @ w_hh.T + b_hh
        if mode == "LSTM":
            i, f, g, o = jnp.split(projected + recurrent, 4, -1)
            c = jax.nn.sigmoid(f) * states[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            return [jax.nn.sigmoid(o) * jnp.tanh(c), c]
        r, z, n = jnp.split(projected, 3, -1)
        r_h, z_h, n_h = jnp.split(recurrent, 3, -1)
        n = jnp.tanh(n + jax.nn.sigmoid(r + r_h) * n_h)
        return [n + jax.nn.sigmoid(z + z_h) * (states[0] - n)]

    def walk(states: Any, given: Any) -> Any:
        projected, here = given
        new = step(states, projected)
        if here is not None:  # a sequence that has ended keeps its states
            new = [jnp.where(here, a, b) for a, b in zip(new, states, strict=True)]
        return new, new[0]

    projected = jnp.swapaxes(x @ w_ih.T + b_ih, 0, 1)
    here = None if mask is None else mask.T[..., None]
    final, output = jax.lax.scan(walk, list(states), (projected, here), reverse=reverse)
    return final, jnp.swapaxes(output, 0, 1)


def to_jax(tensors: Any) -> list[Any]:
    """On JAX's CPU, whatever else it has found."""
    import jax

    cpu = jax.devices("cpu")[0]
    return [jax.device_put(tensor.detach().cpu().numpy(), cpu) for tensor in tensors]


def _from_jax(arrays: Any) -> list[Tensor]:
    import numpy as np

    return [torch.from_numpy(np.array(array)) for array in arrays]
