"""Checks the arguments of a call and brings every form of input into one, time-major.

What is wrong gets one sentence that names the argument, what came and what was expected, in the
exception type that torch's own module raises. Axes: T time, B batch, I input size, H hidden size,
L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .dispatch import Request
from .kernels.spec import SPECS
from .layout import Ragged
from .transforms import is_transformed


class Layers(NamedTuple):
    """How layers are stacked, in the words of ``nn.LSTM``'s constructor."""

    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    recompute: bool = False
    #: The input is ``x W_ih^T`` of the first layer already, ``[T, B, D*G*H]``, and that layer's
    #: weight_ih is ``[G*H, 0]``.
    projected: bool = False


class Call(NamedTuple):
    """A checked call: what dispatch decides on, and the tensors in the form all backends take."""

    request: Request
    layers: Layers
    input: Tensor  # [T, B, I]; a PackedSequence's data [sum of lengths, I]; for a cell [B, I]
    states: tuple[Tensor, ...]  # [L*D, B, H] each; for a cell [B, H]
    params: Sequence[Tensor]
    batched: bool  # else the results lose the batch dimension again
    ragged: Ragged = Ragged()
    packing: PackedSequence | None = None  # the packed input
    jagged: Jagged | None = None  # or the nested one, which was packed


class Jagged(NamedTuple):
    """What a nested tensor of layout ``torch.jagged`` becomes when it is packed, and the way back.

    Its values ``[R, I]`` stand sequence by sequence, and step by step when packed.
    """

    offsets: Tensor  # [B + 1]
    packed: Tensor  # [R]: of each packed row the row of the values
    values: Tensor  # [R]: the way back


def prepare(
    cell: str,
    input: Tensor | PackedSequence,
    hx: Tensor | Sequence[Tensor] | None,
    params: Sequence[Tensor],
    layers: Layers,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> Call:
    """Checks the arguments of a stack and brings them into the one form that backends take."""
    if not 0 <= layers.dropout <= 1:
        raise ValueError(f"dropout is {layers.dropout}; expected a probability, 0 to 1")
    directions = 2 if layers.bidirectional else 1
    sizes = _sizes(cell, params, layers)
    if layers.projected:
        sizes = sizes._replace(input_size=directions * len(params[0]))
    jagged = None
    if isinstance(input, Tensor) and input.is_nested:
        input, jagged = _packed_from_jagged(input)
    packing = input if isinstance(input, PackedSequence) else None
    if isinstance(input, PackedSequence):
        for name, value in (("lengths", lengths), ("reset", reset)):
            if value is not None:
                raise ValueError(f"{name} was given with an input that has lengths of its own")
        data, batched = input.data, True
        if data.dim() != 2:
            raise RuntimeError(f"the packed input's data is {data.dim()}-D; expected 2-D")
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
    else:
        batched = _ndim(input, (2, 3), "a PackedSequence") == 3
        data = input if batched else input.unsqueeze(1)
        data = data.transpose(0, 1) if batched and layers.batch_first else data
        steps, batch = data.shape[:2]
    autocast = _autocast_dtype(data)
    if autocast is None and data.dtype != params[0].dtype:
        raise ValueError(
            f"input is {data.dtype}, the weights are {params[0].dtype}; convert one with .to()"
        )
    _check_features(data, sizes.input_size)
    if steps == 0:
        raise RuntimeError("input has no time step (T = 0); expected at least one")
    ragged = Ragged(
        _checked_lengths(lengths, steps, batch, batched),
        _checked_reset(reset, steps, batch, batched, layers.batch_first),
        None if packing is None else packing.batch_sizes,
    )

    rows = layers.num_layers * directions
    if hx is None:
        states = tuple(data.new_zeros(rows, batch, size) for size in sizes.states)
    else:
        states = _as_tensors(hx, len(sizes.states), indexed=packing is None)
        middle = (batch,) if batched else ()
        shapes = [(rows, *middle, size) for size in sizes.states]
        if batched:  # one state for all sequences
            states = tuple(map(_spread, states, shapes))
        _check_shapes(states, shapes)
        if not batched:
            states = tuple(s.unsqueeze(1) for s in states)
    check_alike(data, states, params, check_dtype=autocast is None)
    if hx is not None and packing is not None and packing.sorted_indices is not None:
        states = tuple(s.index_select(1, packing.sorted_indices) for s in states)
    needs_grad, transformed = _needs_grad(data, states, params), is_transformed()
    request = Request(
        cell=cell,
        device=data.device,
        dtype=_compute_dtype(data, autocast),
        steps=steps,
        batch=batch,
        input_size=sizes.input_size,
        hidden_size=sizes.hidden_size,
        proj_size=sizes.proj_size,
        num_layers=layers.num_layers,
        directions=directions,
        packed=packing is not None,
        lengths=ragged.lengths is not None,
        reset=ragged.reset is not None,
        needs_grad=needs_grad,
        autocast=autocast,
        dropout=layers.training and layers.dropout > 0 and layers.num_layers > 1,
        compiled=torch.compiler.is_compiling(),
        transformed=transformed,
        projected=layers.projected,
        needs_input_grad=needs_grad and data.requires_grad,
        # A transform may hide that something requires a gradient; some cells save no gates.
        recompute=layers.recompute and (needs_grad or transformed) and SPECS[cell].saved > 0,
    )
    return Call(request, layers, data, states, params, batched, ragged, packing, jagged)


def prepare_cell(
    cell: str,
    input: Tensor,
    hx: Tensor | Sequence[Tensor] | None,
    params: Sequence[Tensor],
) -> Call:
    """Checks the arguments of a single step, ``input [B, I]`` or ``[I]``."""
    layers = Layers(bias=len(params) == 4)
    sizes = _sizes(cell, params, layers)
    batched = _ndim(input, (1, 2)) == 2
    data = input if batched else input.unsqueeze(0)
    _check_features(data, sizes.input_size)
    if hx is None:
        states = tuple(data.new_zeros(len(data), size) for size in sizes.states)
    else:
        states = _as_tensors(hx, len(sizes.states), indexed=False)
        for name, state in zip(_hx_names(len(states)), states, strict=True):
            if state.dim() not in (1, 2):
                raise ValueError(f"{name} is {state.dim()}-D; expected 1-D or 2-D")
        middle = (len(data),) if batched else ()
        _check_shapes(states, [(*middle, size) for size in sizes.states])
        if not batched:
            states = tuple(s.unsqueeze(0) for s in states)
    autocast = _autocast_dtype(data)
    check_alike(data, states, params, check_dtype=autocast is None)
    request = Request(
        cell=cell,
        device=data.device,
        dtype=_compute_dtype(data, autocast),
        steps=1,
        batch=len(data),
        input_size=sizes.input_size,
        hidden_size=sizes.hidden_size,
        needs_grad=_needs_grad(data, states, params),
        autocast=autocast,
        single_step=True,
        compiled=torch.compiler.is_compiling(),
        transformed=is_transformed(),
    )
    return Call(request, layers, data, states, params, batched)


def _packed_from_jagged(input: Tensor) -> tuple[PackedSequence, Jagged]:
    """A nested tensor as a PackedSequence; reads its lengths, for which a GPU is waited for."""
    if input.layout != torch.jagged:
        raise ValueError(
            f"input is a nested tensor of layout {input.layout}; expected torch.jagged"
        )
    nested: Any = input
    values, offsets = nested.values(), nested.offsets()
    if values.dim() != 2 or nested.lengths() is not None or nested._ragged_idx != 1:
        raise ValueError("input is a nested tensor with holes or of other than [B, jagged, I]")
    starts = offsets.cpu()
    lengths, order = starts.diff().sort(descending=True, stable=True)
    if not len(lengths) or not lengths[-1]:
        raise ValueError("input is a nested tensor with an empty sequence; expected none")
    there = torch.arange(int(lengths[0])).unsqueeze(1) < lengths  # [T, B]
    rows = (starts[:-1][order] + torch.arange(len(there)).unsqueeze(1))[there].to(values.device)
    back = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    order = order.to(values.device)
    packed = PackedSequence(values.index_select(0, rows), there.sum(1), order, order.argsort())
    return packed, Jagged(offsets, rows, back)


def _checked_lengths(
    lengths: Tensor | Sequence[int] | None, steps: int, batch: int, batched: bool
) -> Tensor | None:
    """Lengths as a tensor ``[B]``. Its values are looked at only where that waits for no device."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.long)
    kind = lengths.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(f"lengths is {kind}; expected integers")
    if not batched:
        raise ValueError("lengths was given with an input without a batch; cut the input instead")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected {(batch,)}")
    lengths = lengths.long()  # of a narrow dtype T might be no number
    hidden = torch.compiler.is_compiling() or is_transformed()
    if lengths.device.type == "cpu" and batch and not hidden:
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0:
            raise ValueError(f"lengths has {low}; expected no negative number")
        if high > steps:
            raise ValueError(f"lengths has {high}; the input has {steps} steps")
    return lengths


def _checked_reset(
    reset: Tensor | None, steps: int, batch: int, batched: bool, batch_first: bool
) -> Tensor | None:
    """Resets as bool ``[T, B]``."""
    if reset is None:
        return None
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else f"a {type(reset).__name__}"
        raise ValueError(f"reset is {kind}; expected a tensor of torch.bool")
    shape = (batch, steps) if batch_first else (steps, batch)
    expected: tuple[int, ...] = shape if batched else (steps,)
    if reset.shape != expected:
        raise ValueError(f"reset has shape {tuple(reset.shape)}; expected {expected}")
    if not batched:
        return reset.unsqueeze(1)
    return reset.t() if batch_first else reset


def _spread(state: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A state given once ``[L*D, 1, H]`` for all sequences; what does not fit stays as it is."""
    fits = state.dim() == 3 and state.shape == (shape[0], 1, shape[2])
    return state.expand(shape) if fits else state


class _Sizes(NamedTuple):
    input_size: int
    hidden_size: int
    proj_size: int  # 0 without a projection
    states: tuple[int, ...]  # the columns of each state


def _sizes(cell: str, params: Sequence[Tensor], layers: Layers) -> _Sizes:
    """Reads the sizes off the first layer's weights and checks how many tensors there are."""
    spec = SPECS[cell]
    if len(params) < 2:
        raise ValueError(f"params has {len(params)} tensors; expected at least two weights")
    hidden_size, columns = params[0].shape[0] // spec.gates, params[1].shape[1]
    proj_size = columns if cell == "lstm" and columns != hidden_size else 0
    each = (4 if layers.bias else 2) + (proj_size > 0)
    expected = each * layers.num_layers * (2 if layers.bidirectional else 1)
    if len(params) != expected:
        raise ValueError(
            f"params has {len(params)} tensors; expected {expected}, {each} for each layer and "
            "direction"
        )
    states = (proj_size or hidden_size, hidden_size)[: spec.states]
    return _Sizes(params[0].shape[1], hidden_size, proj_size, states)


def _ndim(input: Tensor, allowed: tuple[int, int], otherwise: str = "") -> int:
    """The input's ndim, checked."""
    hint = f" or {otherwise}" if otherwise else ""
    if not isinstance(input, Tensor):
        raise AttributeError(f"input is a {type(input).__name__}; expected a tensor{hint}")
    if input.dim() not in allowed:
        low, high = allowed
        raise ValueError(f"input is {input.dim()}-D; expected {low}-D or {high}-D{hint}")
    return input.dim()


def _check_features(data: Tensor, input_size: int) -> None:
    if data.shape[-1] != input_size:
        raise RuntimeError(
            f"input has {data.shape[-1]} features in its last dimension; expected input_size, "
            f"{input_size}"
        )


def _as_tensors(hx: object, count: int, *, indexed: bool) -> tuple[Tensor, ...]:
    """The states in hx. If ``indexed``, torch indexes hx before its operator sees it: hence the
    different exceptions, which are torch's."""
    if count == 1:
        if not isinstance(hx, Tensor):
            raise AttributeError(f"hx is a {type(hx).__name__}; expected a tensor, h_0")
        return (hx,)
    kind, expected = type(hx).__name__, "expected a tuple of two tensors, (h_0, c_0)"
    if isinstance(hx, Tensor):
        raise (RuntimeError if indexed else TypeError)(f"hx is a tensor; {expected}")
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx is a {kind}; {expected}")
    if len(hx) != count:
        error = IndexError if indexed and len(hx) < count else RuntimeError
        raise error(f"hx is a {kind} of {len(hx)}; {expected}")
    for i, state in enumerate(hx):
        if not isinstance(state, Tensor):
            raise AttributeError(f"hx[{i}] is a {type(state).__name__}; {expected}")
    return tuple(hx)


def _hx_names(count: int) -> tuple[str, ...]:
    return ("hx",) if count == 1 else ("hx[0]", "hx[1]")


def _check_shapes(states: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    for name, state, shape in zip(_hx_names(len(states)), states, shapes, strict=True):
        if state.shape != shape:
            raise RuntimeError(f"{name} has shape {tuple(state.shape)}; expected {shape}")


def check_alike(
    data: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], *, check_dtype: bool = True
) -> None:
    """Demands one device and, without autocast, one dtype of all tensors."""
    device, dtype = data.device, data.dtype
    for i, tensor in enumerate((*states, *params)):
        if tensor.device == device and (tensor.dtype == dtype or not check_dtype):
            continue
        name = _hx_names(len(states))[i] if i < len(states) else f"params[{i - len(states)}]"
        if tensor.device != device:
            raise RuntimeError(f"{name} is on {tensor.device}; expected {device}, the input's")
        raise RuntimeError(f"{name} is {tensor.dtype}; expected {dtype}, the input's")


def _needs_grad(data: Tensor, states: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (data, *states, *params))


def _autocast_dtype(data: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on the input's device, or None."""
    kind = data.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _compute_dtype(data: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """Autocast leaves fp64 alone, here as everywhere in torch."""
    return data.dtype if autocast is None or data.dtype == torch.float64 else autocast


def as_hx(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    return states[0] if len(states) == 1 else (states[0], states[1])
