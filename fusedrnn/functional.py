"""``lstm``, ``gru`` and ``rnn`` as functions of input, states and weights.

Here every form of input (batch first, unbatched, packed) becomes time-major, bad input gets its
sentence, and the call goes to the backend that ``dispatch`` names. Axes: T time, B batch, I input
size, H hidden size, L layers, D directions. The modules are a thin layer over this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, onednn
from .arguments import Call, Layers, as_hx, check_alike, prepare
from .launches import Config
from .ops import ATEN, by_one_thread
from .requested import LOOPS
from .threads import alone
from .transforms import rnn_stack

_ATEN_CELL: dict[str, Callable] = {
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
}

# cuDNN's advice to call flatten_parameters(), which does nothing here by design. Only warnings
# raised by this package are silenced, so that nn.LSTM's remain.
warnings.filterwarnings(
    "ignore",
    "RNN module weights are not part of single contiguous",
    UserWarning,
    rf"{__package__}\.(functional|ops)",
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
    are torch's. Which backend runs is decided by ``use_backend``, ``FUSEDRNN_BACKEND`` and what
    the backends take; ``explain`` tells.

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
        recompute: whether backward makes the gates again instead of finding them saved: of the
            6 numbers that an LSTM keeps for each unit and step 2 remain, of a GRU's 5 one, for
            1.2 to 1.35 times the time of training on a CPU. The gradients are the same up to
            rounding.
        lengths: how many steps of each sequence count, integers ``[B]`` in any order on any device,
            0 to T. The others are as if they were not there: they may hold NaN, the output is 0
            there and has no gradient, h_n and c_n are of the last step that counts (hx, if none),
            and the reverse direction starts at each sequence's own end. On a GPU the values are
            not looked at: more than T counts as T, less than 0 as 0.
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
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    reset_after: bool = True,
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
        num_layers: as of ``lstm``.
        bias: as of ``lstm``.
        batch_first: as of ``lstm``.
        dropout: as of ``lstm``.
        training: as of ``lstm``.
        bidirectional: as of ``lstm``.
        recompute: as of ``lstm``.
        lengths: as of ``lstm``.
        reset: as of ``lstm``.
        reset_after: whether r applies after the recurrent product (torch's) or before it.

    Returns:
        output ``[T, B, D*H]`` in the form of the input, and h_n in the form of hx.

    Raises:
        ValueError, RuntimeError, AttributeError, NotImplementedError: as ``lstm``.
    """
    layers = Layers(num_layers, bias, batch_first, dropout, training, bidirectional, recompute)
    cell = "gru" if reset_after else "gru_reset_before"
    return run(prepare(cell, input, hx, params, layers, lengths, reset))


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
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
    nonlinearity: str = "tanh",
) -> tuple[Tensor | PackedSequence, Tensor]:
    r"""A stack of Elman layers (Elman 1990): ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Equivalent torch code: ``nn.RNN`` with these weights.

    Args:
        input: as of ``lstm``.
        hx: h_0 ``[L*D, B, H]`` (without a batch ``[L*D, H]``), or None for zeros.
        params: as of ``lstm``, with ``H`` rows and no projection.
        num_layers: as of ``lstm``.
        bias: as of ``lstm``.
        batch_first: as of ``lstm``.
        dropout: as of ``lstm``.
        training: as of ``lstm``.
        bidirectional: as of ``lstm``.
        recompute: as of ``lstm``.
        lengths: as of ``lstm``.
        reset: as of ``lstm``.
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Returns:
        output ``[T, B, D*H]`` in the form of the input, and h_n in the form of hx.

    Raises:
        ValueError, RuntimeError, AttributeError, NotImplementedError: as ``lstm``; ValueError also
            for another nonlinearity.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity is {nonlinearity!r}; expected 'tanh' or 'relu'")
    layers = Layers(num_layers, bias, batch_first, dropout, training, bidirectional, recompute)
    return run(prepare(f"rnn_{nonlinearity}", input, hx, params, layers, lengths, reset))


def run(call: Call) -> Any:
    """Runs a prepared stack; returns output and states in the form of its input."""
    backend = dispatch.choose(call.request)
    unrolled = backend == "aten" and not (
        call.request.compiled and dispatch.runs_as_one_node(call.request)
    )
    output, states = _run_aten(call) if unrolled else _run_stack(call, backend)
    return in_form(call, output), as_hx(states_in_form(call, states))


def in_form(call: Call, rows: Tensor) -> Any:
    """``[T, B, ...]``, or packed rows ``[R, ...]``, in the form of the call's input."""
    if call.jagged is not None:
        values = rows.index_select(0, call.jagged.values)
        return torch.nested.nested_tensor_from_jagged(values, call.jagged.offsets)
    if call.packing is not None:
        return PackedSequence(rows, *call.packing[1:])
    if not call.batched:
        return rows.squeeze(1)
    return rows.transpose(0, 1) if call.layers.batch_first else rows


def states_in_form(call: Call, states: Sequence[Tensor]) -> list[Tensor]:
    """States ``[L*D, B, H]`` in the order of the call's sequences."""
    if call.packing is not None and call.packing.unsorted_indices is not None:
        return [s.index_select(1, call.packing.unsorted_indices) for s in states]
    return list(states) if call.batched else [s.squeeze(1) for s in states]


def run_cell(call: Call) -> Any:
    """Runs a prepared single step; returns the new states in the form of its input."""
    backend = dispatch.choose(call.request)
    if backend == "aten":
        cell = _ATEN_CELL[call.request.cell]
        result = cell(call.input, as_hx(call.states), *call.params)
        states: Sequence[Tensor] = result if len(call.states) == 2 else (result,)
    else:
        stacked = call._replace(
            input=call.input.unsqueeze(0), states=tuple(s.unsqueeze(0) for s in call.states)
        )
        _, states = _run_stack(stacked, backend)
        states = [s.squeeze(0) for s in states]
    return as_hx(states if call.batched else [s.squeeze(0) for s in states])


def _run_aten(call: Call) -> tuple[Tensor, Sequence[Tensor]]:
    layers, packing = call.layers, call.packing
    with alone(is_small(call)):
        output, *states = ATEN[call.request.cell](
            call.input,
            *(() if packing is None else (packing.batch_sizes,)),
            as_hx(call.states),
            call.params,
            # The input is time-major by now, and packed there is no batch_first.
            *for_aten(layers._replace(batch_first=False))[: 6 if packing is None else 5],
        )
    return output, states


def is_small(call: Call) -> bool:
    """As ``by_one_thread``. Of packed sequences it was not measured; a compiler cannot trace it."""
    asked = call.request
    if asked.packed or asked.compiled:
        return False
    return by_one_thread(asked.cell, (asked.steps, asked.batch, asked.input_size), call.params[1])


def for_aten(layers: Layers) -> tuple:
    """The arguments of torch's operators that are no tensors."""
    return (
        layers.bias,
        layers.num_layers,
        layers.dropout,
        layers.training,
        layers.bidirectional,
        layers.batch_first,
    )


def _run_stack(call: Call, backend: str) -> tuple[Tensor, Sequence[Tensor]]:
    input, states, params, masks = operands(call)
    output, final, _ = rnn_stack(
        input, states, params, masks, call.ragged, config_of(call, backend)
    )
    return output, final


def operands(call: Call) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Input, states and params in the dtype of the computation, and the masks of dropout."""
    request = call.request
    input, states, params = call.input, list(call.states), list(call.params)
    if request.autocast:
        # As cuDNN's path does: input, states and weights alike; fp64 is left alone.
        input, *states = (_cast(t, request.autocast) for t in (input, *states))
        params = [_cast(p, request.autocast) for p in params]
        check_alike(input, states, params)
    columns = request.proj_size or request.hidden_size
    return input, states, params, dropout_masks(input, columns, call.layers)


def config_of(call: Call, backend: str) -> Config:
    """How the operator runs a call."""
    request, layers = call.request, call.layers
    # Where the host may read lengths without waiting, the loop does nothing for missing steps.
    compact = backend in LOOPS and request.device.type == "cpu" and request.lengths
    return Config(
        request.cell,
        backend,
        layers.bias,
        layers.num_layers,
        layers.bidirectional,
        dispatch.precision(),
        compact and not request.states,
        recompute=request.recompute,
        projected=request.projected,
        onednn=backend == "torch" and onednn.takes(request),
    )


def dropout_masks(input: Tensor, columns: int, layers: Layers) -> list[Tensor]:
    """Masks scaled by 1/(1-p), drawn as ``at::dropout`` draws them on the CPU, bit for bit.

    columns: P, of one direction.
    """
    p = layers.dropout if layers.training else 0.0
    if p == 0:
        return []
    shape = *input.shape[:-1], columns * (1 + layers.bidirectional)
    masks = [input.new_zeros(shape) for _ in range(layers.num_layers - 1)]
    if p == 1:
        return masks  # at::dropout draws nothing here, and 1/(1-p) is infinite
    return [mask.bernoulli_(1 - p).div_(1 - p) for mask in masks]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if cast else tensor
