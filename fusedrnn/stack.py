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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grads import layer_grads
from .kernels.plan import LaunchRefused, Plan, refuse_cooperation
from .launches import (
    Config,
    Launched,
    gemm_precision,
    group_weights,
    hidden_size,
    input_grad,
    launches_of,
    project,
    run_backward,
    run_forward,
)
from .layout import Layout, Links, Ragged, layout_of, links_of, with_slack, without_padding
from .loop import room_of, with_one_bias
from .recompute import backward_again
from .segments import backward_by_segment, takes


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


class Saved(NamedTuple):
    """What backward needs besides the arguments. P is H, but for a projection.

    What is not kept is None, or of the operator's results an empty tensor.
    """

    output: Tensor  # [R, D*P]
    gates: Tensor | None = None  # [L*D, R, S*H]; gx under config.onednn
    cs: Tensor | None = None  # [L*D, R, H]; not of a cell without c, nor under config.onednn
    hidden: Tensor | None = None  # [L-1, R, D*P], before dropout; not of one layer

    def layer_output(self, layer: int) -> Tensor:
        below = self.hidden
        return self.output if below is None or layer >= len(below) else below[layer]


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
    """Runs all layers, shapes as in ``transforms.rnn_stack``: output, h_n, c_n and what is saved.

    What is saved has room for a row for each step and sequence (R = T * B), or, of packed input,
    for each row of the input, however the rows are laid out: its shapes depend on no value.
    """
    P, L, D, H = h_0.shape[-1], config.num_layers, config.directions, hidden_size(h_0, c_0)
    layout = layout_of(input, h_0.shape[1], D, ragged, config.compact)
    h_0, c_0 = layout.sort(h_0), None if c_0 is None else layout.sort(c_0)
    h_n, c_n = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    tiles, grid, empty = config.spec.saved, input.shape[:-1], input.new_empty
    room = grid.numel()
    is_grid = layout.dense is None
    output = empty(*grid, D * P) if is_grid else layout.room(D * P, input)
    saved = Saved(
        output if is_grid else output[: layout.rows.total],
        gates=empty(L * D, room, tiles * H) if save and not config.recompute else None,
        cs=empty(L * D, room, H) if save and c_0 is not None and not config.onednn else None,
        hidden=empty(L - 1, room, D * P) if save and L > 1 else None,
    )
    work = saved
    if layout.dense is not None:
        work = Saved(saved.output, *_each(layout.part, saved[1:]))
    dropout_masks = [layout.take(mask) for mask in dropout_masks]
    # A parametrisation may hand out weights of any strides; the kernels read rows.
    grouped = group_weights([p.contiguous() for p in params], config)
    x = layout.take(input)
    every = h_0, c_0, h_n, c_n, work.gates, work.cs
    for layers, plan in launches_of(config, input, h_0, c_0, save, layout.is_ragged):
        of_h_0, of_c_0, of_h_n, of_c_n, gates, cs = _of_launch(every, layers, config)
        outs = [
            work.layer_output(layer) if save or layer == L - 1 else torch.empty_like(work.output)
            for layer in layers
        ]
        weights = [w for layer in layers for w in grouped[layer]]
        if plan is None:
            weights = [with_one_bias(config.cell, w) for w in weights]
            # The loop turns gx into gates where it lies: one buffer, and no copy.
            gx = gates
            if gx is None or not tiles:
                gx = _room_for_gx(outs[0], room_of(config.cell, H), D, not tiles)
            project(x, weights, config, gx[..., : config.spec.gates * H])
            x = gx
        elif not plan.i_blocks:
            x = project(x, grouped[layers[0]], config)
        elif x.stride(-1) != 1:  # the kernel takes any stride of T and B
            x = x.contiguous()
        run_forward(
            config,
            plan,
            x,
            weights,
            dropout_masks[layers[0] : layers[-1]],
            of_h_0,
            of_c_0,
            outs,
            of_h_n,
            of_c_n,
            gates,
            cs,
            layout,
        )
        if layers[-1] < L - 1:
            x = outs[-1].view_as(work.output)
            x = x * dropout_masks[layers[-1]] if dropout_masks else x
    if layout.dense is not None:
        saved = saved._replace(output=layout.give(output))
    c_n = None if c_n is None else layout.unsort(c_n)
    return saved.output, layout.unsort(h_n), c_n, saved


def _room_for_gx(out: Tensor, columns: int, D: int, turns_into_h: bool) -> Tensor:
    """``[D, R, columns]`` for the loop; the output itself, if gx turns into h where it lies."""
    rows = out.flatten(0, -2)
    if turns_into_h and rows.shape[1] == columns:
        return rows.unsqueeze(0)
    return rows.new_empty(D, len(rows), columns)


def _each(change: Callable[[Tensor], Tensor], tensors: Sequence[Tensor | None]) -> list[Any]:
    """What becomes of each; None stays None."""
    return [None if tensor is None else change(tensor) for tensor in tensors]


def _of_launch(tensors: Sequence[Tensor | None], layers: range, config: Config) -> Any:
    """Of tensors ``[L*D, ...]`` the parts ``[Z, ...]`` that a launch has."""
    if len(layers) == config.num_layers:
        return tensors
    D = config.directions
    rows = slice(layers[0] * D, (layers[-1] + 1) * D)
    return _each(lambda tensor: tensor[rows], tensors)


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
    groups: int,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    """Runs all layers backwards: d_input (None unless needed), d_h_0, d_c_0, and d_params or [].

    groups: 0 where no gradient of params is needed, 1 for the usual ones; more for those of so many
    equal groups of sequences, dense rows, each a tensor ``[groups, ...]``. With members it is 0 or
    their number.
    """
    D, H = config.directions, hidden_size(h_0, c_0)
    layout = layout_of(input, h_0.shape[1], D, ragged, config.compact)
    # A transform may have made views of them.
    saved = Saved(*_each(Tensor.contiguous, saved))
    if layout.dense is not None:
        saved = Saved(layout.take(saved.output), *_each(layout.part, saved[1:]))
    h_0, c_0 = layout.sort(h_0), None if c_0 is None else layout.sort(c_0)
    d_h_n, d_c_n = layout.sort(d_h_n), None if d_c_n is None else layout.sort(d_c_n)
    d_h_0, d_c_0 = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    d_cs = None if d_cs is None else layout.part(d_cs.contiguous())
    dropout_masks = [layout.take(mask) for mask in dropout_masks]
    by_segment = not config.recompute and takes(config, groups, h_0.shape[-1] != H)
    # The input is taken a segment at a time.
    x = (
        input
        if by_segment and layout.dense is not None
        else without_padding(layout.take(input), layout.rows)
    )
    d_params: list[Tensor] = []
    d_out = None if d_output is None else layout.take(d_output).contiguous()
    grouped = group_weights([p.contiguous() for p in params], config)
    has_links = (layout.is_ragged or h_0.shape[-1] != H) and not by_segment
    links = [links_of(layout.rows, d, input.device) for d in range(D * has_links)]
    cs = None if c_0 is None or config.onednn else saved.cs
    every = h_0, c_0, cs, d_cs, saved.gates, d_h_n, d_c_n, d_h_0, d_c_0
    for layers, plan in reversed(launches_of(config, input, h_0, c_0, True, layout.is_ragged)):
        own = _of_launch(every, layers, config)
        of_h_0, of_c_0, of_cs, of_d_cs, gates = own[:5]
        ends: tuple[Any, Any, Any, Any] = own[5:]
        left = Launched(
            [
                _layer_input(layer, x, saved, dropout_masks)
                if groups or config.recompute or by_segment
                else x
                for layer in layers
            ],
            [w for layer in layers for w in grouped[layer]],
            of_h_0,
            of_c_0,
            [saved.layer_output(layer) for layer in layers],
            of_cs,
            d_out,
            of_d_cs,
        )
        wanted = bool(layers[0]) or needs_input, groups
        if by_segment:
            d_out, found = backward_by_segment(
                config, left, gates, *ends, layout, wanted[0], bool(groups)
            )
        elif config.recompute:
            outs = [out.flatten(0, -2) for out in left.outs]
            rows = None if d_out is None else d_out.flatten(0, -2)
            left = left._replace(outs=outs, d_out=rows)
            d_out, found = backward_again(config, plan, left, *ends, layout, links, *wanted)
        else:
            masks = dropout_masks[layers[0] : layers[-1]]
            d_out, found = _backward(
                config, plan, left, gates, masks, *ends, layout, links, *wanted
            )
        d_params = found + d_params
        if dropout_masks and layers[0]:
            assert d_out is not None
            d_out = d_out * dropout_masks[layers[0] - 1].view_as(d_out)
    d_input = None
    if needs_input:
        assert d_out is not None
        d_input = layout.give(d_out).view(input.shape)
    d_c_0 = None if d_c_0 is None else layout.unsort(d_c_0)
    return d_input, layout.unsort(d_h_0), d_c_0, d_params


def _backward(
    config: Config,
    plan: Plan | None,
    left: Launched,
    gates: Tensor,
    masks: Sequence[Tensor],
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    d_h_0: Tensor,
    d_c_0: Tensor | None,
    layout: Layout,
    links: Sequence[Links],
    needs_input: bool,
    groups: int,
) -> tuple[Tensor | None, list[Tensor]]:
    """Runs the layers of a launch backwards from their saved gates ``[Z, R, S*H]``.

    Returns dx of the lowest, ``[R, I]``, and d_weights; the rest as of ``backward_again``.
    """
    D, L = config.directions, len(left.outs)
    shape = gates.shape[0], layout.rows.total, config.spec.grad_tiles * hidden_size(d_h_n, d_c_n)
    dgates = with_slack(gates, shape) if layout.rows.sizes is not None else gates.new_empty(*shape)
    known = run_backward(
        config, plan, left.d_out, left.d_cs, d_h_n, d_c_n, left.weights, masks, left.h_0, left.c_0,
        left.outs, gates, left.cs, dgates, d_h_0, d_c_0, layout,
    )  # fmt: skip
    d_params: list[Tensor] = []
    with gemm_precision(config.precision, gates):
        for n in range(L) if groups else ():
            own = slice(n * D, (n + 1) * D)
            d_params += layer_grads(
                config.spec, left.weights[own], [left.xs[n]] * D, left.h_0[own], left.outs[n],
                None if left.cs is None else left.cs[own], left.d_out, d_h_n[own], gates[own],
                dgates[own], links, layout.is_ragged, groups, None, known,
            )  # fmt: skip
        if not needs_input:
            return None, d_params
        d_x = input_grad(dgates[:D], left.weights[:D], config.members, d_h_n.shape[1])
        return d_x, d_params


def _layer_input(layer: int, x: Tensor, saved: Saved, dropout_masks: Sequence[Tensor]) -> Tensor:
    """What a layer was given: the input, or the outputs below after dropout."""
    if layer == 0:
        return x
    below = saved.layer_output(layer - 1)
    return below * dropout_masks[layer - 1].view_as(below) if dropout_masks else below
