"""A stack of layers on real tensors, forward and backward: layers, directions and dropout.

The plan cuts the stack into launches of one layer each, or of several that run as a wavefront;
``layer.py`` runs each. Nothing in this file is differentiable; ``ops.py`` registers it with
autograd.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import layer
from .kernels.problem import KernelFailed, LaunchRefused, NoPlan, give_up
from .kernels.rows import Rows
from .kernels.tensors import Grads, Layers, Weights
from .layer import Known, Launch, launches_of
from .records import StackConfig, StackGrads, StackInputs, StackOutputs

_Run = TypeVar("_Run", bound=Callable)


def _fail_safe(run: _Run) -> _Run:
    """Makes ``run`` answer where its kernels do not.

    A refused cooperative launch is planned again, since another process may own a part of the
    device. Where kernels fail that ``auto`` chose, the loop answers this call, and later ones are
    planned without them.
    """

    @wraps(run)
    def call(inputs: StackInputs, *arguments: Any, known: Known | None = None) -> Any:
        try:
            return run(inputs, *arguments, known or Known())
        except (LaunchRefused, NoPlan, KernelFailed) as error:
            cause = error
        config = next(a for a in arguments if isinstance(a, StackConfig))
        h_0, device, text = inputs.h_0, inputs.input.device, ""
        other = config._replace(backend="instead", precision="ieee")
        if isinstance(cause, LaunchRefused):
            give_up(device, "cooperative", f"{device} has refused a cooperative launch")
            other = config
            text = f"{device} refused a cooperative launch ({cause}); schedules that need none"
        elif config.backend != "auto":
            raise cause
        elif isinstance(cause, KernelFailed):  # else a program was compiled before they failed
            give_up(device, (config.cell, h_0.shape[-1], h_0.dtype), f"they failed: {cause}")
            text = (
                f"fusedrnn's kernels failed on {device} ({cause}); torch's operator or plain torch"
            )
        if text:
            warnings.warn(f"{text} will run such layers from now on", RuntimeWarning, stacklevel=3)
        return call(inputs, *(other if a is config else a for a in arguments))

    return cast(_Run, call)


def empty_outputs(inputs: StackInputs, config: StackConfig, save: bool) -> StackOutputs:
    """Allocates the results of a stack and, with ``save``, what backward needs."""
    input, h_0, c_0, *_ = inputs
    rows, empty, tiles = input.shape[:-1], input.new_empty, config.spec.saved
    (Z, _, P), R, D = h_0.shape, math.prod(rows), config.directions
    H, below = P if c_0 is None else c_0.shape[-1], config.hidden_layers if save else 0
    return StackOutputs(
        output=empty(*rows, D * P),
        h_n=empty(*h_0.shape),
        c_n=None if c_0 is None else empty(*c_0.shape),
        gates=empty(Z, R, tiles * H) if save and not (config.recompute and tiles) else None,
        cs=empty(Z, R, H) if save and c_0 is not None else None,
        hidden=empty(below, R, D * H) if below else None,
    )


@_fail_safe
def forward(
    inputs: StackInputs, rows: Rows, config: StackConfig, save: bool, known: Known
) -> StackOutputs:  # fmt: skip
    """Runs all layers; with ``save`` keeps what backward needs."""
    input, h_0, _, _, masks = inputs
    L, columns = config.num_layers, config.directions * h_0.shape[-1]
    known.launches = launches = known.launches or launches_of(config, h_0, save, rows)
    results = empty_outputs(inputs, config, save)
    outs = [_as_rows(results.output, config)]
    if results.hidden is not None:
        outs = [*results.hidden, *outs]
    elif L > 1:  # two are enough if layers do not run together
        rooms = [torch.empty_like(outs[0]) for _ in range(2 if len(launches) == L else L)]
        outs = [rooms[n % len(rooms)] for n in range(L - 1)] + outs
    masks = [mask.reshape(-1, columns) for mask in masks] if masks else []
    whole, x = _layers(inputs, results, outs[:L], masks, config), input
    for launch in launches:
        layer.forward(config, launch.plan, x, _part(whole, launch, config), rows)
        end = launch.layers[-1]
        x = outs[end] * masks[end] if masks and end < L - 1 else outs[end]
    if len(outs) > L:
        outs[-1].copy_(x)
    return results


@_fail_safe
def backward(
    inputs: StackInputs, outputs: StackOutputs, grads: StackGrads, rows: Rows, config: StackConfig,
    needs_input: bool, needs_params: bool, known: Known,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Runs all layers backwards.

    Returns:
        d_input or None, d_h_0, d_c_0 or None, and the gradients of the parameters or [].
    """
    input, h_0, c_0, _, masks = inputs
    L, columns = config.num_layers, config.directions * h_0.shape[-1]
    launches = known.launches or launches_of(config, h_0, True, rows)
    masks = [mask.reshape(-1, columns) for mask in masks] if masks else []
    outs = [] if outputs.hidden is None else list(outputs.hidden.contiguous())
    if len(outs) < L:
        outs.append(_ready(_as_rows(outputs.output, config)))
    whole = _layers(inputs, outputs, outs, masks, config)
    zeros = None
    if grads.h_n is None or (grads.c_n is None and c_0 is not None):
        zeros = whole.h_0 if known.starts_at_zero else torch.zeros_like(whole.h_0)
    d_out: Any = None if grads.output is None else _ready(_as_rows(grads.output, config))
    d_h_n = zeros if grads.h_n is None else _ready(grads.h_n)
    d_c_n = None if c_0 is None else zeros if grads.c_n is None else _ready(grads.c_n)
    d_h_0 = h_0.new_empty(*h_0.shape)
    d_c_0 = None if c_0 is None else h_0.new_empty(*h_0.shape)
    whole_grads = Grads(d_out, _ready(grads.cs), d_h_n, d_c_n, None, d_h_0, d_c_0)
    d_params: list[Tensor] = []
    for launch in reversed(launches):
        first, own = launch.layers[0], _part(whole_grads, launch, config)
        own = own if own.out is d_out else own._replace(out=d_out)
        xs = [outs[n - 1] * masks[n - 1] if masks else outs[n - 1] for n in launch.layers if n]
        xs = xs if first else [input, *xs]
        d_out, found = layer.backward(
            config, launch.plan, xs, _part(whole, launch, config), own, rows,
            bool(first) or needs_input, needs_params,
        )  # fmt: skip
        d_params = found + d_params
        if first and masks:
            d_out = d_out * masks[first - 1]
    d_input = d_out.view(input.shape) if needs_input else None
    return d_input, d_h_0, d_c_0, d_params


def _layers(
    inputs: StackInputs, outputs: StackOutputs, outs: Sequence[Tensor], masks: Sequence[Tensor],
    config: StackConfig,
) -> Layers:  # fmt: skip
    """Returns the tensors of all layers as those of one launch."""
    _, h_0, c_0, params, _ = inputs
    weights: Any = params if type(params) is Weights else weights_of(params, config)
    w_ih, w_hh, b_ih, b_hh, _ = weights
    (_, h_n, c_n, gates, cs, _), D = outputs, config.directions
    of_inputs = tuple([m for m in (masks[0], *masks) for _ in range(D)]) if masks else None
    outs = tuple(outs) if D == 1 else tuple([out for out in outs for _ in range(D)])
    return Layers(
        None, w_ih, b_ih, w_hh, b_hh, of_inputs, _ready(h_0), _ready(c_0), h_n, c_n, outs,
        _ready(gates), _ready(cs),
    )  # fmt: skip


def weights_of(params: Sequence[Tensor], config: StackConfig) -> Any:
    """Returns the flat parameters as tuples of each kind, as a launch takes them."""
    # The weights that a parametrisation computes may have any strides.
    ready: Any = tuple([_ready(p) for p in params])
    if config.has_bias:
        return Weights(ready[::4], ready[1::4], ready[2::4], ready[3::4])
    return Weights(ready[::2], ready[1::2], None, None)


def _as_rows(output: Tensor, config: StackConfig) -> Tensor:
    """Returns ``[T, B, C]`` as rows ``[R, C]``, but where a kernel alone reads or writes it."""
    if config.num_layers == 1 and not (config.is_loop or config.recompute):
        return output
    return output.reshape(-1, output.shape[-1])


def _ready(tensor: Any) -> Any:
    """Returns a tensor or None contiguous and aligned, else kernels would be compiled for it."""
    if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _part(tensors: Any, launch: Launch, config: StackConfig) -> Any:
    """Returns of the tensors of all layers, ``[L*D, ...]`` each, those of a launch."""
    if len(launch.layers) == config.num_layers:
        return tensors
    D = config.directions
    zs = slice(launch.layers[0] * D, (launch.layers[-1] + 1) * D)
    return tensors._make(None if t is None else t[zs] for t in tensors)
