"""Checks the arguments of a call and brings every form of input into one, time-major.

Wrong input raises the exception type of torch's own module, with one sentence that names the
argument, what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kernels.spec import SPECS
from .layout import Sequences
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
    needs_input_grad: bool = False
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
    input: Tensor  # [T, B, I], the data of a PackedSequence [R, I], for a cell [B, I]
    states: tuple[Tensor, ...]  # [L*D, B, H] each; for a cell [B, H]
    params: Sequence[Tensor]
    batched: bool = True  # False: the results lose the batch dimension again
    sequences: Sequences = Sequences()
    packing: PackedSequence | None = None  # the packed input
    #: Or of a nested one its offsets [B + 1], and the packed row of each of its rows [R].
    jagged: tuple[Tensor, Tensor] | None = None


class _Sizes(NamedTuple):
    """The sizes that the weights of the first layer have."""

    input_size: int
    hidden_size: int
    proj_size: int  # 0 without a projection
    columns: tuple[int, ...]  # of each state


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
    sizes, sequences = _sizes(cell, params, layers), _DENSE
    packing = jagged = None
    if isinstance(input, Tensor) and input.is_nested:
        input, jagged = _pack_jagged(input)
    if isinstance(input, PackedSequence):
        packing, data, batched = input, input.data, True
        if lengths is not None or reset is not None:
            name = "reset" if lengths is None else "lengths"
            raise ValueError(f"{name} was given with an input that has lengths of its own")
        steps, batch = _check_packed(packing)
        sequences = Sequences(batch_sizes=packing.batch_sizes)
    else:
        batched = _ndim(input, (2, 3), " or a PackedSequence") == 3
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
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN: input has no time step (T = 0)"
        )
    if lengths is not None or reset is not None:
        sequences = Sequences(
            _checked_lengths(lengths, steps, batch if batched else None),
            _checked_reset(reset, steps, batch if batched else None, layers.batch_first),
        )
        if data.device.type != "cpu":  # once, for backward too, and without a wait
            of = (None if t is None else t.to(data.device, non_blocking=True) for t in sequences)
            sequences = Sequences(*of)
    rows = layers.num_layers * layers.directions
    if hx is None:
        states = _zeros(data, (rows, batch), sizes.columns)
    else:
        states = _as_tensors(hx, len(sizes.columns), indexed=packing is None)
        states = _fitted(states, (rows, batch) if batched else (rows,), sizes.columns)
        states = states if batched else tuple(s.unsqueeze(1) for s in states)
    check_alike(data, states, params, check_dtype=autocast is None)
    if hx is not None and packing is not None and packing.sorted_indices is not None:
        states = tuple(s.index_select(1, packing.sorted_indices) for s in states)
    tensors = data, *states, *params
    facts = _facts(cell, tensors, (steps, batch, sizes), layers, sequences, autocast)
    return Call(facts, data, states, params, batched, sequences, packing, jagged)


def prepare_cell(cell: str, input: Tensor, hx: Any, params: Sequence[Tensor]) -> Call:
    """Prepares a single step, ``input [B, I]`` or ``[I]``, as a stack with T = 1."""
    _ndim(input, (1, 2))
    if hx is not None:
        states = _as_tensors(hx, SPECS[cell].states, indexed=False)
        hx = as_hx([state.unsqueeze(0) for state in states])
    call = prepare(cell, input.unsqueeze(0), hx, params, Layers(bias=len(params) == 4))
    return call._replace(facts=call.facts._replace(single_step=True))


_DENSE = Sequences()
_KINDS = ("lengths", "reset", "packed")


def _facts(
    cell: str,
    tensors: Sequence[Tensor],
    dims: tuple[int, int, _Sizes],
    layers: Layers,
    sequences: Sequences,
    autocast: torch.dtype | None,
) -> Facts:
    """Returns the facts about a call with these tensors, the input first."""
    data, (steps, batch, sizes) = tensors[0], dims
    pairs = () if sequences is _DENSE else zip(_KINDS, sequences, strict=False)
    ragged = tuple([kind for kind, given in pairs if given is not None])
    needs_grad = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])  # noqa: C419
    grads = needs_grad, needs_grad and data.requires_grad
    # Autocast leaves fp64 alone, as everywhere in torch.
    dtype = data.dtype if autocast is None or data.dtype == torch.float64 else autocast
    modes = torch.compiler.is_compiling(), is_transformed()
    grid = steps, batch, *sizes[:3]
    return Facts(cell, data.device, dtype, *grid, layers, ragged, *grads, autocast, *modes)


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


def _pack_jagged(nested: Any) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
    """Packs a nested tensor; reads its lengths, hence waits for a GPU."""
    if nested.layout != torch.jagged:
        raise ValueError(f"input is a nested tensor of {nested.layout}; expected torch.jagged")
    values, offsets = nested.values(), nested.offsets()
    if values.dim() != 2 or nested.lengths() is not None or nested._ragged_idx != 1:
        raise ValueError("input is a nested tensor with holes or of other than [B, jagged, I]")
    starts = offsets.cpu()
    lengths, order = starts.diff().sort(descending=True, stable=True)
    if not len(lengths) or not lengths[-1]:
        raise ValueError("input is a nested tensor with an empty sequence; expected none")
    times = torch.arange(int(lengths[0]), device="cpu").unsqueeze(1)
    there = times < lengths  # [T, B]
    rows = (starts[:-1][order] + times)[there].to(values.device)
    back = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    order = order.to(values.device)
    packed = PackedSequence(values.index_select(0, rows), there.sum(1), order, order.argsort())
    return packed, (offsets, back)


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


def _check_features(data: Tensor, input_size: int) -> None:
    if data.shape[-1] != input_size:
        raise RuntimeError(
            f"input has {data.shape[-1]} features in its last dimension; expected input_size, "
            f"{input_size}"
        )


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


def _autocast_dtype(data: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast asks for on the input's device, or None."""
    kind = data.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def as_hx(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Returns states in the form of hx: a tensor, or for an LSTM a pair."""
    return states[0] if len(states) == 1 else (states[0], states[1])
