"""The number of gates, states and products of each cell, in plain Python.

The equations are in ``cells.py`` (Triton), ``fusedrnn/loop_cells.py`` (the CPU's loop) and
``fusedrnn/reference.py`` (torch, written independently). This table counts their tiles: a tile is
``[B, H]`` values of one gate or state in one step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby


@dataclass(frozen=True)
class CellSpec:
    """The tile counts of one cell.

    Attributes:
        gates: G; ``weight_hh`` is ``[G*H, H]``, in torch's order of the gates.
        states: 2 if the cell has a state c beside h, else 1.
        saved: tiles that forward keeps for backward in each step, besides h and c.
        phases: for each recurrent product of a step the gates it serves, in ascending order. The
            first product multiplies h; a later one multiplies an operand that the cell computes
            from the gates before it (``r * h`` in the GRU of Cho et al.).
        grads: for each phase the gradient tiles that the adjoint returns, as indices into the
            stored ``dgates``. Tiles 0 to G-1 are gradients of the input's pre-activations.
        recurrent: for each gate the tile that is the gradient of its recurrent pre-activation.
        operands: for each phase the operand of its product, "h" or "r*h".
        specials: exponentials and reciprocals of one unit in one step, forward and backward: two
            for each sigmoid or tanh. Only the performance model reads it.
    """

    gates: int
    states: int
    saved: int
    phases: tuple[tuple[int, ...], ...]
    grads: tuple[tuple[int, ...], ...]
    recurrent: tuple[int, ...]
    operands: tuple[str, ...] = ("h",)
    specials: tuple[int, int] = (0, 0)

    @cached_property
    def grad_tiles(self) -> int:
        """N, the tiles of ``dgates``: G, and one more for each gate whose two parts differ."""
        return 1 + max(map(max, self.grads))

    @cached_property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """For each gate of each phase the entry of ``grads`` that W_hh^T multiplies."""
        return tuple(
            tuple(stored.index(self.recurrent[g]) for g in gates)
            for gates, stored in zip(self.phases, self.grads, strict=True)
        )


SPECS = {
    # i, f, g, o are saved after their activations.
    "lstm": CellSpec(4, 2, 4, ((0, 1, 2, 3),), ((0, 1, 2, 3),), (0, 1, 2, 3), specials=(10, 2)),
    # r, z, n and W_hn h + b_hn are saved. The gradient of the latter is r times that of n's input
    # part, hence tile 3.
    "gru": CellSpec(3, 1, 4, ((0, 1, 2),), ((0, 1, 2, 3),), (0, 1, 3), specials=(6, 0)),
    # r, z, n are saved. The product for n needs r * h, hence a second phase.
    "gru_reset_before": CellSpec(
        3, 1, 3, ((0, 1), (2,)), ((0, 1), (2,)), (0, 1, 2), ("h", "r*h"), specials=(6, 0)
    ),
    # The derivative of both non-linearities follows from h, so nothing else is saved.
    "rnn_tanh": CellSpec(1, 1, 0, ((0,),), ((0,),), (0,), specials=(2, 0)),
    "rnn_relu": CellSpec(1, 1, 0, ((0,),), ((0,),), (0,)),
}


def runs_of(gates: Sequence[int], tiles: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts gates into runs whose tiles are neighbours: (first gate, first tile, how many)."""
    for _, run in groupby(gates, lambda gate: tiles[gate] - gate):
        first, *more = run
        yield first, tiles[first], 1 + len(more)
