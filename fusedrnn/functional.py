"""``lstm``, ``gru`` and ``rnn`` as functions of input, states and weights.

``arguments.prepare`` checks a call, ``dispatch`` chooses its backend, and ``run`` runs it.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, measured
from .arguments import Call, Layers, as_hx, prepare
from .ops import ATEN, is_eager, rnn_stack
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
    are torch's. ``explain`` tells which backend runs.

    Args:
        input: ``[T, B, I]``; ``[B, T, I]`` if ``batch_first``; ``[T, I]`` without a batch; or a
            ``PackedSequence`` or nested tensor of layout ``torch.jagged``. Floating point.
        hx: ``(h_0, c_0)``, each ``[L*D, B, H]`` (without a batch ``[L*D, H]``), or
            ``[L*D, 1, H]`` for all sequences alike, with the input's dtype and device; None means
            zeros. With a projection h_0 has P columns, not H.
        params: the weights in torch's flat order, for each layer, and in it for each direction:
            ``weight_ih [4*H, I]`` (above the first layer ``[4*H, D*H]``), ``weight_hh [4*H, H]``,
            if ``bias`` also ``bias_ih [4*H]`` and ``bias_hh [4*H]``; with a projection
            ``weight_hh [4*H, P]``, and ``weight_hr [P, H]`` at the end of each entry.
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
            0 to T. The others may hold NaN; the output is 0 there and has no gradient, h_n and c_n
            are of the last step that counts (hx, if none), and the reverse direction starts at
            each sequence's own end. On a GPU the values are clamped, not checked.
        reset: bool ``[T, B]``, ``[B, T]`` if ``batch_first``: a new sequence begins at this step.
            The state is zero before it, hx too, and no gradient passes. The reverse direction is
            cut at the same place, hence zero before step t - 1.

    Returns:
        output ``[T, B, D*H]`` in the form of the input, and ``(h_n, c_n)`` in the form of hx. Under
        ``torch.autocast`` triton and the loop compute and return autocast's dtype, as cuDNN.

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

    Where a source writes ``h' = (1 - z) * h + z * n``, negate the z rows of weights and biases.
    Equivalent torch code: ``nn.GRU`` with these weights (for ``reset_after=True`` only).

    Args:
        input, params: as of ``lstm``, with ``3*H`` rows (r, z, n) and no projection.
        hx: h_0 ``[L*D, B, H]`` (without a batch ``[L*D, H]``), or None for zeros.
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
        input, params: as of ``lstm``, with ``H`` rows and no projection.
        hx: h_0 ``[L*D, B, H]`` (without a batch ``[L*D, H]``), or None for zeros.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        **options: the keyword arguments of ``lstm``.

    Returns:
        output ``[T, B, D*H]`` in the form of the input, and h_n in the form of hx.

    Raises:
        ValueError, RuntimeError, AttributeError, NotImplementedError: as ``lstm``; ValueError also
            for another nonlinearity.
    """
    check_nonlinearity(nonlinearity)
    return _run_stack(f"rnn_{nonlinearity}", input, hx, params, **options)


def check_nonlinearity(name: str) -> None:
    """Raises torch's ValueError for another function than tanh or relu."""
    if name not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{name}'. Select from 'tanh' or 'relu'.")


def _run_stack(
    cell: str, input: Any, hx: Any, params: Any, *, lengths: Any = None, reset: Any = None, **o: Any
) -> Any:
    return run(prepare(cell, input, hx, params, Layers(**o), lengths, reset))


#: Kinds of plain calls on the CPU, and whether torch's operator runs them: see ``run_module``.
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
        _KINDS[kind] = is_whole and dispatch.decide(call.facts)[0] == "aten"
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


def _run_aten(
    cell: str,
    input: Tensor,
    hx: Any,
    params: Any,
    layers: Layers,
    needs_grad: bool,
    sizes: Any = None,
) -> Any:
    """Runs torch's operator; ``sizes`` are the batch_sizes of packed input."""
    dropout = layers.dropout if layers.training else 0.0
    is_training = layers.training or needs_grad  # cuDNN has no backward in eval()
    flags = layers.bias, layers.num_layers, dropout, is_training, layers.bidirectional
    if sizes is None:
        return ATEN[cell](input, hx, params, *flags, False)
    return ATEN[cell](input, sizes, hx, params, *flags)


def run(call: Call) -> Any:
    """Runs a prepared stack; returns output and states in the form of its input."""
    facts, layers = call.facts, call.facts.layers
    if not facts.compiled:
        measured.consider(call, run)
    backend, config = dispatch.decide(facts)
    if backend == "aten" and not (facts.compiled and dispatch.runs_as_one_node(facts)):
        hx = as_hx([state.contiguous() for state in call.states])  # cuDNN takes no strided states
        sizes = None if call.packing is None else call.packing.batch_sizes
        needs_grad, given = facts.needs_grad, (facts.cell, call.input, hx, call.params, layers)
        output, *states = _run_aten(*given, needs_grad, sizes)
    else:
        if backend == "torch" and "lengths" in facts.ragged and is_eager(call.input):
            call = call.compact()
        output, states, _ = rnn_stack(call.stack_inputs(), call.sequences, config)
    # As torch's, the output is then no view, and detach_() takes it; others save it for backward.
    in_place = backend == "torch" or (backend == "aten" and facts.cell != "lstm")
    in_place = in_place and not (facts.compiled or facts.transformed)
    return call.in_form(output, in_place), as_hx(call.states_in_form(states))


def run_cell(call: Call) -> Any:
    """Runs a prepared single step; returns the new states in the form of its input."""
    _, hx = run(call)
    return hx.squeeze(0) if isinstance(hx, Tensor) else tuple(state.squeeze(0) for state in hx)
