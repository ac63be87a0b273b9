"""``lstm``, ``gru`` and ``rnn`` as functions of input, states and weights.

``arguments.prepare`` checks a call, ``dispatch.choose`` names its backend, and ``run`` runs it. The
modules are a thin layer over this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, measured
from .arguments import Call, Layers, as_hx, check_alike, prepare
from .ops import ATEN, rnn_stack
from .stack import StackConfig, StackInputs
from .vmap import is_transformed

# cuDNN's advice to call flatten_parameters(), which helps no function and no computed weight. Only
# warnings raised by this package are silenced, so that nn.LSTM's remain.
warnings.filterwarnings(
    "ignore",
    "RNN module weights are not part of single contiguous",
    UserWarning,
    rf"{__package__}\.",
)


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    r"""A stack of LSTM layers (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000).

    For each layer, direction and step, with x the input or the layer below:

    .. code-block:: text

        i, f, o = sigmoid(W_i{i,f,o} x + b_i{i,f,o} + W_h{i,f,o} h + b_h{i,f,o})
        g       = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c'      = f * c + i * g
        h'      = o * tanh(c')

    Equivalent torch code: ``nn.LSTM`` with these weights. Names, shapes, gate order and results
    are torch's. ``use_backend``, ``FUSEDRNN_BACKEND`` and the limits of the backends decide which
    one runs; ``explain`` tells.

    Args:
        input: ``[T, B, I]``; ``[B, T, I]`` if ``batch_first``; ``[T, I]`` without a batch; or a
            ``PackedSequence`` or nested tensor of layout ``torch.jagged`` (for which
            ``batch_first`` means nothing). Floating point.
        hx: ``(h_0, c_0)``, each ``[L*D, B, H]`` (without a batch ``[L*D, H]``), or
            ``[L*D, 1, H]`` for all sequences alike, with the input's dtype and device; None means
            zeros. With a projection h_0 has P columns, not H.
        params: the weights in torch's flat order, for each layer, and in it for each direction:
            ``weight_ih [4*H, I]`` (above the first layer ``[4*H, D*H]``), ``weight_hh [4*H, H]``,
            if ``bias`` also ``bias_ih [4*H]`` and ``bias_hh [4*H]``. A ``weight_hh [4*H, P]``
            with P != H announces a projection, and ``weight_hr [P, H]`` follows in each entry.
        num_layers: L.
        bias: whether ``params`` holds biases.
        batch_first: whether input and output are ``[B, T, ...]``. States never are.
        dropout: the probability of zeroing an element between layers, if ``training``. The masks
            come from torch's generator; on the CPU one seed gives the same ones in every backend.
        training: whether dropout is applied.
        bidirectional: D = 2 instead of 1.
        recompute: whether backward computes the gates again instead of reading saved ones: of the
            6 numbers that an LSTM keeps for each unit and step 2 remain, of a GRU's 5 one. The
            gradients are the same up to rounding.
        lengths: how many steps of each sequence count, integers ``[B]`` in any order on any device,
            0 to T. The others are as if they were not there: they may hold NaN, the output is 0
            there and has no gradient, h_n and c_n are of the last step that counts (hx, if none),
            and the reverse direction starts at each sequence's own end. On a GPU the values are
            not checked: more than T counts as T, less than 0 as 0.
        reset: bool ``[T, B]``, ``[B, T]`` if ``batch_first``: a new sequence begins at this step.
            The state is zero before it, hx too, and no gradient passes. The reverse direction is
            cut at the same place, hence zero before step t - 1. What ``lengths`` leaves out is
            ignored.

    Returns:
        output ``[T, B, D*H]`` in the form of the input, and ``(h_n, c_n)`` in the form of hx. Under
        ``torch.autocast`` triton and the reference compute and return autocast's dtype, as cuDNN.

    Raises:
        ValueError: the input's ndim or dtype is wrong, or params has the wrong length; or lengths
            or reset has the wrong shape, dtype or values, or comes with a packed input.
        RuntimeError: a size, or hx's shape, dtype or device is wrong, or there is no step.
        AttributeError, TypeError, IndexError: input or hx is not what can hold tensors. All as
            ``nn.LSTM`` raises.
        NotImplementedError: a backend was named that does not take this call.

    Example:
        >>> module = torch.nn.LSTM(3, 4)
        >>> input = torch.randn(7, 2, 3)
        >>> output, (h_n, c_n) = fusedrnn.lstm(input, None, list(module.parameters()))
        >>> assert output.shape == (7, 2, 4)
        >>> torch.testing.assert_close(output, module(input)[0])
    """
    layers = Layers(num_layers, bias, batch_first, dropout, training, bidirectional, recompute)
    return run(prepare("lstm", input, hx, params, layers, lengths, reset))


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    reset_after: bool = True,
    **options: Any,
) -> tuple[Tensor | PackedSequence, Tensor]:
    r"""A stack of GRU layers (Cho et al. 2014).

    For each layer, direction and step, with x the input or the layer below:

    .. code-block:: text

        r, z = sigmoid(W_i{r,z} x + b_i{r,z} + W_h{r,z} h + b_h{r,z})
        n    = tanh(W_in x + b_in + r * (W_hn h + b_hn))      reset_after=True: torch, cuDNN, Keras
        n    = tanh(W_in x + b_in + W_hn (r * h) + b_hn)      reset_after=False: Cho et al., ONNX
        h'   = (1 - z) * n + z * h

    z is torch's in both forms, the share of the *old* state. Where a source writes
    ``h' = (1 - z) * h + z * n``, its z is 1 - torch's: negate the z rows of weights and biases.

    Equivalent torch code: ``nn.GRU`` with these weights (for ``reset_after=True`` only).

    Args:
        input: as of ``lstm``.
        hx: h_0 ``[L*D, B, H]`` (without a batch ``[L*D, H]``), or None for zeros.
        params: as of ``lstm``, with ``3*H`` rows (r, z, n) and no projection.
        reset_after: whether r applies after the recurrent product (torch's) or before it.
        **options: the keyword arguments of ``lstm``.

    Returns:
        output ``[T, B, D*H]`` in the form of the input, and h_n in the form of hx.

    Raises:
        ValueError, RuntimeError, AttributeError, NotImplementedError: as ``lstm``.
    """
    cell = "gru" if reset_after else "gru_reset_before"
    return _run_stack(cell, input, hx, params, **options)


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    **options: Any,
) -> tuple[Tensor | PackedSequence, Tensor]:
    r"""A stack of Elman layers (Elman 1990): ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Equivalent torch code: ``nn.RNN`` with these weights.

    Args:
        input: as of ``lstm``.
        hx: h_0 ``[L*D, B, H]`` (without a batch ``[L*D, H]``), or None for zeros.
        params: as of ``lstm``, with ``H`` rows and no projection.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        **options: the keyword arguments of ``lstm``.

    Returns:
        output ``[T, B, D*H]`` in the form of the input, and h_n in the form of hx.

    Raises:
        ValueError, RuntimeError, AttributeError, NotImplementedError: as ``lstm``; ValueError also
            for another nonlinearity.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return _run_stack(f"rnn_{nonlinearity}", input, hx, params, **options)


def _run_stack(
    cell: str,
    input: Any,
    hx: Any,
    params: Sequence[Tensor],
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    **layers: Any,
) -> Any:
    return run(prepare(cell, input, hx, params, Layers(**layers), lengths, reset))


def run(call: Call) -> Any:
    """Runs a prepared stack; returns output and states in the form of its input."""
    facts, packing = call.facts, call.packing
    if not facts.compiled:
        measured.consider(call, run)
    backend = dispatch.choose(facts)
    as_one_node = facts.compiled and dispatch.runs_as_one_node(facts)
    if backend == "aten" and not as_one_node:
        hx = as_hx([state.contiguous() for state in call.states])  # cuDNN takes no strided states
        sizes = None if packing is None else packing.batch_sizes
        output, *states = _run_aten(
            facts.cell, call.input, hx, call.params, facts.layers, facts.needs_grad, sizes
        )
    else:
        inputs, config = operands(call), config_of(call, backend)
        output, states, _ = rnn_stack(inputs, call.sequences, config)
    # As torch's, the output is then no view, and detach_() takes it; others save it for backward.
    in_place = backend == "torch" or (backend == "aten" and facts.cell != "lstm")
    in_place = in_place and not (facts.compiled or facts.transformed)
    return in_form(call, output, in_place), as_hx(states_in_form(call, states))


#: Kinds of calls on the CPU, and whether ``auto`` leaves them to torch's operator.
_KINDS: dict[tuple, bool] = {}


def run_module(
    cell: str, input: Any, hx: Any, params: Sequence[Tensor], layers: Layers
) -> tuple[Any, Any]:
    """Runs a module's stack; a kind of call that was checked before may skip the checks.

    They take as long as the smallest layers. A weight of another shape makes another kind, and a
    call that torch's operator rejects is checked again.
    """
    kind = _kind_of(cell, input, hx, params, layers)
    if kind is not None and _KINDS.get(kind):
        try:
            return _run_known(cell, input, hx, params, layers)
        except RuntimeError:
            pass  # the checks below name the cause
    call = prepare(cell, input, hx, params, layers)
    result = run(call)
    if kind is not None and kind not in _KINDS:
        if len(_KINDS) >= 4096:
            _KINDS.clear()
        given = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
        is_whole = all(g.shape == s.shape for g, s in zip(given, call.states, strict=False))
        _KINDS[kind] = is_whole and dispatch.choose(call.facts) == "aten"
    return result


def _kind_of(
    cell: str, input: Any, hx: Any, params: Sequence[Tensor], layers: Layers
) -> tuple | None:
    """Returns what checks and choice of a plain call on the CPU depend on; None for others."""
    if torch.compiler.is_compiling() or type(input) is not Tensor or input.is_nested:
        return None
    if input.dim() != 3 or not input.is_cpu or not dispatch.is_auto() or is_transformed():
        return None
    states = (hx,) if isinstance(hx, Tensor) else hx or ()
    if torch._C._is_any_autocast_enabled() or not isinstance(states, (tuple, list)):
        return None
    if any(type(t) is not Tensor for t in states) or any(p is None for p in params):
        return None
    tensors = input, *states, *params
    needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    sizes = [(t.shape, t.dtype, t.is_cpu) for t in tensors]
    return cell, layers, needs_grad, input.requires_grad, type(hx), *sizes


def _run_known(cell: str, input: Tensor, hx: Any, params: Sequence[Tensor], layers: Layers) -> Any:
    """Runs torch's operator on a call of a known kind."""
    rows = input.transpose(0, 1) if layers.batch_first else input
    if hx is None:
        columns = params[1].shape[1]
        h_0 = input.new_zeros(layers.num_layers * layers.directions, rows.shape[1], columns)
        hx = (h_0, h_0) if cell == "lstm" else h_0
    output, *states = _run_aten(cell, rows, hx, params, layers, torch.is_grad_enabled())
    if layers.batch_first:
        output = output.transpose(0, 1) if cell == "lstm" else output.transpose_(0, 1)
    return output, as_hx(states)


def run_cell(call: Call) -> Any:
    """Runs a prepared single step; returns the new states in the form of its input."""
    _, hx = run(call)
    return hx.squeeze(0) if isinstance(hx, Tensor) else tuple(state.squeeze(0) for state in hx)


def _run_aten(
    cell: str, rows: Tensor, hx: Any, params: Sequence[Tensor], layers: Layers,
    needs_grad: bool, batch_sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Runs torch's operator, on input that is time-major by now."""
    dropout = layers.dropout if layers.training else 0.0
    is_training = layers.training or needs_grad  # cuDNN has no backward of a forward in eval()
    flags = layers.bias, layers.num_layers, dropout, is_training, layers.bidirectional
    if batch_sizes is None:
        return ATEN[cell](rows, hx, params, *flags, False)
    return ATEN[cell](rows, batch_sizes, hx, params, *flags)


def in_form(call: Call, rows: Tensor, in_place: bool = False) -> Any:
    """Returns ``[T, B, ...]``, or packed rows ``[R, ...]``, in the form of the call's input."""
    if call.jagged is not None:
        offsets, order = call.jagged
        return torch.nested.nested_tensor_from_jagged(rows.index_select(0, order), offsets)
    if call.packing is not None:
        return PackedSequence(rows, *call.packing[1:])
    if not call.batched:
        return rows.squeeze(1)
    if call.facts.layers.batch_first:
        return rows.transpose_(0, 1) if in_place else rows.transpose(0, 1)
    return rows


def states_in_form(call: Call, states: Sequence[Tensor]) -> list[Tensor]:
    """Returns states ``[L*D, B, H]`` in the order of the call's sequences."""
    if call.packing is not None and call.packing.unsorted_indices is not None:
        return [s.index_select(1, call.packing.unsorted_indices) for s in states]
    return list(states) if call.batched else [s.squeeze(1) for s in states]


def operands(call: Call) -> StackInputs:
    """Returns the tensors of a call in the dtype of the computation, with dropout's masks."""
    facts = call.facts
    input, states, params = call.input, list(call.states), list(call.params)
    if facts.autocast:
        # As cuDNN's path does: input, states and weights alike; fp64 is left alone.
        input, *states = (_cast(t, facts.autocast) for t in (input, *states))
        params = [_cast(p, facts.autocast) for p in params]
        check_alike(input, states, params)
    masks = dropout_masks(input, facts.proj_size or facts.hidden_size, facts.layers)
    return StackInputs(input, states[0], states[1] if len(states) == 2 else None, params, masks)


def config_of(call: Call, backend: str) -> StackConfig:
    """Returns how the operator runs a call."""
    facts, layers = call.facts, call.facts.layers
    # Where the host can read lengths without a transfer, the loop skips the missing steps.
    compact = backend == "torch" and facts.device.type == "cpu" and "lengths" in facts.ragged
    sizes = layers.bias, layers.num_layers, bool(layers.bidirectional)
    precision = dispatch.precision() if backend == "triton" else "ieee"
    compact = compact and not (facts.states or facts.transformed)
    backend = "auto" if backend == "triton" and dispatch.is_auto() else backend
    return StackConfig(facts.cell, backend, *sizes, precision, compact, facts.recompute)


def dropout_masks(input: Tensor, columns: int, layers: Layers) -> list[Tensor]:
    """Draws masks scaled by 1/(1-p), on the CPU bit for bit those of ``at::dropout``.

    columns: of the output of one direction.
    """
    p = layers.dropout if layers.training else 0.0
    if p == 0:
        return []
    shape = *input.shape[:-1], columns * layers.directions
    masks = [input.new_zeros(shape) for _ in range(layers.num_layers - 1)]
    if p == 1:
        return masks  # at::dropout draws nothing, and 1/(1-p) is infinite
    return [mask.bernoulli_(1 - p).div_(1 - p) for mask in masks]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if cast else tensor
