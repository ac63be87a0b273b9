"""The records of a stack: its tensors, its sequences, and its configuration."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .kernels.spec import SPECS, CellSpec
from .kernels.tensors import Weights


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
    params: Sequence[Tensor]  # in torch's order
    dropout_masks: Sequence[Tensor]  # empty, or of each layer but the last [T, B, D*H], scaled


class StackOutputs(NamedTuple):
    """The results of a stack, and what backward needs beside the inputs; None if it is not kept."""

    output: Tensor  # [T, B, D*H], packed [R, D*H]
    h_n: Tensor  # [L*D, B, H]
    c_n: Tensor | None
    gates: Tensor | None = None  # [L*D, T, B, S*H], packed [L*D, R, S*H]
    cs: Tensor | None = None  # [L*D, T, B, H], c of every step
    hidden: Tensor | None = None  # [``config.hidden_layers``, T, B, D*H], before dropout


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
