"""The tensors of a launch, as the named tuples that every schedule and the CPU loop take.

Sizes: T time, B batch, R rows (``rows.py``), I input, H hidden, G gates, D directions, L layers,
Z = L*D, S saved tiles, N gradient tiles (``spec.py``). Every tensor is contiguous. Layers and
directions are numbered together: layer l, direction d has number ``l * D + d``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The weights of one layer in one direction: ``[G*H, I]``, ``[G*H, H]``, and ``[G*H]``."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Layers(NamedTuple):
    """The tensors of the layers that run in one launch.

    None stands for a tensor that the cell does not have (an RNN has no c) or that the call does
    not need (without gradients nothing is saved). A kernel is compiled without what is None.
    """

    gx: Tensor | None  # [D, R, G*H] = x W_ih^T + b_ih of the first layer
    w_ih: tuple[Tensor, ...] | None  # Z of [G*H, D*H]; the first layer's are not read
    b_ih: tuple[Tensor, ...] | None  # Z of [G*H]; None without biases
    w_hh: tuple[Tensor, ...]  # Z of [G*H, H]
    b_hh: tuple[Tensor, ...] | None  # Z of [G*H]; None without biases
    masks: tuple[Tensor, ...] | None  # Z of [R, H], dropout factors; the first layer's is not read
    h_0: Tensor  # [Z, B, H]
    c_0: Tensor | None  # [Z, B, H]
    h_n: Tensor | None  # [Z, B, H], written by forward
    c_n: Tensor | None  # [Z, B, H], written by forward
    out: tuple[Tensor, ...]  # Z of [R, D*H], written by forward; directions share a tensor
    gates: Tensor | None  # [Z, R, S*H], saved by forward
    cs: Tensor | None  # [Z, R, H], saved by forward
    origins: Tensor | None  # [D, T, B] of the rows; None if every sequence has every step
    starts: Tensor | None  # [T] of the rows; None if they are not packed


class Grads(NamedTuple):
    """The gradients that reach the layers of a launch, and those that leave them."""

    out: Tensor | None  # [R, D*H] of the last layer; None if there is none
    cs: Tensor | None  # [Z, R, H] of every c; None if there is none
    h_n: Tensor  # [Z, B, H]
    c_n: Tensor | None  # [Z, B, H]
    gates: Tensor  # [Z, R, N*H] of the pre-activations, written by backward
    h_0: Tensor  # [Z, B, H], written by backward
    c_0: Tensor | None  # [Z, B, H], written by backward
