"""Backward of a layer by the loop whose gradients are made of each segment as it is found.

``dgates`` of all steps are up to four times as large as the layer's output; written, read for dW
and read for dx they cross memory three times, and as new memory they cost a page fault for every 4
KiB. So the loop (``loop.py``) hands over a segment of them while it is in the cache.

Axes: T time, B batch, R rows, I input, H hidden, D directions, G gates, S saved tiles, N gradient
tiles.
"""

from __future__ import annotations

from torch import Tensor

from .gemm import add_product
from .grads import in_parts, weight_grads
from .kernels.spec import CellSpec
from .launches import Config, Launched, is_projected
from .layout import Layout
from .loop import Segment, loop_bwd


def takes(config: Config, groups: int, projects_h: bool) -> bool:
    """Whether a layer whose gates are there can go this way: by the loop, and with one sum for all
    sequences. dW_hr of a projection needs each step beside the one that follows."""
    return config.by_loop and not config.onednn and groups <= 1 and not projects_h


def backward_by_segment(
    config: Config,
    layer: Launched,
    gates: Tensor,
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    d_h_0: Tensor,
    d_c_0: Tensor | None,
    layout: Layout,
    needs_input: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Runs one layer backwards, fills d_h_0 and d_c_0, and returns dx and d_weights.

    layer: as of ``Launched``, but for xs, which may be the input ``[T, B, I]`` in the order it was
    given; gates: ``[D, R, S*H]``; d_h_n, d_h_0 ``[D, B, H]``, and d_c_n, d_c_0. dx ``[R, I]``, of
    such an input as of ``Layout.room``, is None unless needed; d_weights likewise [].
    """
    found = _Gradients(config.spec, layer, gates, layout, needs_input, needs_weights)
    loop_bwd(
        config.cell, layer.d_out, layer.d_cs, d_h_n, d_c_n, layer.weights, layer.h_0, layer.c_0,
        layer.outs[0], gates, layer.cs, None, d_h_0, d_c_0, layout.rows,
        config.compiles, found.take,
    )  # fmt: skip
    return found.d_x, found.d_weights()


class _Gradients:
    """dx, and the sums that the gradients of the weights are of the segments so far."""

    def __init__(
        self,
        spec: CellSpec,
        layer: Launched,
        gates: Tensor,
        layout: Layout,
        needs_input: bool,
        needs_weights: bool,
    ) -> None:
        self.spec, self.weights, self.gates = spec, layer.weights, gates
        self.x, self.B, self.needs_weights = layer.xs[0], layer.h_0.shape[1], needs_weights
        self.columns = self.weights[0].w_hh.shape[0]
        # Of the input as it was given, only the rows that a segment has are ever copied.
        self.index = layout.dense if self.x.dim() == 3 else None
        self.d_x = None
        if needs_input and self.index is None:
            self.d_x = gates.new_empty(layout.rows.total, self.x.shape[-1])
        elif needs_input:
            self.d_x = layout.room(self.x.shape[-1], gates)
        self.sums: list[list[Tensor]] = [[] for _ in self.weights]

    def take(self, segment: Segment) -> None:
        """Adds what a segment of one direction has to say."""
        d, rows, dgates = segment.d, segment.part.rows, segment.dgates
        if self.needs_weights:
            found = weight_grads(
                self.spec, self.weights[d], self._input(segment), in_parts(segment.entering()),
                self._gates(d, rows), dgates, self.B,
            )  # fmt: skip
            if not self.sums[d]:
                self.sums[d] = found
            else:
                for total, more in zip(self.sums[d], found, strict=True):
                    total.add_(more)
        if self.d_x is None:
            return
        dgx, w_ih = dgates[:, : self.columns], self.weights[d].w_ih
        if is_projected(self.x, self.weights):
            self.d_x[rows, d * self.columns : (d + 1) * self.columns] = dgx
        else:
            add_product(self.d_x[rows], dgx, w_ih, float(d > 0))

    def _gates(self, d: int, rows: slice) -> Tensor | None:
        """The rows of gates, if a product needs them: of the reset gate before it."""
        return self.gates[d].flatten(0, -2)[rows] if "r*h" in self.spec.operands else None

    def _input(self, segment: Segment) -> Tensor:
        """The rows of the input; of a dense one that lies by sequence, if they are all of it, as it
        lies."""
        rows, x = segment.part.rows, self.x
        if self.index is not None:
            return x.flatten(0, 1).index_select(0, self.index[rows])
        if rows.stop - rows.start == x.shape[:-1].numel():
            return x
        if x.dim() == 2:
            return x[rows]
        times = segment.part.times
        return x[times.start : times.stop].reshape(-1, x.shape[-1])

    def d_weights(self) -> list[Tensor]:
        """In torch's order."""
        return [grad for sums in self.sums for grad in sums]
