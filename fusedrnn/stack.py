"""A stack of layers around a schedule: library GEMMs before and after, the recurrence between.

The plan cuts the stack into launches of one layer, or of several as a wavefront. Forward, for each
launch: ``gx = x W_ih^T + b_ih`` for all T in one GEMM (unless the kernel projects), then the
recurrence. Backward: the recurrence, which writes ``dgates``, then for each layer one GEMM or sum
each for ``dx, dW_ih, dW_hh, db``. No operation here adds
atomically, so results are reproducible bit for bit.

Nothing here is differentiable; ``ops.py`` registers it with autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grads import projection_grad, weight_grads
from .kernels.plan import (
    LaunchRefused,
    Plan,
    Problem,
    chip_of,
    plan_stack,
    refuse_cooperation,
)
from .kernels.rows import SLACK
from .kernels.spec import SPECS, CellSpec, Weights
from .layout import Layout, Ragged, layout_of, links_of, without_padding
from .loop import loop_bwd, loop_fwd


def again_if_refused(run: Callable, input: Tensor, *arguments: Any) -> Any:
    """``run(input, *arguments)``; where the device refuses a cooperative launch, without such ones.

    The plan allows for the whole device; under MPS or in a green context less of it is there.
    """
    try:
        return run(input, *arguments)
    except LaunchRefused as refusal:
        refuse_cooperation(input.device)
        warnings.warn(
            f"{input.device} refused a cooperative launch ({refusal}); from now on fusedrnn uses "
            "the schedules that need none",
            RuntimeWarning,
            stacklevel=2,
        )
        return run(input, *arguments)


class Config(NamedTuple):
    """What of a stack is not a tensor."""

    cell: str
    backend: str  # "triton" or "torch"
    has_bias: bool
    num_layers: int
    bidirectional: bool
    precision: str  # "ieee", "tf32", "tf32x3"; of fp32 on triton only
    compact: bool = False  # lengths are packed, for which the host reads their values

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def spec(self) -> CellSpec:
        return SPECS[self.cell]


class Saved(NamedTuple):
    """What backward needs besides the arguments. P is H, but for a projection."""

    output: Tensor  # [R, D*P]
    gates: Tensor  # [L, D, R, S*H]
    cs: Tensor  # [L, D, R, H], or empty for a cell without c
    hidden: Tensor  # [L-1, R, D*P], before dropout

    def layer_output(self, layer: int) -> Tensor:
        return self.hidden[layer] if layer < len(self.hidden) else self.output


def group_weights(params: Sequence[Tensor], config: Config) -> list[list[Weights]]:
    """The flat list in torch's order as ``weights[layer][direction]``."""
    D = config.directions
    each = len(params) // (config.num_layers * D)
    weights = []
    for first in range(0, len(params), each):
        w_ih, w_hh, *rest = params[first : first + each]
        b_ih, b_hh = rest[:2] if config.has_bias else (None, None)
        w_hr = rest[-1] if len(rest) % 2 else None
        weights.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr))
    return [weights[i : i + D] for i in range(0, len(weights), D)]


def stack_forward(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    params: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    ragged: Ragged,
    config: Config,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Saved]:
    """Runs all layers, shapes as in ``ops.rnn_stack``: output, h_n, c_n and what is saved.

    What is saved has room for a row for each step and sequence (R = T * B), or, of packed input,
    for each row of the input, however the rows are laid out: its shapes depend on no value.
    """
    P, L, D, H = h_0.shape[-1], config.num_layers, config.directions, _hidden_size(h_0, c_0)
    layout = layout_of(input, h_0.shape[1], config.directions, ragged, config.compact)
    h_0, c_0 = layout.sort(h_0), None if c_0 is None else layout.sort(c_0)
    h_n, c_n = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    empty, tiles = input.new_empty(0), config.spec.saved
    room = input.shape[:-1].numel()
    output = input.new_empty(*input.shape[:-1], D * P)
    saved = Saved(
        output=output if layout.dense is None else input.new_empty(layout.rows.total, D * P),
        gates=input.new_empty(L, D, room, tiles * H) if save else empty,
        cs=input.new_empty(L, D, room, H) if save and c_0 is not None else empty,
        hidden=input.new_empty(L - 1, room, D * P) if save else empty,
    )
    work = Saved(saved.output, *map(layout.part, saved[1:]))
    dropout_masks = [layout.take(mask) for mask in dropout_masks]
    # A parametrisation may hand out weights of any strides; the kernels read rows.
    grouped = group_weights([p.contiguous() for p in params], config)
    x = layout.take(input)
    for layers, plan in _launches(config, input, h_0, c_0, save, layout.is_ragged):
        rows = slice(layers[0] * D, (layers[-1] + 1) * D)
        outs = [
            work.layer_output(layer) if save or layer == L - 1 else torch.empty_like(work.output)
            for layer in layers
        ]
        gates = work.gates.flatten(0, 1)[rows] if save else None
        if plan is None or not plan.i_blocks:
            # The loop turns gx into gates of the same size where it lies: one buffer less.
            in_place = plan is None and tiles == config.spec.gates
            gx = gates if in_place else None
            x = _project(x, grouped[layers[0]], config.precision, gx)
        elif x.stride(-1) != 1:  # the kernel takes any stride of T and B
            x = x.contiguous()
        _run_forward(
            config,
            plan,
            x,
            [w for layer in layers for w in grouped[layer]],
            dropout_masks[layers[0] : layers[-1]],
            h_0[rows],
            None if c_0 is None else c_0[rows],
            outs,
            h_n[rows],
            None if c_n is None else c_n[rows],
            gates,
            work.cs.flatten(0, 1)[rows] if save and c_0 is not None else None,
            layout,
        )
        if layers[-1] < L - 1:
            x = outs[-1].view_as(work.output)
            x = x * dropout_masks[layers[-1]] if dropout_masks else x
    if layout.dense is not None:
        saved = saved._replace(output=layout.give(saved.output))
    c_n = None if c_n is None else layout.unsort(c_n)
    return saved.output, layout.unsort(h_n), c_n, saved


def stack_backward(
    input: Tensor,
    d_output: Tensor | None,
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    d_cs: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    params: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    saved: Saved,
    ragged: Ragged,
    config: Config,
    needs_input: bool,
    needs_params: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    """Runs all layers backwards: d_input (None unless needed), d_h_0, d_c_0, and d_params or []."""
    D, H = config.directions, _hidden_size(h_0, c_0)
    layout = layout_of(input, h_0.shape[1], config.directions, ragged, config.compact)
    saved = Saved(layout.take(saved.output), *map(layout.part, saved[1:]))
    h_0, c_0 = layout.sort(h_0), None if c_0 is None else layout.sort(c_0)
    d_h_n, d_c_n = layout.sort(d_h_n), None if d_c_n is None else layout.sort(d_c_n)
    d_h_0, d_c_0 = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    d_cs = None if d_cs is None else layout.part(d_cs.contiguous()).flatten(0, 1)
    dropout_masks = [layout.take(mask) for mask in dropout_masks]
    x = without_padding(layout.take(input), layout.rows)
    d_params: list[Tensor] = []
    d_out = None if d_output is None else layout.take(d_output).contiguous()
    grouped = group_weights([p.contiguous() for p in params], config)
    has_links = layout.is_ragged or h_0.shape[-1] != H
    links = [links_of(layout.rows, d, input.device) for d in range(D * has_links)]
    for layers, plan in reversed(_launches(config, input, h_0, c_0, True, layout.is_ragged)):
        rows = slice(layers[0] * D, (layers[-1] + 1) * D)
        columns = config.spec.grad_tiles * H
        room = input.new_empty(len(layers) * D * layout.rows.total + SLACK, columns)
        dgates = room[:-SLACK].view(len(layers) * D, layout.rows.total, columns)
        _run_backward(
            config,
            plan,
            d_out,
            None if d_cs is None else d_cs[rows],
            d_h_n[rows],
            None if d_c_n is None else d_c_n[rows],
            [w for layer in layers for w in grouped[layer]],
            dropout_masks[layers[0] : layers[-1]],
            h_0[rows],
            None if c_0 is None else c_0[rows],
            [saved.layer_output(layer) for layer in layers],
            saved.gates.flatten(0, 1)[rows],
            None if c_0 is None else saved.cs.flatten(0, 1)[rows],
            dgates,
            d_h_0[rows],
            None if d_c_0 is None else d_c_0[rows],
            layout,
        )
        with _gemm_precision(config.precision, input):
            for layer in reversed(layers) if needs_params else ():
                given = _layer_input(layer, x, saved, dropout_masks)
                of_layer: list[Tensor] = []
                for d, w in enumerate(grouped[layer]):
                    row, own = layer * D + d, dgates[(layer - layers[0]) * D + d]
                    out, gates = saved.layer_output(layer), saved.gates[layer, d]
                    needed = links[d] if layout.is_ragged else None
                    of_layer += weight_grads(
                        config.spec, d, w, given, h_0[row], out, gates, own, needed
                    )
                    if w.w_hr is not None:
                        of_layer += projection_grad(
                            d, w, d_out, d_h_n[row], gates, saved.cs[layer, d], own, links[d]
                        )
                d_params = of_layer + d_params
            if layers[0] or needs_input:
                d_out = _input_grad(dgates[:D], grouped[layers[0]])
                if dropout_masks and layers[0]:
                    d_out = d_out * dropout_masks[layers[0] - 1].view_as(d_out)
    d_input = None
    if needs_input:
        assert d_out is not None
        d_input = layout.give(d_out).view(input.shape)
    d_c_0 = None if d_c_0 is None else layout.unsort(d_c_0)
    return d_input, layout.unsort(d_h_0), d_c_0, d_params


def _layer_input(layer: int, x: Tensor, saved: Saved, dropout_masks: Sequence[Tensor]) -> Tensor:
    """What a layer was given: the input, or the outputs below after dropout."""
    if layer == 0:
        return x
    below = saved.hidden[layer - 1]
    return below * dropout_masks[layer - 1].view_as(below) if dropout_masks else below


def _hidden_size(h_0: Tensor, c_0: Tensor | None) -> int:
    """H: the columns of c, if there is one; those of h are fewer under a projection."""
    return (h_0 if c_0 is None else c_0).shape[-1]


def _launches(
    config: Config,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    needs_grad: bool,
    ragged: bool,
) -> list[tuple[range, Plan | None]]:
    """The layers of each launch with its plan; without a plan for the reference."""
    if config.backend == "torch":
        return [(range(layer, layer + 1), None) for layer in range(config.num_layers)]
    H, P = _hidden_size(h_0, c_0), h_0.shape[-1]
    problem = Problem(
        config.cell,
        input.shape[-1],
        H,
        h_0.shape[1],
        config.directions,
        input.dtype,
        config.precision,
        needs_grad,
        config.num_layers,
        P if P != H else 0,
        ragged,
    )
    launches: list[tuple[range, Plan | None]] = []
    first = 0
    for plan in plan_stack(problem, chip_of(input.device)):
        launches.append((range(first, first + plan.layers), plan))
        first += plan.layers
    return launches


def _run_forward(
    config: Config, plan: Plan | None, x, weights, masks, h_0, c_0, outs, h_n, c_n, gates, cs,
    layout: Layout,
) -> None:  # fmt: skip
    """Calls the launcher that the plan names; arguments as of ``cooperative_fwd``."""
    cell, given = config.cell, (x, weights)
    results: Any = (h_n, c_n, gates, cs, layout.rows)
    if plan is None:
        loop_fwd(cell, *given, h_0, c_0, outs[0], *results)
    elif plan.schedule == "resident":
        from .kernels.resident import resident_fwd

        resident_fwd(cell, plan, *given, h_0, c_0, outs[0], *results)
    elif plan.schedule == "stepwise":
        from .kernels.stepwise_launch import stepwise_fwd

        with _gemm_precision(config.precision, x):
            stepwise_fwd(cell, *given, h_0, c_0, outs[0], *results)
    else:
        from .kernels.cooperative_launch import cooperative_fwd
        from .kernels.exchange import workspace

        shared = workspace(cell, plan.forward, x, *h_0.shape)
        cooperative_fwd(cell, plan, *given, masks, h_0, c_0, outs, *(*results, shared))


def _run_backward(
    config: Config, plan: Plan | None, d_out, d_cs, d_h_n, d_c_n, weights, masks, h_0, c_0, outs,
    gates, cs, dgates, d_h_0, d_c_0, layout: Layout,
) -> None:  # fmt: skip
    """Calls the launcher that the plan names; arguments as of ``cooperative_bwd``."""
    cell, given = config.cell, (d_out, d_cs, d_h_n, d_c_n, weights)
    rest: Any = (gates, cs, dgates, d_h_0, d_c_0, layout.rows)
    if plan is None:
        loop_bwd(cell, *given, h_0, c_0, outs[0], *rest)
    elif plan.schedule == "resident":
        from .kernels.resident import resident_bwd

        resident_bwd(cell, plan, *given, h_0, c_0, outs[0], *rest)
    elif plan.schedule == "stepwise":
        from .kernels.stepwise_launch import stepwise_bwd

        with _gemm_precision(config.precision, h_0):
            stepwise_bwd(cell, *given, h_0, c_0, outs[0], *rest)
    else:
        from .kernels.cooperative_launch import cooperative_bwd
        from .kernels.exchange import workspace

        assert plan.backward is not None
        shared = workspace(cell, plan.backward, h_0, *h_0.shape)
        cooperative_bwd(cell, plan, *given, masks, h_0, c_0, outs, *(*rest, shared))


def _project(
    x: Tensor, weights: Sequence[Weights], precision: str, gx: Tensor | None = None
) -> Tensor:
    """gx ``[D, R, G*H]``, written without a temporary, and into ``gx`` if it is given."""
    rows = x.reshape(-1, x.shape[-1])
    if gx is None:
        gx = x.new_empty(len(weights), len(rows), weights[0].w_ih.shape[0])
    with _gemm_precision(precision, x):
        for d, w in enumerate(weights):
            if w.b_ih is None:
                torch.mm(rows, w.w_ih.t(), out=gx[d])
            else:
                torch.addmm(w.b_ih, rows, w.w_ih.t(), out=gx[d])
    return gx


def _input_grad(dgates: Tensor, weights: Sequence[Weights]) -> Tensor:
    """dx ``[R, I]``: the sum over directions of the input pre-activations' gradients W_ih."""
    rows, columns = weights[0].w_ih.shape
    dx = dgates.new_empty(dgates.shape[1], columns)
    for d, w in enumerate(weights):
        torch.addmm(dx, dgates[d, :, :rows], w.w_ih, beta=float(d > 0), out=dx)
    return dx


@contextmanager
def _gemm_precision(precision: str, like: Tensor) -> Iterator[None]:
    """Makes the library's fp32 GEMMs on CUDA agree with the dots in the kernels.

    torch has no argument for it, only a process-wide switch, which is set here and put back.
    cuBLAS has no tf32x3; ieee is at least as exact.
    """
    if not like.is_cuda or like.dtype != torch.float32:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
