"""A stack of layers on real tensors, forward and backward: layers, directions and dropout.

The plan cuts the stack into launches of one layer each, or of several that run as a wavefront;
``layer.py`` runs each. Nothing in this file is differentiable; ``ops.py`` registers it with
autograd.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import layer
from .kernels.problem import KernelFailed, LaunchRefused, NoPlan, give_up
from .kernels.rows import Rows
from .kernels.tensors import Grads, Layers
from .layer import Kind, Launch, launches_of
from .records import StackConfig, StackGrads, StackInputs, StackOutputs


def _fail_safe(run: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``run`` answer where its kernels do not.

    A refused cooperative launch is planned again, since another process may own a part of the
    device. Where kernels fail that ``auto`` chose, the loop answers this call, and later ones are
    planned without them.
    """

    @wraps(run)
    def call(inputs: StackInputs, *arguments: Any, kind: Kind | None = None) -> Any:
        try:
            return run(inputs, *arguments, kind or Kind())
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

    return call


def shapes_of(inputs: StackInputs, config: StackConfig, save: bool) -> Sequence[Any]:
    """Returns the shapes of ``StackOutputs`` with, if it is to ``save``, what backward needs."""
    input, h_0, c_0, *_ = inputs
    rows, tiles, is_lstm = input.shape[:-1], config.spec.saved, c_0 is not None
    (Z, _, P), R, D = h_0.shape, math.prod(rows), config.directions
    H, below = P if c_0 is None else c_0.shape[-1], config.hidden_layers if save else 0
    keeps_gates = save and not (config.recompute and tiles)
    return (
        (*rows, D * P),
        tuple(h_0.shape),
        None if c_0 is None else tuple(c_0.shape),
        (Z, R, tiles * H) if keeps_gates else None,
        (Z, R, H) if save and is_lstm else None,
        (below, R, D * H) if below else None,
    )


def empty_outputs(like: Tensor, shapes: Sequence[Any]) -> StackOutputs:
    """Allocates the results of a stack."""
    empty = like.new_empty  # with a tuple for the shape it takes half as long again
    results: Any = [None if shape is None else empty(*shape) for shape in shapes]
    return StackOutputs(*results)


@_fail_safe
def forward(
    inputs: StackInputs, rows: Rows, config: StackConfig, save: bool, kind: Kind
) -> StackOutputs:  # fmt: skip
    """Runs all layers on what ``ready`` returns; with ``save`` keeps what backward needs."""
    x, h_0, _, _, masks = inputs
    if not kind.launches:
        kind.launches = launches_of(config, h_0, save, rows)
        kind.shapes = shapes_of(inputs, config, save)
    launches, results, L = kind.launches, empty_outputs(x, kind.shapes), config.num_layers
    outs = [_as_rows(results.output, launches, config)]
    if results.hidden is not None:
        outs = [*results.hidden, *outs]
    elif L > 1:  # two are enough if layers do not run together
        rooms = [torch.empty_like(outs[0]) for _ in range(2 if len(launches) == L else L)]
        outs = [rooms[n % len(rooms)] for n in range(L - 1)] + outs
    whole = _layers(inputs, results, outs[:L], config)
    for launch in launches:
        part = _part(whole, launch, config) if L > 1 else whole
        layer.forward(config, launch.plan, x, part, rows)
        end = launch.layers[-1]
        x = outs[end] * masks[end] if masks and end < L - 1 else outs[end]
    if len(outs) > L:
        outs[-1].copy_(x)
    return results


@_fail_safe
def backward(
    inputs: StackInputs, outputs: StackOutputs, grads: StackGrads, rows: Rows, config: StackConfig,
    needs_input: bool, needs_params: bool, kind: Kind,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Runs all layers backwards, from the inputs and the outputs of ``forward``.

    Returns:
        d_input or None, d_h_0, d_c_0 or None, and the gradients of the parameters or [].
    """
    input, h_0, c_0, _, masks = inputs
    L, launches = config.num_layers, kind.launches or launches_of(config, h_0, True, rows)
    outs = [] if outputs.hidden is None else list(outputs.hidden)
    if len(outs) < L:
        outs.append(_as_rows(outputs.output, launches, config))
    whole = _layers(inputs, outputs, outs, config)
    d_out: Any
    d_out, d_h_n, d_c_n, d_cs = aligned(config, grads)
    if d_out is not None:
        d_out = _as_rows(d_out, launches, config)
    if d_h_n is None or (d_c_n is None and c_0 is not None):
        zeros = h_0 if kind.zeros else torch.zeros_like(h_0)
        d_h_n = zeros if d_h_n is None else d_h_n
        d_c_n = zeros if d_c_n is None and c_0 is not None else d_c_n
    d_h_0 = h_0.new_empty(*h_0.shape)
    d_c_0 = None if c_0 is None else h_0.new_empty(*h_0.shape)
    whole_grads = Grads(d_out, d_cs, d_h_n, d_c_n, None, d_h_0, d_c_0)
    d_params: list[Tensor] = []
    for launch in reversed(launches):
        first, own = launch.layers[0], _part(whole_grads, launch, config)
        own = own if own.out is d_out else own._replace(out=d_out)
        xs = [outs[n - 1] * masks[n - 1] if masks else outs[n - 1] for n in launch.layers if n]
        d_out, found = layer.backward(
            config, launch.plan, xs if first else [input, *xs], _part(whole, launch, config), own,
            rows, bool(first) or needs_input, needs_params,
        )  # fmt: skip
        d_params = found + d_params
        if first and masks:
            d_out = d_out * masks[first - 1]
    return d_out.view(input.shape) if needs_input else None, d_h_0, d_c_0, d_params


def _layers(
    inputs: StackInputs, outputs: StackOutputs, outs: Sequence[Tensor], config: StackConfig
) -> Layers:
    """Returns the tensors of all layers as those of one launch."""
    _, h_0, c_0, (w_ih, w_hh, *biases), masks = inputs
    b_ih, b_hh = biases or (None, None)
    _, h_n, c_n, gates, cs, _ = outputs
    if config.bidirectional:
        outs, masks = ([t for t in of_layers for _ in range(2)] for of_layers in (outs, masks))
    of_inputs = (*masks[: len(outs) // config.num_layers], *masks) if masks else None
    states = h_0, c_0, h_n, c_n
    return Layers(None, w_ih, b_ih, w_hh, b_hh, of_inputs, *states, tuple(outs), gates, cs)


def ready(
    inputs: Sequence[Any], config: StackConfig, dtype: torch.dtype | None = None
) -> StackInputs:
    """Returns the fields of ``StackInputs``, in a dtype, as launches take them.

    params become a tuple of w_ih of all layers and directions, one of w_hh, and so on.
    """
    input, h_0, c_0, params, masks = inputs
    if dtype is not None:
        input, h_0, c_0, *params = _cast((input, h_0, c_0, *params), dtype)
    # The weights that a parametrisation computes may have any strides.
    h_0, c_0, *params = aligned(config, (h_0, c_0, *params))
    each = 4 if config.has_bias else 2
    entries = [params[first : first + each] for first in range(0, len(params), each)]
    masks = [mask.reshape(-1, mask.shape[-1]) for mask in masks] if masks else ()
    return StackInputs(input, h_0, c_0, tuple(zip(*entries, strict=True)), masks)


def _cast(tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Returns tensors or None in a dtype; one kernel fills all copies.

    They are not kept for the next call: a change through ``p.data`` would not be noticed.
    """
    others = [t for t in tensors if t is not None and t.dtype != dtype]
    copies = [torch.empty_like(t, dtype=dtype) for t in others]
    if copies:
        torch._foreach_copy_(copies, others)
    made = iter(copies)
    return [t if t is None or t.dtype == dtype else next(made) for t in tensors]


def _as_rows(output: Tensor, launches: Sequence[Launch], config: StackConfig) -> Tensor:
    """Returns ``[T, B, C]`` as rows ``[R, C]``, but where a kernel alone reads or writes it."""
    if config.num_layers == 1 and launches[0].plan is not None and not config.recompute:
        return output
    return output.reshape(-1, output.shape[-1])


def aligned(config: StackConfig, tensors: Sequence[Any]) -> list[Any]:
    """Returns tensors or None contiguous and, for kernels, aligned.

    A kernel would be compiled again for another pointer.
    """
    unit, found = 1 if config.is_loop else 16, list(tensors)
    for i, t in enumerate(tensors):
        if t is not None and (t.data_ptr() % unit or not t.is_contiguous()):
            found[i] = t.clone(memory_format=torch.contiguous_format)
    return found


def _part(tensors: Any, launch: Launch, config: StackConfig) -> Any:
    """Returns of the tensors of all layers, ``[L*D, ...]`` each, those of a launch."""
    if len(launch.layers) == config.num_layers:
        return tensors
    D = config.directions
    zs = slice(launch.layers[0] * D, (launch.layers[-1] + 1) * D)
    return tensors._make(None if t is None else t[zs] for t in tensors)
