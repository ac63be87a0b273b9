"""Other implementations with CUDA or Triton kernels of their own; not run on a GPU yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedrnn.dispatch import precision

from .peer import Held, Peer, States, Weights, reordered


class Haste(Peer):
    """haste_pytorch 0.5: gates i, g, f, o and z, r, n; weights are transposed."""

    names = ("kernel", "recurrent_kernel", "bias", "recurrent_bias")

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._by_width: dict[int, Any] = {}

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Weights:
        if self.mode == "LSTM":
            order = (4, (0, 2, 1, 3))
            w_ih, w_hh, bias = (reordered(t, *order) for t in (w_ih, w_hh, b_ih + b_hh))
            return w_ih.T.contiguous(), w_hh.T.contiguous(), bias
        w_ih, w_hh, b_ih, b_hh = (reordered(t, 3, (1, 0, 2)) for t in (w_ih, w_hh, b_ih, b_hh))
        return w_ih.T.contiguous(), w_hh.T.contiguous(), b_ih, b_hh

    def _built(self, width: int, device: torch.device) -> Any:
        import haste_pytorch

        rnn = getattr(haste_pytorch, self.mode)(width, self.hidden_size, batch_first=True)
        return rnn.to(device)

    def hold(self, weights: Weights) -> Weights:
        rnn = self._built(len(weights[0]), weights[0].device)
        held = Held.by(rnn, map(torch.nn.Parameter, weights))
        for name, weight in zip(self.names, held, strict=False):
            setattr(rnn, name, weight)
        return held

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        given = tuple(state.unsqueeze(0) for state in states)
        arguments = x, given if self.mode == "LSTM" else given[0]
        if isinstance(weights, Held):
            output, final = weights.module.train(self.training)(*arguments)
        else:
            if x.shape[2] not in self._by_width:
                self._by_width[x.shape[2]] = self._built(x.shape[2], x.device)
            rnn = self._by_width[x.shape[2]].train(self.training)
            parameters = dict(zip(self.names, weights, strict=False))
            output, final = torch.func.functional_call(rnn, parameters, arguments)
        final = final if self.mode == "LSTM" else (final,)
        return output, tuple(state[0] for state in final)


class FlashRNN(Peer):
    """flashrnn 1.0.8: no projection of its own; gates i, f, z, o, in the GRU g | r, z | n.

    It runs GRUs by its backend ``cuda``, whatever is asked for.
    """

    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    backend = "cuda_fused"

    def convert(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Weights:
        H = self.hidden_size
        gates = 4 if self.mode == "LSTM" else 3
        if self.mode == "GRU":  # g is what r multiplies: n's recurrent half, with its own bias
            w_hh = reordered(w_hh, 3, (2, 0, 1))
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

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._begins: dict[tuple, Tensor] = {}

    def layer(self, weights: Weights, x: Tensor, states: States) -> tuple[Tensor, States]:
        from torchrl.modules.tensordict_module import _rnn_triton

        B, T, _ = x.shape
        if (B, T) not in self._begins:
            self._begins[B, T] = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        # States are given for every step, of which only those at a reset and the first are read.
        given = [F.pad(state.unsqueeze(1), (0, 0, 0, T - 1)) for state in states]
        run = getattr(_rnn_triton, f"{self.mode.lower()}_triton")
        begins = self._begins[B, T]
        result = run(x, *given, *weights, begins, input_precision=precision())
        return result[0], tuple(result[-len(states) :])
