"""What every other implementation stands behind: the call signature of torch.nn's.

An adapter is an ``nn.RNNBase``: it has torch.nn's Parameters, so one ``state_dict`` fills all. What
is the peer's own is how it lays them out (``convert``) and one layer in one direction (``layer``,
of padded sequences ``masked``); layers, directions, dropout between layers and padding are composed
here, by the same few operators for all.

For the gate the conversion is part of the graph, and every gradient arrives in torch's layout. For
timing it is done once, by ``fix``: a peer's training would hold its own layout. Whatever a user of
the peer would build once (a module, a session, a compiled function) is built in the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

#: One layer's weights, and its states h (and c), in whatever layout the peer has.
Weights = tuple[Tensor, ...]
States = tuple[Tensor, ...]


class Held(tuple[Tensor, ...]):
    """Weights that stand in a module of the peer's own, whose parameters they are."""

    module: Any

    @classmethod
    def by(cls, module: Any, parameters: Any) -> Held:
        held = cls(parameters)
        held.module = module
        return held


class Padded(NamedTuple):
    """A packed sequence as most libraries take it, in its own order: the longest come first.

    As in torch.nn, states are put into that order and back, and no length is fetched from a GPU.
    """

    packed: PackedSequence
    x: Tensor  # [B, T, I]
    lengths: Tensor  # [B], on the CPU
    mask: Tensor  # [B, T], True where there is a step

    @classmethod
    def of(cls, packed: PackedSequence) -> Padded:
        ordered = packed._replace(sorted_indices=None, unsorted_indices=None)
        x, lengths = pad_packed_sequence(ordered, batch_first=True)
        steps = torch.arange(x.shape[1], device=x.device)
        return cls(packed, x, lengths, steps < lengths.to(x.device).unsqueeze(1))

    def states_in(self, states: States) -> States:
        """Of the caller's order ``[layers * directions, B, H]``, in the order of ``x``."""
        order = self.packed.sorted_indices
        return states if order is None else tuple(s.index_select(1, order) for s in states)

    def states_out(self, states: States) -> States:
        order = self.packed.unsorted_indices
        return states if order is None else tuple(s.index_select(1, order) for s in states)

    def pack(self, output: Tensor) -> PackedSequence:
        """``[B, T, H]`` without its padding."""
        data = pack_padded_sequence(output, self.lengths, batch_first=True).data
        return self.packed._replace(data=data)


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

    def masked(
        self, weights: Weights, x: Tensor, states: States, mask: Tensor
    ) -> tuple[Tensor, States]:
        """The same, but where ``mask`` ``[B, T]`` is False a step leaves the states as they are.

        What it puts out there does not matter, as long as it is finite.
        """
        raise NotImplementedError("takes no packed sequences")

    def hold(self, weights: Weights) -> Weights:
        """Puts converted weights where the peer's user has them; returns what stands there."""
        return weights

    def timed(self, mode: str, input: Any, input_grad: bool) -> Callable[[], object] | None:
        """What is timed if it is not ``forward``: a call of its own, or None.

        Args:
            mode: ``"fw"``, or ``"fwbw"`` with the gradients of all weights.
            input: what ``forward`` takes.
            input_grad: whether the gradient of the input is wanted too.
        """
        return None

    def fix(self) -> list[Tensor]:
        """Converts once and for all; returns what is differentiated from here on."""
        self.fixed = [
            self.hold(tuple(t.detach().clone().requires_grad_() for t in weights))
            for weights in self._native()
        ]
        return [tensor for weights in self.fixed for tensor in weights]

    def _native(self) -> list[Weights]:
        return [self.convert(*(getattr(self, n) for n in names)) for names in self._all_weights]

    def check(self, input: Any) -> None:
        if input.data.dtype not in self.dtypes:
            raise NotImplementedError(f"does not compute in {input.data.dtype}")

    def initial(self, input: Any, hx: Any) -> States:
        """The states of all layers and directions, ``[layers * directions, B, H]`` each."""
        if hx is not None:
            return hx if isinstance(hx, tuple) else (hx,)
        batch = input.batch_sizes[0] if isinstance(input, PackedSequence) else len(input)
        rows = (self.num_layers * (1 + self.bidirectional), int(batch), self.hidden_size)
        return tuple(input.data.new_zeros(rows) for _ in range(1 + (self.mode == "LSTM")))

    def forward(self, input: Any, hx: Any = None) -> Any:
        self.check(input)
        given = self.initial(input, hx)
        if isinstance(input, PackedSequence):
            padded = Padded.of(input)
            output, finals = self._stack(padded.x, padded.states_in(given), padded.mask)
            result: Any = padded.pack(output)
            finals = padded.states_out(finals)
        else:
            result, finals = self._stack(input, given, None)
        return result, finals if self.mode == "LSTM" else finals[0]

    def _stack(self, x: Tensor, given: States, mask: Tensor | None) -> tuple[Tensor, States]:
        """Layers and directions; the reverse one walks into a sequence from its padding."""
        weights = self.fixed if self.fixed is not None else self._native()
        masks = None if mask is None else (mask, mask.flip(1))
        finals: list[States] = []
        for depth in range(self.num_layers):
            if depth and self.training and self.dropout:
                x = F.dropout(x, self.dropout)
            outputs = []
            for direction in range(1 + self.bidirectional):
                n = depth * (1 + self.bidirectional) + direction
                walked = x.flip(1) if direction else x
                states = tuple(s[n] for s in given)
                if masks is None:
                    output, final = self.layer(weights[n], walked, states)
                else:
                    output, final = self.masked(weights[n], walked, states, masks[direction])
                outputs.append(output.flip(1) if direction else output)
                finals.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def reordered(tensor: Tensor, gates: int, order: tuple[int, ...]) -> Tensor:
    """The gates along the first axis, in another order."""
    parts = tensor.chunk(gates)
    return torch.cat([parts[n] for n in order])
