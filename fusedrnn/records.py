"""The records of a call and of its stack: facts, tensors, sequences and configuration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.spec import SPECS, CellSpec
from .kernels.tensors import Weights


class Layers(NamedTuple):
    """The arrangement of layers, in the words of ``nn.LSTM``'s constructor."""

    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    recompute: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


class Facts(NamedTuple):
    """The facts about a call that the choice of a backend depends on; hashable."""

    cell: str  # a key of SPECS
    device: torch.device
    dtype: torch.dtype  # of the computation: under autocast, autocast's
    steps: int  # T
    batch: int  # B
    input_size: int  # I
    hidden_size: int  # H
    proj_size: int = 0
    layers: Layers = Layers()
    ragged: tuple[str, ...] = ()  # of "packed", "lengths" and "reset"
    needs_grad: bool = False
    autocast: torch.dtype | None = None
    compiled: bool = False  # being traced by torch.compile or torch.export
    transformed: bool = False  # inside vmap, grad, jvp, ... of torch.func
    eager: bool = True  # values can be read: no compiler, transform, mode or subclass
    single_step: bool = False  # a module like nn.LSTMCell
    states: bool = False  # the states of every step are wanted

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of each state."""
        return (self.proj_size or self.hidden_size, self.hidden_size)[: SPECS[self.cell].states]

    @property
    def cast(self) -> torch.dtype | None:
        """The dtype that autocast casts tensors to, or None."""
        return self.dtype if self.autocast else None

    @property
    def drops_out(self) -> bool:
        """True if there is dropout between layers."""
        layers = self.layers
        return layers.training and layers.dropout > 0 and layers.num_layers > 1

    @property
    def recompute(self) -> bool:
        """True if backward computes the gates again; a transform may hide that there is one."""
        has_backward = self.needs_grad or self.transformed
        return self.layers.recompute and has_backward and SPECS[self.cell].saved > 0

    def __str__(self) -> str:
        parts = [
            f"{self.cell}{' cell' if self.single_step else ''} on {self.device}",
            str(self.dtype).removeprefix("torch."),
            f"T={self.steps} B={self.batch} I={self.input_size} H={self.hidden_size}",
            f"layers={self.layers.num_layers}, directions={self.layers.directions}",
        ]
        parts += [f"proj_size={self.proj_size}"] if self.proj_size else []
        parts += [*self.ragged, *(name for name in ("states", "recompute") if getattr(self, name))]
        return ", ".join([*parts, "with gradients" if self.needs_grad else "no gradients"])


class Sequences(NamedTuple):
    """The sequences of a call; each field may be None."""

    lengths: Tensor | None = None  # [B], integers, on any device
    reset: Tensor | None = None  # bool [T, B], with packed rows in their order
    batch_sizes: Tensor | None = None  # int64 [T] on the CPU, as in a PackedSequence
    table: Tensor | None = None  # ``packed_table``, or of others the origins of their rows


class StackInputs(NamedTuple):
    """The tensors that a stack is called with."""

    input: Tensor  # [T, B, I] of any strides, packed [R, I]
    h_0: Tensor  # [L*D, B, H]
    c_0: Tensor | None  # [L*D, B, H], None for a cell without c
    params: Any  # tensors in torch's order; of launches a tuple of each kind of weight
    dropout_masks: Sequence[Tensor]  # empty, or of each layer but the last [T, B, D*H], scaled

    def cast(self, dtype: torch.dtype | None) -> "StackInputs":
        """Returns input, states and weights in a dtype, all alike, as cuDNN casts for autocast."""
        if dtype is None:
            return self
        input, h_0, c_0, params, masks = self
        h_0, c_0 = h_0.to(dtype), None if c_0 is None else c_0.to(dtype)
        return StackInputs(input.to(dtype), h_0, c_0, [p.to(dtype) for p in params], masks)


class StackOutputs(NamedTuple):
    """The results of a stack, and what backward needs beside the inputs; None if it is not kept."""

    output: Tensor  # [T, B, D*H], packed [R, D*H]
    h_n: Tensor  # [L*D, B, H]
    c_n: Tensor | None
    gates: Tensor | None = None  # [L*D, R, S*H]
    cs: Tensor | None = None  # [L*D, R, H], c of every step
    hidden: Tensor | None = None  # [``config.hidden_layers``, R, D*H], before dropout


class StackGrads(NamedTuple):
    """The gradients that reach the results of a stack; None where there are none."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cs: Tensor | None


class StackConfig(NamedTuple):
    """The configuration of a stack: all that is not a tensor."""

    cell: str
    #: "triton" or "torch"; "auto" is triton and, where the kernels fail, the loop "instead".
    backend: str
    has_bias: bool
    num_layers: int
    bidirectional: bool
    precision: str  # of fp32 on triton: "ieee", "tf32" or "tf32x3"
    recompute: bool = False  # backward computes the gates again

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def spec(self) -> CellSpec:
        return SPECS[self.cell]

    @property
    def is_loop(self) -> bool:
        return self.backend in ("torch", "instead")

    @property
    def hidden_layers(self) -> int:
        """The layers whose h is kept beside the output.

        The loop keeps that of the last one too, so that the output may be modified in place.
        """
        return self.num_layers if self.backend == "torch" else self.num_layers - 1

    def group(self, params: Sequence[Tensor]) -> list[list[Weights]]:
        """Returns the flat parameters, in torch's order, as ``weights[layer][direction]``."""
        D = self.directions
        each = len(params) // (self.num_layers * D)
        no_bias = () if self.has_bias else (None, None)
        groups = (params[first : first + each] for first in range(0, len(params), each))
        weights = [Weights(*group[:2], *no_bias, *group[2:]) for group in groups]
        return [weights[i : i + D] for i in range(0, len(weights), D)]
