"""The tensors of a launch, as the named tuples that every schedule and the CPU's loop take.

Every tensor is contiguous. Of the Z = L*D layers and directions, layer l in direction d has number
l*D + d. ``rows.py`` defines the R rows, ``spec.py`` the S saved and N gradient tiles.
"""

from typing import Any, NamedTuple

from torch import Tensor

MaybeTensor = Any  # a Tensor, or None where a cell or a call has none


class Weights(NamedTuple):
    """The weights of one layer in one direction, or a tuple of each kind of all."""

    w_ih: Any  # [G*H, I]
    w_hh: Any  # [G*H, H]
    b_ih: MaybeTensor  # [G*H]
    b_hh: MaybeTensor  # [G*H]
    w_hr: MaybeTensor = None  # [P, H], a projection of h; only ``reference.py`` reads it


class Layers(NamedTuple):
    """The tensors of the layers that run in one launch.

    A tensor is None if the cell does not have it (an RNN has no c) or the call does not need it
    (without gradients nothing is saved). A kernel is compiled without what is None.
    """

    gx: MaybeTensor = None  # [D, R, G*H], [R, G*H] or [T, B, G*H]: x W_ih^T + b_ih of layer 0
    w_ih: Any = None  # Z of [G*H, I], a tuple; kernels read those above the first layer
    b_ih: tuple[Tensor, ...] | None = None  # Z of [G*H]
    w_hh: tuple[Tensor, ...] = ()  # Z of [G*H, H]
    b_hh: tuple[Tensor, ...] | None = None  # Z of [G*H]
    masks: tuple[Tensor, ...] | None = None  # Z of [R, H]: dropout factors of a layer's input
    h_0: MaybeTensor = None  # [Z, B, H]
    c_0: MaybeTensor = None  # [Z, B, H]
    h_n: MaybeTensor = None  # [Z, B, H], written by forward
    c_n: MaybeTensor = None  # [Z, B, H], written by forward
    out: tuple[Tensor, ...] = ()  # Z of [R, D*H] or [T, B, D*H], written by forward; one a layer
    gates: MaybeTensor = None  # [Z, R, S*H], saved by forward
    cs: MaybeTensor = None  # [Z, R, H], saved by forward
    origins: MaybeTensor = None  # [D, T, B] of the rows; None if every sequence has every step
    starts: MaybeTensor = None  # [T] of the rows; None if they are not packed

    def read(self, L: int, origins: Any, starts: Any, gx: MaybeTensor = None) -> "Layers":
        """Returns what a launch of L layers reads and writes, forward with gx, or backward."""
        _, w_ih, b_ih, w_hh, b_hh, masks, h_0, c_0, h_n, c_n, out, gates, cs, _, _ = self
        if L == 1:
            w_ih = b_ih = masks = None
        if gx is None:
            b_ih = b_hh = h_n = c_n = None
        saved = gates, cs, origins, starts  # half the time of ``_replace``
        return Layers(gx, w_ih, b_ih, w_hh, b_hh, masks, h_0, c_0, h_n, c_n, out, *saved)


class Grads(NamedTuple):
    """The gradients that reach the layers of a launch, and those that leave them."""

    out: MaybeTensor = None  # [R, D*H] or [T, B, D*H] of the last layer
    cs: MaybeTensor = None  # [Z, R, H] of every c
    h_n: MaybeTensor = None  # [Z, B, H]
    c_n: MaybeTensor = None  # [Z, B, H]
    gates: MaybeTensor = None  # [Z, R, N*H] of the pre-activations, written by backward
    h_0: MaybeTensor = None  # [Z, B, H], written by backward
    c_0: MaybeTensor = None  # [Z, B, H], written by backward
