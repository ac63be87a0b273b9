"""A stack of layers on real tensors, forward and backward: layers, directions and dropout.

The plan cuts the stack into launches of one layer each, or of several that run as a wavefront;
``layer.py`` runs each. Nothing in this file is differentiable; ``ops.py`` registers it with
autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from . import layer
from .kernels.plan import KernelFailed, LaunchRefused, NoPlan, give_up, refuse_cooperation
from .kernels.tensors import Grads, Layers
from .layer import Launch, StackConfig, group_weights, launches_of
from .layout import Layout, Sequences, layout_of, without_padding

_Run = TypeVar("_Run", bound=Callable)

__all__ = ["StackConfig", "StackGrads", "StackInputs", "StackOutputs", "backward", "forward"]


class StackInputs(NamedTuple):
    """The tensors that a stack is called with."""

    input: Tensor  # [T, B, I] of any strides, packed [R, I]
    h_0: Tensor  # [L*D, B, H]
    c_0: Tensor | None  # [L*D, B, H], None for a cell without c
    params: Sequence[Tensor]  # in torch's order
    dropout_masks: Sequence[Tensor]  # empty, or of each layer but the last [T, B, D*H], scaled


class StackOutputs(NamedTuple):
    """The results of a stack, and what backward needs beside the inputs; None if it is not kept.

    The shapes depend on no value: buffers have a row for each step and sequence (R = T * B, or as
    many as packed input has), of which lengths may leave the last unused.
    """

    output: Tensor  # [T, B, D*H], packed [R, D*H]
    h_n: Tensor  # [L*D, B, H]
    c_n: Tensor | None
    gates: Tensor | None = None  # [L*D, R, S*H]
    cs: Tensor | None = None  # [L*D, R, H], c of every step
    hidden: Tensor | None = None  # [``config.hidden_layers``, R, D*H], before dropout


class StackGrads(NamedTuple):
    """The gradients that reach the results of a stack; None where there are none."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cs: Tensor | None


def _fail_safe(run: _Run) -> _Run:
    """Makes ``run`` answer where its kernels do not.

    After a refused cooperative launch it plans again without those: the plan allows for the whole
    device, and under MPS or in a green context there is less of it. If ``auto`` chose the kernels
    and they fail, the loop answers this call, and later ones are planned without them.
    """

    @wraps(run)
    def call(inputs: StackInputs, *arguments: Any) -> Any:
        config = next(a for a in arguments if isinstance(a, StackConfig))
        h_0, device = inputs.h_0, inputs.input.device
        try:
            return run(inputs, *arguments)
        except LaunchRefused as refusal:
            refuse_cooperation(device)
            _warn(
                f"{device} refused a cooperative launch ({refusal}); from now on fusedrnn uses "
                "the schedules that need none"
            )
            return call(inputs, *arguments)
        except NoPlan:  # of a program that was compiled before the kernels failed
            if config.backend != "auto":
                raise
        except KernelFailed as cause:
            if config.backend != "auto":
                raise KernelFailed(f"the kernels failed on {device}: {cause}") from cause
            give_up(device, config.cell, h_0.shape[-1], h_0.dtype, f"they failed: {cause}")
            _warn(
                f"fusedrnn's kernels failed on {device} ({cause}); from now on torch's operator, "
                "or plain torch where that cannot, runs such layers"
            )
        other = config._replace(backend="instead", precision="ieee")
        return run(inputs, *(other if a is config else a for a in arguments))

    return cast(_Run, call)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@_fail_safe
def forward(
    inputs: StackInputs, sequences: Sequences, config: StackConfig, save: bool
) -> StackOutputs:
    """Runs all layers; with ``save`` keeps what backward needs."""
    input, L, D, H = inputs.input, config.num_layers, config.directions, inputs.h_0.shape[-1]
    layout = layout_of(input, inputs.h_0.shape[1], D, sequences, config.compact)
    rows, grid, empty, tiles = layout.rows, input.shape[:-1], input.new_empty, config.spec.saved
    h_0, c_0 = layout.sort_states(inputs.h_0), _each(layout.sort_states, inputs.c_0)
    room, below = grid.numel(), config.hidden_layers if save else 0
    saved = StackOutputs(
        output=empty(*grid, D * H),
        h_n=torch.empty_like(h_0),
        c_n=_each(torch.empty_like, c_0),
        gates=empty(L * D, room, tiles * H) if save and not (config.recompute and tiles) else None,
        cs=empty(L * D, room, H) if save and c_0 is not None else None,
        hidden=empty(below, room, D * H) if below else None,
    )
    masks = [layout.to_rows(mask).reshape(-1, D * H) for mask in inputs.dropout_masks]
    whole = _layers(inputs.params, masks, h_0, c_0, saved, layout, config)
    x, hidden = layout.to_rows(input), _each(layout.trim, saved.hidden)
    last = saved.output.view(-1, D * H)  # the rows of the last layer
    if below == L:
        last = hidden[-1]
    elif layout.row_index is not None:
        last = layout.empty_rows(D * H, input)
    last_rows = last[: rows.total]
    for launch in launches_of(config, h_0, save, rows):
        outs = [
            hidden[n] if n < below else last_rows if n == L - 1 else torch.empty_like(last_rows)
            for n in launch.layers
        ]
        layers = _part(whole, launch, config)
        layers = layers._replace(out=tuple(out for out in outs for _ in range(D)))
        layer.forward(config, launch.plan, x, layers, rows)
        x = outs[-1]
        if masks and launch.layers[-1] < L - 1:
            x = x * masks[launch.layers[-1]]
    if layout.row_index is not None:
        layout.to_grid(last, out=saved.output)
    elif below == L:
        saved.output.copy_(last.view_as(saved.output))
    return saved._replace(
        h_n=layout.unsort_states(saved.h_n),
        c_n=_each(layout.unsort_states, saved.c_n),
    )


@_fail_safe
def backward(
    inputs: StackInputs,
    outputs: StackOutputs,
    grads: StackGrads,
    sequences: Sequences,
    config: StackConfig,
    needs_input: bool,
    needs_params: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    """Runs all layers backwards.

    Returns:
        d_input or None unless it is needed, d_h_0, d_c_0 or None, and the gradients of the
        parameters or an empty list.
    """
    input, L, D, H = inputs.input, config.num_layers, config.directions, inputs.h_0.shape[-1]
    layout = layout_of(input, inputs.h_0.shape[1], D, sequences, config.compact)
    rows = layout.rows
    h_0, c_0 = layout.sort_states(inputs.h_0), _each(layout.sort_states, inputs.c_0)
    masks = [layout.to_rows(mask).reshape(-1, D * H) for mask in inputs.dropout_masks]
    hidden: list[Tensor] = [] if outputs.hidden is None else list(layout.trim(outputs.hidden))
    if len(hidden) < L:
        hidden.append(layout.to_rows(outputs.output).reshape(-1, D * H))
    whole = _layers(inputs.params, masks, h_0, c_0, outputs, layout, config)
    whole = whole._replace(out=tuple(out for out in hidden for _ in range(D)))
    whole_grads = Grads(
        cs=_each(layout.trim, grads.cs),
        h_n=torch.zeros_like(h_0) if grads.h_n is None else layout.sort_states(grads.h_n),
        c_n=_each(torch.zeros_like, c_0) if grads.c_n is None else layout.sort_states(grads.c_n),
        h_0=torch.empty_like(h_0),
        c_0=_each(torch.empty_like, c_0),
    )  # fmt: skip
    x = without_padding(layout.to_rows(input), rows)
    d_out: Any = None
    if grads.output is not None:
        d_out = layout.to_rows(grads.output).reshape(-1, D * H).contiguous()
    d_params: list[Tensor] = []
    for launch in reversed(launches_of(config, h_0, True, rows)):
        first = launch.layers[0]
        below = [(hidden[n - 1], masks[n - 1] if masks else None) for n in launch.layers if n]
        xs = [h if mask is None else h * mask for h, mask in below]
        xs = xs if first else [x, *xs]
        d_out, found = layer.backward(
            config, launch.plan, xs, _part(whole, launch, config),
            _part(whole_grads, launch, config)._replace(out=d_out), rows,
            bool(first) or needs_input, needs_params,
        )  # fmt: skip
        d_params = found + d_params
        if first and masks:
            d_out = d_out * masks[first - 1]
    d_input = layout.to_grid(d_out).view(input.shape) if needs_input else None
    d_h_0 = layout.unsort_states(whole_grads.h_0)
    return d_input, d_h_0, _each(layout.unsort_states, whole_grads.c_0), d_params


def _each(change: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Any:
    """Returns ``change(tensor)``, None for None."""
    return None if tensor is None else change(tensor)


def _layers(
    params: Sequence[Tensor],
    masks: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    outputs: StackOutputs,
    layout: Layout,
    config: StackConfig,
) -> Layers:
    """Returns the tensors of all layers as those of one launch, without outputs."""
    # The weights that a parametrisation computes may have any strides.
    groups = group_weights([p.contiguous() for p in params], config)
    w_ih, w_hh, b_ih, b_hh, _ = zip(*(w for group in groups for w in group), strict=True)
    each = [*masks[:1], *masks]
    return Layers(
        w_ih=w_ih,
        b_ih=b_ih if config.has_bias else None,
        w_hh=w_hh,
        b_hh=b_hh if config.has_bias else None,
        masks=tuple(mask for mask in each for _ in range(config.directions)) if masks else None,
        h_0=h_0,
        c_0=c_0,
        h_n=outputs.h_n,
        c_n=outputs.c_n,
        gates=_each(layout.trim, outputs.gates),
        cs=_each(layout.trim, outputs.cs),
    )


def _part(tensors: Any, launch: Launch, config: StackConfig) -> Any:
    """Returns of the tensors of all layers, ``[L*D, ...]`` each, those of a launch."""
    if len(launch.layers) == config.num_layers:
        return tensors
    D = config.directions
    zs = slice(launch.layers[0] * D, (launch.layers[-1] + 1) * D)
    return tensors._make(None if t is None else t[zs] for t in tensors)
