"""Checks the arguments of a call and brings every form of input into one, time-major.

Wrong input raises the exception type of torch's own module, with one sentence that names the
argument, what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kernels.spec import SPECS
from .layout import pack, pack_nested, to_grid
from .records import Sequences, StackInputs
from .vmap import is_transformed


class Layers(NamedTuple):
    """The arrangement of layers, in the words of ``nn.LSTM``'s constructor."""

    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    recompute: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


class Facts(NamedTuple):
    """The facts about a call that the choice of a backend depends on; hashable."""

    cell: str  # a key of SPECS
    device: torch.device
    dtype: torch.dtype  # of the computation: under autocast, autocast's
    steps: int  # T
    batch: int  # B
    input_size: int  # I
    hidden_size: int  # H
    proj_size: int = 0
    layers: Layers = Layers()
    ragged: tuple[str, ...] = ()  # of "packed", "lengths" and "reset"
    needs_grad: bool = False
    autocast: torch.dtype | None = None
    compiled: bool = False  # being traced by torch.compile or torch.export
    transformed: bool = False  # inside vmap, grad, jvp, ... of torch.func
    single_step: bool = False  # a module like nn.LSTMCell
    states: bool = False  # the states of every step are wanted

    @property
    def recompute(self) -> bool:
        """True if backward computes the gates again; a transform may hide that there is one."""
        has_backward = self.needs_grad or self.transformed
        return self.layers.recompute and has_backward and SPECS[self.cell].saved > 0

    def __str__(self) -> str:
        parts = [
            f"{self.cell}{' cell' if self.single_step else ''} on {self.device}",
            str(self.dtype).removeprefix("torch."),
            f"T={self.steps} B={self.batch} I={self.input_size} H={self.hidden_size}",
            f"layers={self.layers.num_layers}, directions={self.layers.directions}",
        ]
        parts += [f"proj_size={self.proj_size}"] if self.proj_size else []
        parts += [*self.ragged, *(name for name in ("states", "recompute") if getattr(self, name))]
        return ", ".join([*parts, "with gradients" if self.needs_grad else "no gradients"])


class Call(NamedTuple):
    """A checked call, with its tensors in the form that all backends take."""

    facts: Facts
    input: Tensor  # [T, B, I], packed rows [R, I]
    states: tuple[Tensor, ...]  # [L*D, B, H] each
    params: Sequence[Tensor]
    batched: bool = True  # False: the results lose the batch dimension again
    sequences: Sequences = Sequences()
    packing: PackedSequence | None = None  # the packed input
    nested: tuple[Tensor, Tensor] | None = None  # its offsets [B + 1]; the packed row of each row
    unsort: Tensor | None = None  # [B], the place of each sequence among sorted ones
    places: Tensor | None = None  # [R], the place of each packed row in the padded input

    def compact(self) -> Call:
        """Packs padded input on the CPU, so that missing steps cost nothing; reads lengths."""
        lengths, reset = self.sequences[:2]
        T, B, by_sequence = self.facts.steps, self.facts.batch, self.facts.layers.batch_first
        assert lengths is not None
        starts = torch.arange(B, device="cpu") * (T if by_sequence else 1)
        packing = pack(lengths.cpu().clamp(0, T), T, starts, 1 if by_sequence else B)
        reset = None if reset is None else reset.cpu().index_select(1, packing.order)
        call = self._replace(places=packing.rows)
        return call._replace(
            input=call.gather(self.input),
            states=tuple(state.index_select(1, packing.order) for state in self.states),
            sequences=Sequences(None, reset, packing.batch_sizes),
            unsort=packing.order.argsort(),
        )

    def gather(self, grid: Tensor) -> Tensor:
        """Returns ``[T, B, ...]`` as the rows of the call."""
        if self.places is None:
            return grid
        grid = grid.transpose(0, 1) if self.facts.layers.batch_first else grid
        return grid.flatten(0, 1).index_select(0, self.places)

    def stack_inputs(self) -> StackInputs:
        """Returns the tensors in the dtype of the computation, with dropout's masks."""
        facts, params = self.facts, self.params
        input, h_0, *c_0 = tensors = self.input, *self.states
        if facts.autocast:
            # As cuDNN's path does: input, states and weights alike; fp64 is left alone.
            input, h_0, *c_0 = (_cast(t, facts.autocast) for t in tensors)
            params = [_cast(p, facts.autocast) for p in params]
            _check_alike(input, (h_0, *c_0), params)
        masks = dropout_masks(self) if facts.layers.dropout and facts.layers.training else []
        return StackInputs(input, h_0, c_0[0] if c_0 else None, params, masks)

    def in_form(self, rows: Tensor, in_place: bool = False) -> Any:
        """Returns ``[T, B, ...]``, or packed rows ``[R, ...]``, in the form of the input."""
        if self.nested is not None:
            offsets, index = self.nested
            return torch.nested.nested_tensor_from_jagged(rows.index_select(0, index), offsets)
        if self.packing is not None:
            return PackedSequence(rows, *self.packing[1:])
        by_sequence, shape = self.facts.layers.batch_first, (self.facts.steps, self.facts.batch)
        if self.places is not None:
            return to_grid(rows, self.places, *(shape[::-1] if by_sequence else shape))
        if not self.batched:
            return rows.squeeze(1)
        if not by_sequence:
            return rows
        return rows.transpose_(0, 1) if in_place else rows.transpose(0, 1)

    def states_in_form(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Returns states ``[L*D, B, H]`` in the order of the call's sequences."""
        if self.unsort is not None:
            return [s.index_select(1, self.unsort) for s in states]
        return list(states) if self.batched else [s.squeeze(1) for s in states]


def dropout_masks(call: Call) -> list[Tensor]:
    """Draws masks scaled by 1/(1-p), on the CPU bit for bit those of ``at::dropout``."""
    facts, layers = call.facts, call.facts.layers
    p, columns = layers.dropout, (facts.proj_size or facts.hidden_size) * layers.directions
    rows = call.input.shape[:-1] if call.places is None else (facts.steps, facts.batch)
    shape, count = (*rows, columns), layers.num_layers - 1
    masks = [call.input.new_zeros(shape, dtype=facts.dtype) for _ in range(count)]
    if p < 1:  # else at::dropout draws nothing, and 1/(1-p) is infinite
        masks = [mask.bernoulli_(1 - p).div_(1 - p) for mask in masks]
    return [call.gather(mask) for mask in masks]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if cast else tensor


class _Sizes(NamedTuple):
    """The sizes that the weights of the first layer have."""

    input_size: int
    hidden_size: int
    proj_size: int  # 0 without a projection
    columns: tuple[int, ...]  # of each state


#: What the checks of each kind of call have found: its facts, and the columns of its states.
_KNOWN: dict[tuple, tuple[Facts, tuple[int, ...]]] = {}


def prepare(
    cell: str,
    input: Tensor | PackedSequence,
    hx: Tensor | Sequence[Tensor] | None,
    params: Sequence[Tensor],
    layers: Layers,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> Call:
    """Checks the arguments of a stack and brings them into the one form that backends take.

    Checks of anything but values are made once for each kind of call, since they take as long as
    the smallest layers.
    """
    packing: PackedSequence | None = None
    nested: tuple[Tensor, Tensor] | None = None
    if isinstance(input, Tensor) and input.is_nested:
        input, nested = pack_nested(input)
    if isinstance(input, PackedSequence):
        packing, data, batched = input, input.data, True
        if lengths is not None or reset is not None:
            name = "reset" if lengths is None else "lengths"
            raise ValueError(f"{name} was given with an input that has lengths of its own")
        steps, batch = _check_packed(packing)
        sequences = Sequences(batch_sizes=packing.batch_sizes)
        ragged: tuple[str, ...] = ("packed",)
    else:
        batched = _ndim(input, (2, 3), " or a PackedSequence") == 3
        data = input if batched else input.unsqueeze(1)
        data = data.transpose(0, 1) if batched and layers.batch_first else data
        steps, batch = data.shape[:2]
        given = {"lengths": lengths, "reset": reset}
        sequences, ragged = _DENSE, tuple(name for name in given if given[name] is not None)
    states = () if hx is None else _as_tensors(hx, SPECS[cell].states, indexed=packing is None)
    facts, columns = _checked(cell, data, states, params, layers, (steps, batch, batched), ragged)
    if ragged and packing is None:
        sequences = Sequences(
            _checked_lengths(lengths, steps, batch if batched else None),
            _checked_reset(reset, steps, batch if batched else None, layers.batch_first),
        )
        if data.device.type != "cpu":  # once, for backward too, and without a wait
            of = (None if t is None else t.to(data.device, non_blocking=True) for t in sequences)
            sequences = Sequences(*of)
    rows = layers.num_layers * layers.directions
    if hx is None:
        states = _zeros(data, (rows, batch), columns)
    else:
        states = _fitted(states, (rows, batch) if batched else (rows,), columns)
        states = states if batched else tuple(s.unsqueeze(1) for s in states)
        if packing is not None and packing.sorted_indices is not None:
            states = tuple(s.index_select(1, packing.sorted_indices) for s in states)
    unsort = None if packing is None else packing.unsorted_indices
    return Call(facts, data, states, params, batched, sequences, packing, nested, unsort)


def prepare_cell(cell: str, input: Tensor, hx: Any, params: Sequence[Tensor]) -> Call:
    """Prepares a single step, ``input [B, I]`` or ``[I]``, as a stack with T = 1."""
    _ndim(input, (1, 2))
    if hx is not None:
        states = _as_tensors(hx, SPECS[cell].states, indexed=False)
        hx = as_hx([state.unsqueeze(0) for state in states])
    call = prepare(cell, input.unsqueeze(0), hx, params, Layers(bias=len(params) == 4))
    return call._replace(facts=call.facts._replace(single_step=True))


def _checked(
    cell: str, data: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], layers: Layers,
    dims: tuple[int, int, bool], ragged: tuple[str, ...],
) -> tuple[Facts, tuple[int, ...]]:  # fmt: skip
    """Returns the facts about a call and the columns of its states; checks a kind of call once."""
    tensors = data, *states, *params
    autocast, compiled, kind = _autocast_dtype(data), torch.compiler.is_compiling(), None
    if not compiled and torch._C._get_tracing_state() is None:
        with suppress(AttributeError, TypeError):  # not all are tensors: the checks name the one
            grads = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
            about = cell, layers, dims, ragged, autocast, grads, is_transformed(), len(states)
            kind = *about, *[(t.shape, t.dtype, t.device) for t in tensors]
            if known := _KNOWN.get(kind):
                return known
    if not 0 <= layers.dropout <= 1:
        raise ValueError(f"dropout is {layers.dropout}; expected a probability, 0 to 1")
    (steps, batch, _), sizes = dims, _sizes(cell, params, layers)
    if autocast is None and data.dtype != params[0].dtype:
        raise ValueError(
            f"input is {data.dtype}, the weights are {params[0].dtype}; convert one with .to()"
        )
    if data.shape[-1] != sizes.input_size:
        raise RuntimeError(
            f"input has {data.shape[-1]} features in its last dimension; expected input_size, "
            f"{sizes.input_size}"
        )
    if steps == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN: input has no time step (T = 0)"
        )
    _check_alike(data, states, params, check_dtype=autocast is None)
    needs_grad = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])  # noqa: C419
    # Autocast leaves fp64 alone, as everywhere in torch.
    dtype = data.dtype if autocast is None or data.dtype == torch.float64 else autocast
    facts = Facts(
        cell, data.device, dtype, steps, batch, *sizes[:3], layers, ragged, needs_grad, autocast,
        compiled, is_transformed(),
    )  # fmt: skip
    if kind is not None:
        if len(_KNOWN) >= 4096:
            _KNOWN.clear()
        _KNOWN[kind] = facts, sizes.columns
    return facts, sizes.columns


_DENSE = Sequences()


def _sizes(cell: str, params: Sequence[Tensor], layers: Layers) -> _Sizes:
    """Reads the sizes off the first layer's weights and checks the shapes of all."""
    spec, entries, base = SPECS[cell], layers.num_layers * layers.directions, 2 + 2 * layers.bias
    each = len(params) // entries
    projects = cell == "lstm" and each == base + 1
    if len(params) != (base + projects) * entries:
        hint = f"{base} for each layer and direction"
        hint += " (one more with a projection)" if cell == "lstm" else ""
        raise ValueError(f"params has {len(params)} tensors; expected {base * entries}, {hint}")
    shapes = [getattr(p, "shape", None) for p in params]
    first, last = shapes[0], shapes[each - 1]
    if not first or len(first) != 2 or first[0] % spec.gates or not first[0]:
        _refuse_weight(params, 0, each, layers, f"({spec.gates} * hidden_size, input_size)")
    H, P = first[0] // spec.gates, 0  # type: ignore[index]
    if projects:
        if not last or len(last) != 2:
            _refuse_weight(params, each - 1, each, layers, f"(proj_size, {H})")
        P = last[0]  # type: ignore[index]
    shapes_of = _weight_shapes.__wrapped__ if torch.compiler.is_compiling() else _weight_shapes
    expected, sizes = shapes_of(cell, layers.num_layers, layers.directions, base, first[1], H, P)  # type: ignore[index]
    if shapes != expected:
        wrong = next(i for i, shape in enumerate(shapes) if shape != expected[i])
        _refuse_weight(params, wrong, each, layers, str(expected[wrong]))
    return sizes


@lru_cache(maxsize=1024)
def _weight_shapes(
    cell: str, num_layers: int, directions: int, base: int, I: int, H: int, P: int
) -> tuple[list[tuple[int, ...]], _Sizes]:
    """Returns the shape of each weight, in torch's order, and the sizes."""
    spec = SPECS[cell]
    shapes: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        columns = I if layer == 0 else (P or H) * directions
        weights = (spec.gates * H, columns), (spec.gates * H, P or H)
        biases = [(spec.gates * H,)] * (base - 2)
        shapes += [*weights, *biases, *([(P, H)] if P else [])] * directions
    return shapes, _Sizes(I, H, P, (P or H, H)[: spec.states])


def _refuse_weight(params: Sequence[Any], i: int, each: int, layers: Layers, expected: str) -> None:
    """Raises the sentence for weight number i of a stack."""
    names = [*("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 2 + 2 * layers.bias], "weight_hr"]
    layer, d = divmod(i // each, layers.directions)
    name, weight = f"{names[i % each]}_l{layer}{'_reverse' * d}", params[i]
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} is a {type(weight).__name__}; expected a tensor {expected}")
    raise RuntimeError(f"{name} has shape {tuple(weight.shape)}; expected {expected}")


def _check_packed(packing: PackedSequence) -> tuple[int, int]:
    """Checks a PackedSequence; returns its T and B."""
    data, batch_sizes = packing.data, packing.batch_sizes
    if data.dim() != 2:
        raise RuntimeError(f"the packed input's data is {data.dim()}-D; expected 2-D")
    if not torch.compiler.is_compiling() and int(batch_sizes.sum()) != data.shape[0]:
        raise RuntimeError(
            f"the packed input has {data.shape[0]} rows; expected {int(batch_sizes.sum())}, the "
            "sum of its batch_sizes"
        )
    return len(batch_sizes), int(batch_sizes[0])


def _checked_lengths(lengths: Any, steps: int, batch: int | None) -> Tensor | None:
    """Returns lengths as a tensor ``[B]``; checks values only where no device waits for it."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Sequence) or isinstance(lengths, (str, bytes)):
            kind = type(lengths).__name__
            raise TypeError(f"lengths is a {kind}; expected a tensor or a list of integers")
        for i, length in enumerate(lengths):
            if isinstance(length, bool) or not hasattr(length, "__index__"):
                raise ValueError(f"lengths[{i}] is {length!r}; expected an integer")
        lengths = torch.tensor(lengths, dtype=torch.long, device="cpu")
    kind = lengths.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(f"lengths is {kind}; expected integers")
    if batch is None:
        raise ValueError("lengths was given with an input without a batch; cut the input instead")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected {(batch,)}")
    lengths = lengths.long()  # a narrow dtype may not hold T
    hidden = torch.compiler.is_compiling() or is_transformed()
    if lengths.device.type == "cpu" and batch and not hidden:
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0:
            raise ValueError(f"lengths has {low}; expected no negative number")
        if high > steps:
            raise ValueError(f"lengths has {high}; the input has {steps} steps")
    return lengths


def _checked_reset(reset: Any, steps: int, batch: int | None, batch_first: bool) -> Tensor | None:
    """Returns resets as bool ``[T, B]``."""
    if reset is None:
        return None
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else f"a {type(reset).__name__}"
        raise ValueError(f"reset is {kind}; expected a tensor of torch.bool")
    if batch is None:
        expected: tuple[int, ...] = (steps,)
    else:
        expected = (batch, steps) if batch_first else (steps, batch)
    if reset.shape != expected:
        raise ValueError(f"reset has shape {tuple(reset.shape)}; expected {expected}")
    if batch is None:
        return reset.unsqueeze(1)
    return reset.t() if batch_first else reset


def _ndim(input: Tensor, allowed: tuple[int, int], otherwise: str = "") -> int:
    """Returns the number of dimensions of the input, one of those allowed."""
    if not isinstance(input, Tensor):
        raise AttributeError(f"input is a {type(input).__name__}; expected a tensor{otherwise}")
    if input.dim() not in allowed:
        low, high = allowed
        raise ValueError(f"input is {input.dim()}-D; expected {low}-D or {high}-D{otherwise}")
    return input.dim()


def _as_tensors(hx: Any, count: int, *, indexed: bool) -> tuple[Tensor, ...]:
    """Returns the states in hx; torch's exception depends on whether it indexed hx first."""
    kind = type(hx).__name__
    if count == 1:
        if not isinstance(hx, Tensor):
            raise AttributeError(f"hx is a {kind}; expected a tensor, h_0")
        return (hx,)
    expected = "expected a tuple of two tensors, (h_0, c_0)"
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


def _zeros(data: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Returns initial states of zeros; they are only read, so equal ones are one tensor."""
    h_0 = data.new_zeros(*rows, columns[0])
    return h_0, *(h_0 if n == columns[0] else data.new_zeros(*rows, n) for n in columns[1:])


def _fitted(
    states: tuple[Tensor, ...], rows: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Returns states of shape ``(*rows, columns)``; ``[L*D, 1, H]`` is one for all sequences."""
    shapes = [(*rows, n) for n in columns]
    if [state.shape for state in states] == shapes:
        return states
    names, fitted = _hx_names(len(states)), []
    for name, state, shape in zip(names, states, shapes, strict=True):
        if len(rows) == 2 and state.shape == (shape[0], 1, shape[2]):
            state = state.expand(shape)
        if state.shape != shape:
            raise RuntimeError(f"{name} has shape {tuple(state.shape)}; expected {shape}")
        fitted.append(state)
    return tuple(fitted)


def _check_alike(
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


def _autocast_dtype(data: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast asks for on the input's device, or None."""
    kind = data.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def as_hx(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Returns states in the form of hx: a tensor, or for an LSTM a pair."""
    return states[0] if len(states) == 1 else (states[0], states[1])
