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
from .arguments import Call, prepare
from .ops import ATEN, rnn_stack
from .records import Layers, StackConfig

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
    lengths, reset = options.pop("lengths", None), options.pop("reset", None)
    return run(prepare(cell, input, hx, params, Layers(**options), lengths, reset))


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
    cell, lengths = f"rnn_{nonlinearity}", options.pop("lengths", None)
    reset = options.pop("reset", None)
    return run(prepare(cell, input, hx, params, Layers(**options), lengths, reset))


def check_nonlinearity(name: str) -> None:
    """Raises torch's ValueError for another function than tanh or relu."""
    if name not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{name}'. Select from 'tanh' or 'relu'.")


def run(call: Call) -> Any:
    """Runs a prepared stack; returns output and states in the form of its input."""
    facts, kind = call.facts, call.kind
    backend, config = (kind and kind.choice) or _choose(call)
    is_aten = backend == "aten"
    if is_aten and not (facts.compiled and dispatch.runs_as_one_node(facts)):
        output, *states = _run_aten(call)
    else:
        inputs = call.stack_inputs()
        if backend == "torch" and "lengths" in facts.ragged and facts.eager:
            call, inputs = call.compact(inputs)
        kind, dtype = call.kind, facts.autocast and facts.dtype
        if kind and (torch._C._autograd._profiler_enabled() or not kind.is_plain):
            kind = None
        output, states, _ = rnn_stack(inputs, call.sequences, config, dtype, kind=kind)
    # Transposed in place it is no view, as torch's, and ``detach_()`` takes it. Not where it is
    # saved for backward.
    is_own = backend == "torch" or (is_aten and facts.cell != "lstm")
    is_own = is_own and not (facts.compiled or facts.transformed)
    return call.in_form(output, is_own), call.states_in_form(states)


def _choose(call: Call) -> tuple[str, StackConfig]:
    """Decides how to run a call, and keeps the choice for others of its kind."""
    facts, kind = call.facts, call.kind
    is_settled = facts.compiled or measured.consider(call, run)
    choice = dispatch.decide(facts)
    if kind is not None and is_settled:
        kind.choice, kind.cast = choice, None if choice[0] == "aten" else facts.cast
    return choice


def _run_aten(call: Call) -> Sequence[Tensor]:
    """Runs torch's operator."""
    facts, layers, sizes = call.facts, call.facts.layers, call.sequences.batch_sizes
    dropout = layers.dropout if layers.training else 0.0
    is_training = layers.training or facts.needs_grad  # cuDNN has no backward in eval()
    flags = layers.bias, layers.num_layers, dropout, is_training, layers.bidirectional
    hx = call.states if facts.cell == "lstm" else call.states[0]
    if sizes is None:
        return ATEN[facts.cell](call.input, hx, call.params, *flags, False)
    return ATEN[facts.cell](call.input, sizes, hx, call.params, *flags)
