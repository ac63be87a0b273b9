"""The launches of a stack: which layers each runs by which plan, and the GEMMs around it.

``stack.py`` goes through them, forward and backward. Axes: T time, B batch, R rows, I input, H
hidden, P columns of h, G gates, S saved tiles, N gradient tiles, D directions, L layers, Z layers
and directions of a launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gemm import add_product, linear
from .grads import Recurrent, by_group, from_groups
from .kernels.plan import Chip, NoPlan, Plan, Problem, chip_of, plan_stack
from .kernels.spec import SPECS, CellSpec, Weights
from .layout import Layout, by_time, own_order
from .loop import loop_bwd, loop_fwd
from .onednn import lstm_backward, lstm_forward
from .requested import LOOPS


class Config(NamedTuple):
    """What of a stack is not a tensor."""

    cell: str
    backend: str  # "triton", "torch" or "compiled"
    has_bias: bool
    num_layers: int
    bidirectional: bool
    precision: str  # "ieee", "tf32", "tf32x3"; of fp32 on triton only
    compact: bool = False  # lengths are packed, for which the host reads their values
    # With more than one, B is so many equal parts with weights of their own: params are
    # [members, ...]. Dense rows, and on the kernels only (`takes_members`).
    members: int = 1
    recompute: bool = False  # backward makes the gates again (``recompute.py``)
    projected: bool = False  # the input is [T, B, D*G*H] and the first weight_ih [G*H, 0]
    # A small LSTM's steps are oneDNN's (``onednn.py``): gx is kept as gates, and no c.
    onednn: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def by_loop(self) -> bool:
        """Whether the recurrence is ``loop.py``'s."""
        return self.backend in LOOPS

    @property
    def compiles(self) -> bool:
        """Whether the loop runs compiled what it can."""
        return self.backend == "compiled"

    @property
    def spec(self) -> CellSpec:
        return SPECS[self.cell]


class Launched(NamedTuple):
    """What the layers of a launch left behind, and the gradients that arrive at their outputs."""

    xs: Sequence[Tensor]  # each layer's input [R, I]; the first's may be [T, B, I]
    weights: Sequence[Weights]  # Z
    h_0: Tensor  # [Z, B, P]
    c_0: Tensor | None  # [Z, B, H]
    outs: Sequence[Tensor]  # each layer's [R, D*P]
    cs: Tensor | None  # [Z, R, H]
    d_out: Tensor | None  # of the uppermost layer, [R, D*P]
    d_cs: Tensor | None  # [Z, R, H]


def group_weights(params: Sequence[Tensor], config: Config) -> list[list[Weights]]:
    """The flat list in torch's order as ``weights[layer][direction]``."""
    D = config.directions
    each = len(params) // (config.num_layers * D)
    no_bias = () if config.has_bias else (None, None)
    weights = []
    for first in range(0, len(params), each):
        own = params[first : first + each]
        weights.append(Weights(*own[:2], *no_bias, *own[2:]))
    return [weights[i : i + D] for i in range(0, len(weights), D)]


def hidden_size(h_0: Tensor, c_0: Tensor | None) -> int:
    """H: the columns of c, if there is one; those of h are fewer under a projection."""
    return (h_0 if c_0 is None else c_0).shape[-1]


def takes_members(
    config: Config, ragged: bool, input: Tensor, h_0: Tensor, c_0: Tensor | None
) -> bool:
    """Whether one launch a layer can serve ``config.members`` parts of B with their own weights."""
    if config.recompute or config.projected:
        return False
    try:
        launches_of(config, input, h_0, c_0, True, ragged)
    except NoPlan:
        return False
    return True


def launches_of(
    config: Config,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    needs_grad: bool,
    ragged: bool,
) -> list[tuple[range, Plan | None]]:
    """The layers of each launch with its plan; without a plan for the loop."""
    sizes = input.shape[-1], hidden_size(h_0, c_0), *h_0.shape[1:]
    return _launches(config, *sizes, input.dtype, chip_of(input.device), needs_grad, ragged)


@lru_cache(maxsize=4096)
def _launches(
    config: Config,
    I: int,
    H: int,
    B: int,
    P: int,
    dtype: torch.dtype,
    chip: Chip,
    needs_grad: bool,
    ragged: bool,
) -> list[tuple[range, Plan | None]]:
    if config.by_loop:
        return [(range(layer, layer + 1), None) for layer in range(config.num_layers)]
    problem = Problem(
        config.cell,
        0 if config.projected else I,
        H,
        B,
        config.directions,
        dtype,
        config.precision,
        needs_grad,
        config.num_layers,
        P if P != H else 0,
        ragged,
        config.members,
        config.recompute,
    )
    launches: list[tuple[range, Plan | None]] = []
    first = 0
    for plan in plan_stack(problem, chip):
        launches.append((range(first, first + plan.layers), plan))
        first += plan.layers
    return launches


@cache
def lazily(module: str) -> Any:
    """A module of the kernels that needs Triton, imported when it is first needed."""
    return import_module(f".kernels.{module}", __package__)


def run_forward(
    config: Config, plan: Plan | None, x, weights, masks, h_0, c_0, outs, h_n, c_n, gates, cs,
    layout: Layout,
) -> None:  # fmt: skip
    """Calls the launcher that the plan names; arguments as of ``cooperative_fwd``."""
    cell, given = config.cell, (x, weights)
    results: Any = (h_n, c_n, gates, cs, layout.rows)
    if config.onednn:
        lstm_forward(x, weights, h_0, c_0, outs[0], h_n, c_n, layout.rows)
    elif plan is None:
        loop_fwd(cell, *given, h_0, c_0, outs[0], *(*results, config.compiles))
    elif plan.schedule == "resident":
        lazily("resident").resident_fwd(cell, plan, *given, h_0, c_0, outs[0], *results)
    elif plan.schedule == "stepwise":
        with gemm_precision(config.precision, x):
            lazily("stepwise_launch").stepwise_fwd(
                cell, *given, h_0, c_0, outs[0], *(*results, None, plan.graph_steps)
            )
    else:
        shared = lazily("exchange").workspace(cell, plan.forward, x, *h_0.shape, plan.members)
        lazily("cooperative_launch").cooperative_fwd(
            cell, plan, *given, masks, h_0, c_0, outs, *(*results, shared)
        )


def run_backward(
    config: Config, plan: Plan | None, d_out, d_cs, d_h_n, d_c_n, weights, masks, h_0, c_0, outs,
    gates, cs, dgates, d_h_0, d_c_0, layout: Layout,
) -> list[Recurrent] | None:  # fmt: skip
    """Calls the launcher that the plan names; arguments as of ``cooperative_bwd``.

    Returns what of the weights' gradients it found on the way, if anything.
    """
    cell, given = config.cell, (d_out, d_cs, d_h_n, d_c_n, weights)
    rest: Any = (gates, cs, dgates, d_h_0, d_c_0, layout.rows)
    if config.onednn:
        states = h_0, c_0, outs[0], gates, dgates, d_h_0, d_c_0
        return lstm_backward(d_out, d_h_n, d_c_n, weights, *states, layout.rows)
    if plan is None:
        loop_bwd(cell, *given, h_0, c_0, outs[0], *(*rest, config.compiles))
    elif plan.schedule == "resident":
        lazily("resident").resident_bwd(cell, plan, *given, h_0, c_0, outs[0], *rest)
    elif plan.schedule == "stepwise":
        with gemm_precision(config.precision, h_0):
            lazily("stepwise_launch").stepwise_bwd(
                cell, *given, h_0, c_0, outs[0], *(*rest, None, plan.graph_steps)
            )
    else:
        shared = lazily("exchange").workspace(cell, plan.backward, h_0, *h_0.shape, plan.members)
        lazily("cooperative_launch").cooperative_bwd(
            cell, plan, *given, masks, h_0, c_0, outs, *(*rest, shared)
        )
    return None


def is_projected(x: Tensor, weights: Sequence[Weights]) -> bool:
    """Whether x is what weight_ih would make of an input."""
    return x.shape[-1] > 0 and not weights[0].w_ih.shape[-1]


def project(
    x: Tensor, weights: Sequence[Weights], config: Config, gx: Tensor | None = None
) -> Tensor:
    """gx ``[D, R, G*H]``, written without a temporary, and into ``gx`` if it is given."""
    columns = weights[0].w_hh.shape[-2]
    own = own_order(x, columns) if config.members == 1 and not is_projected(x, weights) else None
    rows = x.reshape(-1, x.shape[-1]) if own is None else own
    if gx is None:
        gx = x.new_empty(len(weights), rows.shape[0], columns)
    if is_projected(x, weights):
        for d, w in enumerate(weights):
            part = rows[:, d * columns : (d + 1) * columns]
            gx[d].copy_(part) if w.b_ih is None else torch.add(part, w.b_ih, out=gx[d])
        return gx
    with gemm_precision(config.precision, x):
        for d, w in enumerate(weights):
            if config.members > 1:
                B = x.shape[-2]
                products = by_group(rows, B, config.members) @ w.w_ih.mT
                products += 0.0 if w.b_ih is None else w.b_ih.unsqueeze(1)
                gx[d] = from_groups(products, B)
            elif own is not None:
                products = linear(own, w.w_ih, w.b_ih)
                gx[d].unflatten(0, x.shape[:2]).copy_(by_time(products, x))
            else:
                linear(rows, w.w_ih, w.b_ih, gx[d])
    return gx


def input_grad(dgates: Tensor, weights: Sequence[Weights], members: int = 1, B: int = 0) -> Tensor:
    """dx ``[R, I]``: the sum over directions of the input pre-activations' gradients W_ih.

    members, B: as of ``Config``, and sequences in all; B is not read without members.
    """
    rows, columns = weights[0].w_ih.shape[-2:]
    if not columns:  # the input was projected
        return torch.cat(list(dgates[..., :rows]), 1)
    if members > 1:
        grads = [by_group(dgates[d, :, :rows], B, members) for d in range(len(weights))]
        parts = [from_groups(g @ w.w_ih, B) for g, w in zip(grads, weights, strict=True)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
    dx = dgates.new_empty(dgates.shape[1], columns)
    for d, w in enumerate(weights):
        add_product(dx, dgates[d, :, :rows], w.w_ih, float(d > 0))
    return dx


def gemm_precision(precision: str, like: Tensor) -> AbstractContextManager[None]:
    """Makes the library's fp32 GEMMs on CUDA agree with the dots in the kernels.

    torch has no argument for it, only a process-wide switch, which is set here and put back.
    cuBLAS has no tf32x3; ieee is at least as exact.
    """
    return _switched(precision) if like.is_cuda and like.dtype == torch.float32 else nullcontext()


@contextmanager
def _switched(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
