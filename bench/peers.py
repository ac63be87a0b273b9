"""Other implementations on torch's tensors that run anywhere: three loops, and Keras."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .peer import Held, Peer, States, Weights, reordered


def step(mode: str, weights: Weights, x_t: Tensor, states: States) -> States:
    """What nn.LSTMCell, nn.GRUCell and nn.RNNCell call."""
    if mode == "LSTM":
        return torch.lstm_cell(x_t, states, *weights)
    if mode == "GRU":
        return (torch.gru_cell(x_t, states[0], *weights),)
    return (torch.rnn_tanh_cell(x_t, states[0], *weights),)


def masked_step(mode: str, weights: Weights, x_t: Tensor, states: States, mask_t: Tensor) -> States:
    """A sequence that has ended keeps its states."""
    new = step(mode, weights, x_t, states)
    return tuple(torch.where(mask_t, n, old) for n, old in zip(new, states, strict=True))


def loop(
    mode: str,
    weights: Weights,
    x: Tensor,
    states: States,
    mask: Tensor | None,
    one: Callable[..., States] = step,
    one_masked: Callable[..., States] = masked_step,
) -> tuple[Tensor, States]:
    """The loop of a tutorial: a call a step."""
    outputs = []
    if mask is None:
        for x_t in x.unbind(1):
            states = one(mode, weights, x_t, states)
            outputs.append(states[0])
    else:
        for x_t, mask_t in zip(x.unbind(1), mask.unsqueeze(2).unbind(1), strict=True):
            states = one_masked(mode, weights, x_t, states, mask_t)
            outputs.append(states[0])
    return torch.stack(outputs, 1), states


class EagerLoop(Peer):
    modes = ("LSTM", "GRU", "RNN_TANH")
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    def run(
        self, weights: Weights, x: Tensor, states: States, mask: Tensor | None
    ) -> tuple[Tensor, States]:
        return loop(self.mode, weights, x, states, mask)

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        return self.run(weights, x, states, None)

    def masked(
        self, weights: Weights, x: Tensor, states: States, mask: Tensor
    ) -> tuple[Tensor, States]:
        return self.run(weights, x, states, mask)


class Compiled(EagerLoop):
    """Holds what torch.compile made, for each input size and mode.

    Dynamo counts compilations by code object: each function here has one of its own.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._made: dict[tuple, Callable] = {}

    def compiled(self, function: Any, width: int) -> Callable:
        key = function, width, self.training
        if key not in self._made:
            own = FunctionType(
                function.__code__.replace(), function.__globals__, None, function.__defaults__
            )
            self._made[key] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._made[key]


class CompiledStep(Compiled):
    """torch.compile of one step, looped over: for any T, with a call of it a step."""

    def run(
        self, weights: Weights, x: Tensor, states: States, mask: Tensor | None
    ) -> tuple[Tensor, States]:
        one, one_masked = (self.compiled(f, x.shape[2]) for f in (step, masked_step))
        return loop(self.mode, weights, x, states, mask, one, one_masked)


class CompiledLoop(Compiled):
    """torch.compile of the loop, which Dynamo unrolls: one call for all T, compiled for minutes."""

    longest = 30

    def run(
        self, weights: Weights, x: Tensor, states: States, mask: Tensor | None
    ) -> tuple[Tensor, States]:
        if x.shape[1] > self.longest:
            raise NotImplementedError(
                f"unrolls all steps when it compiles: not tried beyond T = {self.longest}"
            )
        return self.compiled(loop, x.shape[2])(self.mode, weights, x, states, mask)


class Keras(Peer):
    """Keras on torch; reset_after=True, its default, is torch's GRU."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._by_width: dict[int, Any] = {}

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Weights:
        if self.mode == "LSTM":  # i, f, c, o: torch's order, and one bias
            return w_ih.T.contiguous(), w_hh.T.contiguous(), b_ih + b_hh
        # z, r, h; the biases stay two
        w_ih, w_hh, b_ih, b_hh = (reordered(t, 3, (1, 0, 2)) for t in (w_ih, w_hh, b_ih, b_hh))
        return w_ih.T.contiguous(), w_hh.T.contiguous(), torch.stack((b_ih, b_hh))

    def _built(self, width: int) -> Any:
        os.environ.setdefault("KERAS_BACKEND", "torch")
        import keras

        rnn_class = getattr(keras.layers, self.mode)
        rnn = rnn_class(self.hidden_size, return_sequences=True, return_state=True)
        rnn.build((None, None, width))
        return rnn

    def hold(self, weights: Weights) -> Weights:
        rnn = self._built(len(weights[0]))
        for variable, weight in zip(rnn.trainable_variables, weights, strict=True):
            variable.assign(weight)
        return Held.by(rnn, (variable.value for variable in rnn.trainable_variables))

    def _call(self, weights: Weights, x: Tensor, states: States, **mask: Tensor) -> Any:
        options: dict[str, Any] = {"initial_state": list(states), "training": self.training}
        if isinstance(weights, Held):
            output, *final = weights.module(x, **options, **mask)
            return output, tuple(final)
        if x.shape[2] not in self._by_width:
            self._by_width[x.shape[2]] = self._built(x.shape[2])
        rnn = self._by_width[x.shape[2]]
        others = [variable.value for variable in rnn.non_trainable_variables]
        (output, *final), _ = rnn.stateless_call(list(weights), others, x, **options, **mask)
        return output, tuple(final)

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        return self._call(weights, x, states)

    def masked(
        self, weights: Weights, x: Tensor, states: States, mask: Tensor
    ) -> tuple[Tensor, States]:
        return self._call(weights, x, states, mask=mask)
