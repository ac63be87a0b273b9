"""A stack of layers around a schedule: library GEMMs before and after, the recurrence between.

Forward, for each layer: ``gx = x W_ih^T + b_ih`` for all T in one GEMM (unless the plan projects
in the kernel), then one launch for all T. Backward, for each layer: one launch that writes
``dgates``, then one GEMM or sum each for ``dx, dW_ih, dW_hh, db``. No operation here adds
atomically, so results are reproducible bit for bit.

Nothing here is differentiable; ``ops.py`` registers it with autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.plan import Plan, Problem, chip_of, plan
from .kernels.spec import SPECS, CellSpec, Weights
from .reference import reference_bwd, reference_fwd


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
    """What backward needs besides the arguments."""

    output: Tensor  # [T, B, D*H]
    gates: Tensor  # [L, D, T, B, S*H]
    cs: Tensor  # [L, D, T, B, H], or empty for a cell without c
    hidden: Tensor  # [L-1, T, B, D*H], before dropout

    def layer_output(self, layer: int) -> Tensor:
        return self.hidden[layer] if layer < len(self.hidden) else self.output


def group_weights(params: Sequence[Tensor], config: Config) -> list[list[Weights]]:
    """The flat list in torch's order as ``weights[layer][direction]``."""
    each = 4 if config.has_bias else 2
    entries = [params[i : i + each] for i in range(0, len(params), each)]
    weights = [Weights(*(e if config.has_bias else (*e, None, None))) for e in entries]
    D = config.directions
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
    (T, B, _), H = input.shape, h_0.shape[-1]
    L, D = config.num_layers, config.directions
    h_0, c_0 = h_0.contiguous(), None if c_0 is None else c_0.contiguous()
    empty = input.new_empty(0)
    h_n, c_n = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    tiles = config.spec.saved
    saved = Saved(
        output=input.new_empty(T, B, D * H),
        gates=input.new_empty(L, D, T, B, tiles * H) if save else empty,
        cs=input.new_empty(L, D, T, B, H) if save and c_0 is not None else empty,
        hidden=input.new_empty(L - 1, T, B, D * H) if save else empty,
    )
    # A parametrisation may hand out weights of any strides; the kernels read rows.
    params = [p.contiguous() for p in params]
    for layer, weights in enumerate(group_weights(params, config)):
        rows = slice(layer * D, (layer + 1) * D)
        last = layer == L - 1
        if last:
            out = saved.output
        else:
            out = saved.hidden[layer] if save else torch.empty_like(saved.output)
        layer_plan, run = _forward_schedule(config, input, H, save)
        if layer_plan is None or not layer_plan.i_blocks:
            x = _project(input, weights, config.precision)
        else:  # the kernel takes any stride of T and B
            x = input if input.stride(-1) == 1 else input.contiguous()
        run(
            x,
            weights,
            h_0[rows],
            None if c_0 is None else c_0[rows],
            out,
            h_n[rows],
            None if c_n is None else c_n[rows],
            saved.gates[layer] if save else None,
            saved.cs[layer] if save and c_0 is not None else None,
        )
        input = out if last or not dropout_masks else out * dropout_masks[layer]
    return saved.output, h_n, c_n, saved


def stack_backward(
    d_output: Tensor | None,
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    input: Tensor,
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
    (T, B, _), H, D = input.shape, h_0.shape[-1], config.directions
    h_0, c_0 = h_0.contiguous(), None if c_0 is None else c_0.contiguous()
    d_h_n, d_c_n = d_h_n.contiguous(), None if d_c_n is None else d_c_n.contiguous()
    d_h_0, d_c_0 = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    dgates = input.new_empty(D, T, B, config.spec.grad_tiles * H)
    d_params: list[Tensor] = []
    d_out = None if d_output is None else d_output.contiguous()
    grouped = group_weights([p.contiguous() for p in params], config)
    for layer in reversed(range(config.num_layers)):
        rows, weights, out = (
            slice(layer * D, (layer + 1) * D),
            grouped[layer],
            saved.layer_output(layer),
        )
        mask = dropout_masks[layer - 1] if dropout_masks and layer else None
        x = input if layer == 0 else saved.hidden[layer - 1]
        x = x if mask is None else x * mask
        _backward_schedule(config, x, H)(
            d_out,
            d_h_n[rows],
            None if d_c_n is None else d_c_n[rows],
            weights,
            h_0[rows],
            None if c_0 is None else c_0[rows],
            out,
            saved.gates[layer],
            None if c_0 is None else saved.cs[layer],
            dgates,
            d_h_0[rows],
            None if d_c_0 is None else d_c_0[rows],
        )
        with _gemm_precision(config.precision, input):
            if needs_params:
                grads = [
                    grad
                    for d, w in enumerate(weights)
                    for grad in _weight_grads(
                        config.spec,
                        d,
                        w,
                        x,
                        h_0[rows][d],
                        out,
                        saved.gates[layer, d],
                        dgates[d],
                    )
                ]
                d_params = grads + d_params
            if layer or needs_input:
                d_out = _input_grad(dgates, weights)
                d_out = d_out if mask is None else d_out * mask
    return (d_out if needs_input else None), d_h_0, d_c_0, d_params


def _forward_schedule(
    config: Config,
    x: Tensor,
    H: int,
    save: bool,
) -> tuple[Plan | None, Callable]:
    """The plan (None for the reference) and the launcher with everything but tensors bound."""
    if config.backend == "torch":
        return None, lambda *tensors: reference_fwd(config.cell, *tensors)
    from .kernels.resident import resident_fwd

    layer_plan = _plan(config, x, H, save)
    return layer_plan, lambda *tensors: resident_fwd(config.cell, layer_plan, *tensors)


def _backward_schedule(config: Config, x: Tensor, H: int) -> Callable:
    if config.backend == "torch":
        return lambda *tensors: reference_bwd(config.cell, *tensors)
    from .kernels.resident import resident_bwd

    layer_plan = _plan(config, x, H, True)
    return lambda *tensors: resident_bwd(config.cell, layer_plan, *tensors)


def _plan(config: Config, x: Tensor, H: int, needs_grad: bool) -> Plan:
    problem = Problem(
        config.cell,
        x.shape[2],
        H,
        x.shape[1],
        config.directions,
        x.dtype,
        config.precision,
        needs_grad,
    )
    return plan(problem, chip_of(x.device))


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
    H = h_0.shape[-1]
    flat = dgates.flatten(0, 1)
    dgx = flat[:, : spec.gates * H]
    dw_ih = dgx.t() @ x.flatten(0, 1)
    dw_hh, db_hh = torch.empty_like(w.w_hh), dgx.new_empty(spec.gates * H)

    # Steps in the order of the direction: all but its first follow a row of `out`.
    hs = out[..., d * H : (d + 1) * H]
    before = hs[:-1] if d == 0 else hs[1:]
    for phase, operand in zip(spec.phases, spec.operands, strict=True):
        for first_gate, first_tile, count in _runs(phase, spec.recurrent):
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


def _runs(gates: Sequence[int], tiles: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts gates into runs whose tiles are neighbours: (first gate, first tile, how many)."""
    start = 0
    for i in range(1, len(gates) + 1):
        if i == len(gates) or tiles[gates[i]] != tiles[gates[i - 1]] + 1:
            yield gates[start], tiles[gates[start]], i - start
            start = i


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
