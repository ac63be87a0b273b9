"""Checks the arguments of a call and brings every form of input into one, time-major.

Wrong input raises the exception type of torch's own module, with one sentence that names the
argument, what came and what was expected.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import dispatch
from .kernels.problem import CACHES
from .kernels.rows import Rows
from .kernels.spec import SPECS
from .layer import Kind
from .layout import pack, pack_nested, to_grid
from .records import Facts, Layers, Sequences, StackInputs
from .vmap import is_eager, is_transformed

_SIZES = attrgetter("shape", "dtype", "device")
_NO_SEQUENCES = Sequences()
#: The record of each kind of call by ``key_of``.
KINDS: dict[tuple, Kind] = {}


def _forget() -> None:
    for kind in KINDS.values():
        kind.launches = ()  # a graph may hold it until its backward
    KINDS.clear()


CACHES.append(_forget)


def key_of(
    cell: str, input: Any, hx: Any, params: Sequence[Tensor], layers: tuple, form: tuple = ()
) -> tuple | None:
    """Returns a key of everything but values that the checks and the choice of a call depend on.

    It is None if a compiler or a transform hides the values, and if an argument is not a tensor.
    ``form`` is () for dense input.
    """
    if not is_eager(input):
        return None
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
    try:
        tensors = input, *states, *params
        is_recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
        autocast = torch._C._is_any_autocast_enabled() and autocast_dtype(input)
        modes = is_recorded, autocast, forward_ad._current_level, dispatch.switches(input.is_cuda)
        return cell, layers, form, type(hx), modes, *map(_SIZES, tensors)
    except (AttributeError, RuntimeError, TypeError):
        return None


class Call(NamedTuple):
    """A checked call, with its tensors in the form that all backends take."""

    facts: Facts
    input: Tensor  # [T, B, I], packed rows [R, I]
    states: Sequence[Tensor]  # [L*D, B, H] each
    params: Sequence[Tensor]
    batched: bool = True  # False: the results lose the batch dimension again
    sequences: Sequences = Sequences()
    packing: PackedSequence | None = None  # the packed input
    nested: tuple[Tensor, Tensor] | None = None  # its offsets [B + 1]; the packed row of each row
    unsort: Tensor | None = None  # [B], the place of each sequence among sorted ones
    kind: Kind | None = None  # its record, if nothing but autograd has to see the call
    places: Tensor | None = None  # [R], the place of each packed row in the padded input

    def stack_inputs(self) -> StackInputs:
        """Returns the tensors before a cast, with dropout's masks, scaled by 1/(1-p).

        On the CPU the masks are bit for bit those of ``at::dropout``.
        """
        facts, states, masks = self.facts, self.states, []
        p = facts.layers.dropout
        if p and facts.drops_out:
            columns = facts.columns[0] * facts.layers.directions
            shape, count = (*self.input.shape[:-1], columns), facts.layers.num_layers - 1
            masks = [self.input.new_zeros(shape, dtype=facts.dtype) for _ in range(count)]
            if p < 1:  # else at::dropout draws nothing, and 1/(1-p) is infinite
                masks = [mask.bernoulli_(1 - p).div_(1 - p) for mask in masks]
        c_0 = states[1] if len(states) > 1 else None
        return StackInputs(self.input, states[0], c_0, self.params, masks)

    def compact(self, inputs: StackInputs) -> tuple["Call", StackInputs]:
        """Packs padded input on the CPU, so that missing steps cost nothing; reads lengths."""
        given: Any = self.sequences
        T, B, by_sequence = self.facts.steps, self.facts.batch, self.facts.layers.batch_first
        starts = torch.arange(B, device="cpu") * (T if by_sequence else 1)
        lengths = given.lengths.cpu().clamp(0, T)
        steps = max(1, int(lengths.max())) if B else T
        packing: Any = pack(lengths, steps, starts, 1 if by_sequence else B)
        rows, sizes, order, unsort = packing
        reset = None if given.reset is None else given.reset[:steps].cpu().index_select(1, order)

        def packed(grid: Tensor) -> Tensor:
            grid = grid.transpose(0, 1) if by_sequence else grid
            return grid.flatten(0, 1).index_select(0, rows)

        input, h_0, c_0, params, masks = inputs
        h_0, c_0 = h_0.index_select(1, order), None if c_0 is None else c_0.index_select(1, order)
        inputs = StackInputs(packed(input), h_0, c_0, params, [packed(mask) for mask in masks])
        sequences = Sequences(None, reset, sizes)
        return self._replace(sequences=sequences, unsort=unsort, places=rows, kind=None), inputs

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

    def states_in_form(self, states: Sequence[Tensor]) -> Any:
        """Returns states ``[L*D, B, H]`` in the order of the call's sequences, and as hx."""
        if self.unsort is not None:
            states = [s.index_select(1, self.unsort) for s in states]
        elif not self.batched:
            states = [s.squeeze(1) for s in states]
        return as_hx(states)


def prepare(
    cell: str, input: Any, hx: Any, params: Sequence[Tensor], layers: tuple,
    lengths: Any = None, reset: Any = None,
) -> Call:  # fmt: skip
    """Checks the arguments of a stack and brings them into the one form that backends take.

    All checks but those of values run once for each kind of call, since they take as long as the
    smallest layers do. ``layers`` may be a tuple of the fields of ``Layers``.
    """
    packing = nested = order = unsort = None
    form: tuple = ()
    if lengths is not None or reset is not None:
        form = ("lengths",) * (lengths is not None) + ("reset",) * (reset is not None)
    if isinstance(input, Tensor) and input.is_nested:
        input, nested = pack_nested(input)
    if isinstance(input, PackedSequence):
        if form:
            raise ValueError(f"{form[0]} was given with an input that has lengths of its own")
        packing, input, form = input, input.data, ("packed", *_check_packed(input))
    key = key_of(cell, input, hx, params, layers, form)
    kind = None if key is None else KINDS.get(key)  # TorchDynamo would guard on what KINDS holds
    if kind is None:
        kind = _checked(cell, input, hx, params, Layers(*layers), form)
        if key is not None:
            if len(KINDS) >= 4096:
                _forget()
            KINDS[key] = kind
    facts, batched, sequences = kind.facts, kind.batched, _NO_SEQUENCES
    if packing is not None:
        _, sizes, order, unsort = packing
        sequences = Sequences(batch_sizes=sizes)
    elif not batched:
        input = input.unsqueeze(1)
    elif facts.layers.batch_first:
        input = input.transpose(0, 1)
    if form and packing is None:
        sequences = _checked_sequences(lengths, reset, facts, batched)
    if hx is None:
        first, *others = kind.zeros
        zero = input.new_zeros(*first, dtype=kind.cast)  # for c_0 of this size too: none writes
        more = [zero if n[-1] == first[-1] else zero.new_zeros(*n) for n in others]
        states: Sequence[Tensor] = [zero, *more]
    else:
        # States of all sequences, contiguous: neither cuDNN nor a kernel takes others.
        states, B = (hx,) if isinstance(hx, Tensor) else tuple(hx), facts.batch
        if not batched:
            states = [s.unsqueeze(1) for s in states]
        states = [s if s.shape[1] == B else s.expand(-1, B, -1) for s in states]
        states = [s.contiguous() if order is None else s.index_select(1, order) for s in states]
    kept = kind if key else None
    return Call(facts, input, states, params, batched, sequences, packing, nested, unsort, kept)


def prepare_cell(cell: str, input: Tensor, hx: Any, params: Sequence[Tensor]) -> Call:
    """Prepares a single step, ``input [B, I]`` or ``[I]``, as a stack with T = 1."""
    _ndim(input, (1, 2))
    if hx is not None:
        states = _as_tensors(hx, SPECS[cell].states, indexed=False)
        hx = as_hx([state.unsqueeze(0) for state in states])
    call = prepare(cell, input.unsqueeze(0), hx, params, Layers(bias=len(params) == 4))
    return call._replace(facts=call.facts._replace(single_step=True), kind=None)


def _checked(
    cell: str, data: Tensor, hx: Any, params: Sequence[Tensor], layers: Layers, form: tuple
) -> Kind:  # fmt: skip
    """Checks a call but for values; ``form`` names what is ragged, and has T and B if packed."""
    is_packed = "packed" in form
    batched = is_packed or _ndim(data, (2, 3), " or a PackedSequence") == 3
    if is_packed:
        form, (steps, batch) = form[:1], form[1:]
    elif batched:
        steps, batch = data.shape[:2][:: -1 if layers.batch_first else 1]
    else:
        steps, batch = data.shape[0], 1
    states: Sequence[Tensor] = ()
    if hx is not None:
        states = _as_tensors(hx, SPECS[cell].states, indexed=not is_packed)
    tensors, autocast = (data, *states, *params), autocast_dtype(data)
    if not 0 <= layers.dropout <= 1:
        raise ValueError(f"dropout is {layers.dropout}; expected a probability, 0 to 1")
    I, H, P = _sizes(cell, params, layers)
    if autocast is None and data.dtype != params[0].dtype:
        raise ValueError(
            f"input is {data.dtype}, the weights are {params[0].dtype}; convert one with .to()"
        )
    if data.shape[-1] != I:
        raise RuntimeError(
            f"input has {data.shape[-1]} features in its last dimension; expected input_size, {I}"
        )
    if steps == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN: input has no time step (T = 0)"
        )
    needs_grad = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])  # noqa: C419
    dtype, compiled = _cast_dtype(data.dtype, autocast), torch.compiler.is_compiling()
    facts = Facts(
        cell, data.device, dtype, steps, batch, I, H, P, layers, form, needs_grad, autocast,
        compiled, is_transformed(), is_eager(data),
    )  # fmt: skip
    _check_states_and_dtypes(facts, states, params, batched)
    Z, rows = layers.num_layers * layers.directions, None if form else Rows(steps, batch)
    zeros = () if states else [(Z, batch, n) for n in facts.columns]
    return Kind(facts, batched, zeros, rows, not (P or facts.transformed))


def _sizes(cell: str, params: Sequence[Tensor], layers: Layers) -> tuple[int, int, int]:
    """Reads I, H and P off the first layer's weights and checks the shapes of all."""
    G, D, base = SPECS[cell].gates, layers.directions, 2 + 2 * layers.bias
    entries = layers.num_layers * D
    each = base + (cell == "lstm" and len(params) == (base + 1) * entries)
    if len(params) != each * entries:
        hint = f"{base} for each layer and direction"
        hint += " (one more with a projection)" if cell == "lstm" else ""
        raise ValueError(f"params has {len(params)} tensors; expected {base * entries}, {hint}")
    shapes: list[Any] = [getattr(p, "shape", ()) for p in params]

    def refuse(i: int, expected: str) -> None:
        names = [*("weight_ih", "weight_hh", "bias_ih", "bias_hh")[:base], "weight_hr"]
        name = f"{names[i % each]}_l{i // each // D}{'_reverse' * (i // each % D)}"
        if not isinstance(params[i], Tensor):
            kind = type(params[i]).__name__
            raise TypeError(f"{name} is a {kind}; expected a tensor {expected}")
        raise RuntimeError(f"{name} has shape {tuple(shapes[i])}; expected {expected}")

    if len(shapes[0]) != 2 or shapes[0][0] % G or not shapes[0][0]:
        refuse(0, f"({G} * hidden_size, input_size)")
    if each > base and len(shapes[base]) != 2:
        refuse(base, f"(proj_size, {shapes[0][0] // G})")
    H, I, P = shapes[0][0] // G, shapes[0][1], shapes[base][0] if each > base else 0
    for i, shape in enumerate(shapes):
        columns = I if i < each * D else (P or H) * D
        of_entry = (G * H, columns), (G * H, P or H), *[(G * H,)] * (base - 2), (P, H)
        if shape != of_entry[i % each]:
            refuse(i, str(of_entry[i % each]))
    return I, H, P


def _check_states_and_dtypes(
    facts: Facts, states: Sequence[Tensor], params: Sequence[Tensor], batched: bool
) -> None:
    """Checks the shapes of states, and that all tensors have one device and one dtype."""
    names = ["hx[0]", "hx[1]"] if len(states) == 2 else ["hx"] * len(states)
    rows = facts.layers.num_layers * facts.layers.directions
    for name, state, n in zip(names, states, facts.columns, strict=False):
        expected = (rows, facts.batch, n) if batched else (rows, n)
        if state.shape != expected and not (batched and state.shape == (rows, 1, n)):
            raise RuntimeError(f"{name} has shape {tuple(state.shape)}; expected {expected}")
    names += [f"params[{i}]" for i in range(len(params))]
    for name, t in zip(names, (*states, *params), strict=True):
        if t.device != facts.device:
            raise RuntimeError(f"{name} is on {t.device}; expected {facts.device}, the input's")
        if (dtype := _cast_dtype(t.dtype, facts.autocast)) != facts.dtype:
            raise RuntimeError(f"{name} is {dtype}; expected {facts.dtype}, the input's")


def _cast_dtype(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of a computation; autocast leaves fp64 alone, as everywhere in torch."""
    is_cast = autocast is not None and dtype.is_floating_point and dtype != torch.float64
    return autocast if is_cast else dtype  # type: ignore[return-value]


def _check_packed(packing: PackedSequence) -> tuple[int, int]:
    """Checks a PackedSequence; returns its T and B."""
    data, sizes, *_ = packing
    if data.dim() != 2:
        raise RuntimeError(f"the packed input's data is {data.dim()}-D; expected 2-D")
    if not torch.compiler.is_compiling() and (total := int(sizes.sum())) != len(data):
        rows = f"the packed input has {len(data)} rows"
        raise RuntimeError(f"{rows}; expected {total}, the sum of its batch_sizes")
    return len(sizes), int(sizes[0])


def _checked_sequences(lengths: Any, reset: Any, facts: Facts, batched: bool) -> Sequences:
    """Returns lengths and resets on the device, once, for backward too, and without a wait."""
    T, B, device, by_sequence = facts.steps, facts.batch, facts.device, facts.layers.batch_first
    if lengths is not None:
        lengths = _checked_lengths(lengths, facts, batched)
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else f"a {type(reset).__name__}"
            raise ValueError(f"reset is {kind}; expected a tensor of torch.bool")
        expected = ((B, T) if by_sequence else (T, B)) if batched else (T,)
        if reset.shape != expected:
            raise ValueError(f"reset has shape {tuple(reset.shape)}; expected {expected}")
        reset = (reset.t() if by_sequence else reset) if batched else reset.unsqueeze(1)
    given: Any = lengths, reset
    if device.type != "cpu":
        given = [t if t is None else t.to(device, non_blocking=True) for t in given]
    return Sequences(*given)


def _checked_lengths(lengths: Any, facts: Facts, batched: bool) -> Tensor:
    """Returns lengths as a tensor ``[B]``; checks values only where no device waits for it."""
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
    if not batched:
        raise ValueError("lengths was given with an input without a batch; cut the input instead")
    if lengths.shape != (facts.batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected {(facts.batch,)}")
    lengths = lengths if kind == torch.long else lengths.long()  # others may not hold T
    if lengths.device.type == "cpu" and facts.batch and not (facts.compiled or facts.transformed):
        values = lengths.tolist()
        if min(values) < 0:
            raise ValueError(f"lengths has {min(values)}; expected no negative number")
        if max(values) > facts.steps:
            raise ValueError(f"lengths has {max(values)}; the input has {facts.steps} steps")
    return lengths


def _ndim(input: Tensor, allowed: tuple[int, int], otherwise: str = "") -> int:
    """Returns the number of dimensions of the input, one of those allowed."""
    if not isinstance(input, Tensor):
        raise AttributeError(f"input is a {type(input).__name__}; expected a tensor{otherwise}")
    if (ndim := input.dim()) not in allowed:
        low, high = allowed
        raise ValueError(f"input is {ndim}-D; expected {low}-D or {high}-D{otherwise}")
    return ndim


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


def autocast_dtype(data: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast asks for on the input's device, or None."""
    kind, is_any = data.device.type, torch._C._is_any_autocast_enabled()
    is_on = is_any and kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


def as_hx(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Returns states in the form of hx: a tensor, or for an LSTM a pair."""
    return states[0] if len(states) == 1 else (states[0], states[1])
