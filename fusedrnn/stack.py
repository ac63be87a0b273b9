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

from .kernels.plan import (
    LaunchRefused,
    Plan,
    Problem,
    chip_of,
    plan_stack,
    refuse_cooperation,
)
from .kernels.spec import SPECS, CellSpec, Weights, runs_of
from .reference import reference_bwd, reference_fwd


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

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def spec(self) -> CellSpec:
        return SPECS[self.cell]


class Saved(NamedTuple):
    """What backward needs besides the arguments. P is H, but for a projection."""

    output: Tensor  # [T, B, D*P]
    gates: Tensor  # [L, D, T, B, S*H]
    cs: Tensor  # [L, D, T, B, H], or empty for a cell without c
    hidden: Tensor  # [L-1, T, B, D*P], before dropout

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
    config: Config,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Saved]:
    """Runs all layers, shapes as in ``ops.rnn_stack``: output, h_n, c_n and what is saved."""
    (T, B, _), P = input.shape, h_0.shape[-1]
    L, D, H = config.num_layers, config.directions, _hidden_size(h_0, c_0)
    h_0, c_0 = h_0.contiguous(), None if c_0 is None else c_0.contiguous()
    empty = input.new_empty(0)
    h_n, c_n = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    tiles = config.spec.saved
    saved = Saved(
        output=input.new_empty(T, B, D * P),
        gates=input.new_empty(L, D, T, B, tiles * H) if save else empty,
        cs=input.new_empty(L, D, T, B, H) if save and c_0 is not None else empty,
        hidden=input.new_empty(L - 1, T, B, D * P) if save else empty,
    )
    # A parametrisation may hand out weights of any strides; the kernels read rows.
    grouped = group_weights([p.contiguous() for p in params], config)
    for layers, plan in _launches(config, input, h_0, c_0, save):
        weights = [w for layer in layers for w in grouped[layer]]
        rows = slice(layers[0] * D, (layers[-1] + 1) * D)
        outs = [
            saved.layer_output(layer) if save or layer == L - 1 else torch.empty_like(saved.output)
            for layer in layers
        ]
        if plan is None or not plan.i_blocks:
            x = _project(input, grouped[layers[0]], config.precision)
        else:  # the kernel takes any stride of T and B
            x = input if input.stride(-1) == 1 else input.contiguous()
        _run_forward(
            config,
            plan,
            x,
            weights,
            dropout_masks[layers[0] : layers[-1]],
            h_0[rows],
            None if c_0 is None else c_0[rows],
            outs,
            h_n[rows],
            None if c_n is None else c_n[rows],
            saved.gates.flatten(0, 1)[rows] if save else None,
            saved.cs.flatten(0, 1)[rows] if save and c_0 is not None else None,
        )
        if layers[-1] < L - 1:
            input = outs[-1] * dropout_masks[layers[-1]] if dropout_masks else outs[-1]
    return saved.output, h_n, c_n, saved


def stack_backward(
    input: Tensor,
    d_output: Tensor | None,
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    params: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    saved: Saved,
    config: Config,
    needs_input: bool,
    needs_params: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    """Runs all layers backwards: d_input (None unless needed), d_h_0, d_c_0, and d_params or []."""
    (T, B, _), D = input.shape, config.directions
    H = _hidden_size(h_0, c_0)
    h_0, c_0 = h_0.contiguous(), None if c_0 is None else c_0.contiguous()
    d_h_n, d_c_n = d_h_n.contiguous(), None if d_c_n is None else d_c_n.contiguous()
    d_h_0, d_c_0 = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    d_params: list[Tensor] = []
    d_out = None if d_output is None else d_output.contiguous()
    grouped = group_weights([p.contiguous() for p in params], config)
    for layers, plan in reversed(_launches(config, input, h_0, c_0, True)):
        rows = slice(layers[0] * D, (layers[-1] + 1) * D)
        dgates = input.new_empty(len(layers) * D, T, B, config.spec.grad_tiles * H)
        _run_backward(
            config,
            plan,
            d_out,
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
        )
        with _gemm_precision(config.precision, input):
            for layer in reversed(layers) if needs_params else ():
                d_params = [
                    grad
                    for d in range(D)
                    for grad in _weight_grads(
                        config.spec,
                        d,
                        grouped[layer][d],
                        _layer_input(layer, input, saved, dropout_masks),
                        h_0[layer * D + d],
                        saved.layer_output(layer),
                        saved.gates[layer, d],
                        dgates[(layer - layers[0]) * D + d],
                    )
                    + _projection_grad(
                        d,
                        grouped[layer][d],
                        d_out,
                        d_h_n[layer * D + d],
                        saved,
                        layer,
                        dgates[(layer - layers[0]) * D + d],
                    )
                ] + d_params
            if layers[0] or needs_input:
                d_out = _input_grad(dgates[:D], grouped[layers[0]])
                if dropout_masks and layers[0]:
                    d_out = d_out * dropout_masks[layers[0] - 1]
    return (d_out if needs_input else None), d_h_0, d_c_0, d_params


def _layer_input(
    layer: int, input: Tensor, saved: Saved, dropout_masks: Sequence[Tensor]
) -> Tensor:
    """What a layer was given: the input, or the outputs below after dropout."""
    if layer == 0:
        return input
    below = saved.hidden[layer - 1]
    return below * dropout_masks[layer - 1] if dropout_masks else below


def _hidden_size(h_0: Tensor, c_0: Tensor | None) -> int:
    """H: the columns of c, if there is one; those of h are fewer under a projection."""
    return (h_0 if c_0 is None else c_0).shape[-1]


def _launches(
    config: Config, input: Tensor, h_0: Tensor, c_0: Tensor | None, needs_grad: bool
) -> list[tuple[range, Plan | None]]:
    """The layers of each launch with its plan; without a plan for the reference."""
    if config.backend == "torch":
        return [(range(layer, layer + 1), None) for layer in range(config.num_layers)]
    H, P = _hidden_size(h_0, c_0), h_0.shape[-1]
    problem = Problem(
        config.cell,
        input.shape[2],
        H,
        input.shape[1],
        config.directions,
        input.dtype,
        config.precision,
        needs_grad,
        config.num_layers,
        P if P != H else 0,
    )
    launches: list[tuple[range, Plan | None]] = []
    first = 0
    for plan in plan_stack(problem, chip_of(input.device)):
        launches.append((range(first, first + plan.layers), plan))
        first += plan.layers
    return launches


def _run_forward(
    config: Config, plan: Plan | None, x, weights, masks, h_0, c_0, outs, h_n, c_n, gates, cs
) -> None:
    """Calls the launcher that the plan names; arguments as of ``cooperative_fwd``."""
    cell, given, results = config.cell, (x, weights), (h_n, c_n, gates, cs)
    if plan is None:
        reference_fwd(cell, *given, h_0, c_0, outs[0], *results)
    elif plan.schedule == "resident":
        from .kernels.resident import resident_fwd

        resident_fwd(cell, plan, *given, h_0, c_0, outs[0], *results)
    elif plan.schedule == "stepwise":
        from .kernels.stepwise import stepwise_fwd

        with _gemm_precision(config.precision, x):
            stepwise_fwd(cell, *given, h_0, c_0, outs[0], *results)
    else:
        from .kernels.cooperative import cooperative_fwd
        from .kernels.exchange import workspace

        shared = workspace(cell, plan.forward, x, *h_0.shape)
        cooperative_fwd(cell, plan, *given, masks, h_0, c_0, outs, *results, shared)


def _run_backward(
    config: Config, plan: Plan | None, d_out, d_h_n, d_c_n, weights, masks, h_0, c_0, outs, gates,
    cs, dgates, d_h_0, d_c_0,
) -> None:  # fmt: skip
    """Calls the launcher that the plan names; arguments as of ``cooperative_bwd``."""
    cell, given = config.cell, (d_out, d_h_n, d_c_n, weights)
    rest = (gates, cs, dgates, d_h_0, d_c_0)
    if plan is None:
        reference_bwd(cell, *given, h_0, c_0, outs[0], *rest)
    elif plan.schedule == "resident":
        from .kernels.resident import resident_bwd

        resident_bwd(cell, plan, *given, h_0, c_0, outs[0], *rest)
    elif plan.schedule == "stepwise":
        from .kernels.stepwise import stepwise_bwd

        with _gemm_precision(config.precision, h_0):
            stepwise_bwd(cell, *given, h_0, c_0, outs[0], *rest)
    else:
        from .kernels.cooperative import cooperative_bwd
        from .kernels.exchange import workspace

        assert plan.backward is not None
        shared = workspace(cell, plan.backward, h_0, *h_0.shape)
        cooperative_bwd(cell, plan, *given, masks, h_0, c_0, outs, *rest, shared)


def _project(x: Tensor, weights: Sequence[Weights], precision: str) -> Tensor:
    """gx ``[D, T, B, G*H]``, written without a temporary."""
    T, B, I = x.shape
    rows = x.reshape(T * B, I)
    gx = x.new_empty(len(weights), T, B, weights[0].w_ih.shape[0])
    with _gemm_precision(precision, x):
        for d, w in enumerate(weights):
            target = gx[d].flatten(0, 1)
            if w.b_ih is None:
                torch.mm(rows, w.w_ih.t(), out=target)
            else:
                torch.addmm(w.b_ih, rows, w.w_ih.t(), out=target)
    return gx


def _input_grad(dgates: Tensor, weights: Sequence[Weights]) -> Tensor:
    """dx ``[T, B, I]``: the sum over directions of the input pre-activations' gradients W_ih."""
    _, T, B, _ = dgates.shape
    rows, columns = weights[0].w_ih.shape
    dx = dgates.new_empty(T * B, columns)
    for d, w in enumerate(weights):
        grads = dgates[d].flatten(0, 1)[:, :rows]
        torch.addmm(dx, grads, w.w_ih, beta=float(d > 0), out=dx)
    return dx.view(T, B, columns)


def _weight_grads(
    spec: CellSpec,
    d: int,
    w: Weights,
    x: Tensor,
    h_0: Tensor,
    out: Tensor,
    gates: Tensor,
    dgates: Tensor,
) -> list[Tensor]:
    """dW_ih, dW_hh and, with biases, db_ih, db_hh of direction d, each summed over all T and B."""
    H, P = w.w_hh.shape[0] // spec.gates, w.w_hh.shape[1]
    flat = dgates.flatten(0, 1)
    dgx = flat[:, : spec.gates * H]
    dw_ih = dgx.t() @ x.flatten(0, 1)
    dw_hh, db_hh = torch.empty_like(w.w_hh), dgx.new_empty(spec.gates * H)

    # Steps in the order of the direction: all but its first follow a row of `out`.
    hs = out[..., d * P : (d + 1) * P]
    before = hs[:-1] if d == 0 else hs[1:]
    for phase, operand in zip(spec.phases, spec.operands, strict=True):
        for first_gate, first_tile, count in runs_of(phase, spec.recurrent):
            rows = slice(first_gate * H, (first_gate + count) * H)
            grads = dgates[..., first_tile * H : (first_tile + count) * H]
            first, rest = (grads[0], grads[1:]) if d == 0 else (grads[-1], grads[:-1])
            u_first, u_rest = h_0, before
            if operand == "r*h":
                r = gates[..., :H]
                r_first, r_rest = (r[0], r[1:]) if d == 0 else (r[-1], r[:-1])
                u_first, u_rest = r_first * u_first, r_rest * u_rest
            target = dw_hh[rows]
            torch.mm(first.t(), u_first, out=target)
            torch.addmm(
                target,
                rest.flatten(0, 1).t(),
                u_rest.flatten(0, 1),
                out=target,
            )
            torch.sum(grads, (0, 1), out=db_hh[rows])
    return [dw_ih, dw_hh] if w.b_ih is None else [dw_ih, dw_hh, dgx.sum(0), db_hh]


def _projection_grad(
    d: int,
    w: Weights,
    d_out: Tensor | None,
    d_h_n: Tensor,
    saved: Saved,
    layer: int,
    dgates: Tensor,
) -> list[Tensor]:
    """dW_hr, or nothing without a projection.

    The gradient of every h_t is made again of what reached it: dy_t, and dgates of the next step
    times W_hh, which no schedule keeps.
    """
    if w.w_hr is None:
        return []
    P, H = w.w_hr.shape
    dh = torch.empty(*dgates.shape[:2], P, dtype=dgates.dtype, device=dgates.device)
    last, rest, following = (-1, dh[:-1], dgates[1:]) if d == 0 else (0, dh[1:], dgates[:-1])
    dh[last] = d_h_n
    torch.matmul(following, w.w_hh, out=rest)
    if d_out is not None:
        dh += d_out[..., d * P : (d + 1) * P]
    unprojected = saved.gates[layer, d][..., 3 * H :] * saved.cs[layer, d].tanh()  # o tanh(c)
    return [dh.flatten(0, 1).t() @ unprojected.flatten(0, 1)]


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
