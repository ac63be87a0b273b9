"""What a schedule, the planner and the reference must know of a cell, in plain Python.

The equations stand in ``cells.py`` (Triton) and, written independently, in
``fusedrnn/reference.py`` (torch). This table only counts their tiles. Axes: ``G`` gates, i.e.
``weight_hh`` is ``[G*H, H]``, in torch's gate order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class CellSpec:
    """The tile counts of one cell.

    Attributes:
        gates: G, the rows of ``weight_ih`` and ``weight_hh`` in units of H.
        states: 2 with a cell state c beside h, else 1.
        saved: tiles kept for backward in each step, besides h and c.
        phases: for each recurrent product of a step the gates it serves, in ascending order.
            One phase multiplies h itself; a later phase multiplies an operand that the cell
            builds from the gates before it (``r * h`` in the textbook's GRU).
        grads: for each phase the gradient tiles the adjoint returns, as indices into the
            stored ``dgates``. Tiles 0..G-1 are gradients of the input pre-activations.
        recurrent: for each gate the tile that is the gradient of its recurrent pre-activation.
        operands: for each phase the name of the left operand of its product ("h" or "r*h").
        specials: exponentials and reciprocals of one unit in one step, forward and backward: 2 for
            each sigmoid or tanh. For the model only.
        rowwise: whether the cell reduces over a row of H (a normalisation), so that one program
            must hold all of it.
    """

    gates: int
    states: int
    saved: int
    phases: tuple[tuple[int, ...], ...]
    grads: tuple[tuple[int, ...], ...]
    recurrent: tuple[int, ...]
    operands: tuple[str, ...] = ("h",)
    specials: tuple[int, int] = (0, 0)
    rowwise: bool = False

    @cached_property
    def grad_tiles(self) -> int:
        """Tiles of ``dgates`` per step: G, and one more for each gate whose two parts differ."""
        return 1 + max(max(tiles) for tiles in self.grads)

    @cached_property
    def first_tiles(self) -> tuple[int, ...]:
        """Of each phase, where its gradient tiles begin in ``dgates``."""
        return tuple(tiles[0] for tiles in self.grads)

    @cached_property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """For each gate of each phase the entry of ``grads`` that W_hh^T multiplies."""
        return tuple(
            tuple(stored.index(self.recurrent[g]) for g in gates)
            for gates, stored in zip(self.phases, self.grads, strict=True)
        )


SPECS = {
    # i, f, g, o are saved activated.
    "lstm": CellSpec(4, 2, 4, ((0, 1, 2, 3),), ((0, 1, 2, 3),), (0, 1, 2, 3), specials=(10, 2)),
    # r, z, n and W_hn h + b_hn; d of the latter is tile 3, since it is r times d of n's input part.
    "gru": CellSpec(3, 1, 4, ((0, 1, 2),), ((0, 1, 2, 3),), (0, 1, 3), specials=(6, 0)),
    # r, z, n; the product for n needs r * h, hence a second phase.
    "gru_reset_before": CellSpec(
        3, 1, 3, ((0, 1), (2,)), ((0, 1), (2,)), (0, 1, 2), ("h", "r*h"), specials=(6, 0)
    ),
    # h alone tells the derivative of both non-linearities.
    "rnn_tanh": CellSpec(1, 1, 0, ((0,),), ((0,),), (0,), specials=(2, 0)),
    "rnn_relu": CellSpec(1, 1, 0, ((0,),), ((0,),), (0,)),
}


class Weights(NamedTuple):
    """One layer's weights in one direction: ``[G*H, I]``, ``[G*H, P]``, and ``[G*H]`` or None.

    P, the columns of h, is H; with a projection (LSTM only, Sak et al. 2014) it is the rows of
    ``w_hr [P, H]``, and h = W_hr (o tanh(c)).
    """

    w_ih: torch.Tensor
    w_hh: torch.Tensor
    b_ih: torch.Tensor | None
    b_hh: torch.Tensor | None
    w_hr: torch.Tensor | None = None


def runs_of(gates: Sequence[int], tiles: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts gates into runs whose tiles are neighbours: (first gate, first tile, how many)."""
    for _, run in groupby(gates, lambda gate: tiles[gate] - gate):
        first, *more = run
        yield first, tiles[first], 1 + len(more)
