"""The tensors of one launch: what every schedule and the loop on the CPU read and write."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The weights of one layer in one direction."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, H]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None = None  # [P, H], a projection of h; read by ``reference.py`` only


class Layers(NamedTuple):
    """The tensors of the layers that run in one launch.

    A tuple has an entry for each layer and direction, Z of them. A tensor is None where a cell has
    no c, where there are no biases, or where the call does not need it.
    """

    gx: Tensor | None = None  # [D, R, G*H] = x W_ih^T + b_ih of the first layer
    w_ih: tuple[Tensor, ...] = ()  # [G*H, I], above the first layer [G*H, D*H]
    b_ih: tuple[Tensor, ...] | None = None  # [G*H]
    w_hh: tuple[Tensor, ...] = ()  # [G*H, H]
    b_hh: tuple[Tensor, ...] | None = None  # [G*H]
    masks: tuple[Tensor, ...] | None = None  # the dropout factor of each layer's input [R, H]
    h_0: Tensor | None = None  # [Z, B, H]
    c_0: Tensor | None = None
    h_n: Tensor | None = None
    c_n: Tensor | None = None
    out: tuple[Tensor, ...] = ()  # the output of the layer, [R, D*H]
    gates: Tensor | None = None  # [Z, R, S*H], saved for backward
    cs: Tensor | None = None  # [Z, R, H], saved for backward
    origins: Tensor | None = None  # [D, T, B], from ``Rows``
    starts: Tensor | None = None  # [T], from ``Rows``


class Grads(NamedTuple):
    """The gradients that reach the layers of a launch, and those that it writes."""

    out: Tensor | None = None  # [R, D*H] of the last layer
    cs: Tensor | None = None  # [Z, R, H]
    h_n: Tensor | None = None  # [Z, B, H]
    c_n: Tensor | None = None
    gates: Tensor | None = None  # [Z, R, N*H], written
    h_0: Tensor | None = None  # [Z, B, H], written
    c_0: Tensor | None = None
