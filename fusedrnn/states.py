"""``module.states()``: every state and gate of every step, differentiable."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from . import dispatch
from .arguments import Call
from .kernels.rows import Rows
from .kernels.tensors import Weights
from .layout import entering, rows_of, with_table, without_padding
from .ops import rnn_stack
from .records import StackInputs
from .reference import CELLS

#: The names of the saved tiles of an LSTM and a GRU.
_GATES = {"lstm": "ifgo", "gru": "rzn", "gru_reset_before": "rzn"}


class States(NamedTuple):
    """The result of ``module.states(...)``; all of it is differentiable.

    ``h``, ``c`` and ``gates`` are indexed ``[layer][direction]``. Their tensors have the form of
    the input: ``[T, B, ...]``, ``[B, T, ...]`` with ``batch_first``, without a batch, packed or
    nested. They are 0 where ``lengths`` leaves a step out.

    Attributes:
        output: the output of ``forward``.
        h_n: the last h, as from ``forward``.
        c_n: the last c, as from ``forward``; None in a GRU or RNN.
        h: h of every step, ``[T, B, H]``, before dropout.
        c: c of every step, ``[T, B, H]``; None in a GRU or RNN.
        gates: the activated gates of every step by name, ``[T, B, H]`` each: ``i, f, g, o`` in an
            LSTM, ``r, z, n`` in a GRU, none in an RNN. None unless they were asked for.
    """

    output: Any
    h_n: Tensor
    c_n: Tensor | None
    h: tuple[tuple[Any, ...], ...]
    c: tuple[tuple[Any, ...], ...] | None
    gates: tuple[tuple[dict[str, Any], ...], ...] | None


def run(call: Call, wants_gates: bool) -> States:
    """Runs a prepared stack layer by layer and keeps every state.

    Gates are computed again, for all steps at once, from the h that entered each step. So their
    gradients flow through h, and no backend has to know about them.
    """
    facts = call.facts._replace(states=True)
    config = dispatch.decide(facts)[1]._replace(num_layers=1)
    x, h_0, c_0, params, masks = call.stack_inputs().cast(facts.cast)
    D, L = config.directions, facts.layers.num_layers
    sequences = call.sequences
    if sequences.batch_sizes is not None:  # its table goes to the device once for all layers
        sequences = with_table(sequences, x, h_0.shape[1], D)
    rows = rows_of(x, h_0.shape[1], D, sequences)
    each, finals, h, c, gates = len(params) // L, [], [], [], []
    for layer in range(L):
        of_layer = slice(layer * D, (layer + 1) * D)
        own = params[layer * each : (layer + 1) * each]
        inputs = StackInputs(x, h_0[of_layer], None if c_0 is None else c_0[of_layer], own, [])
        out, final, cs = rnn_stack(inputs, sequences, config, keep_states=True)
        finals.append(final)
        h.append(out.chunk(D, -1))
        if cs is not None:
            c.append(cs.unbind())
        if wants_gates:
            (weights,) = config.group(own)
            gates.append(_gates(config.cell, x, h[-1], inputs.h_0, weights, rows))
        x = out * masks[layer] if masks and layer < L - 1 else out
    hx = call.states_in_form([torch.cat(parts) for parts in zip(*finals, strict=True)])
    h_n, c_n = hx if isinstance(hx, tuple) else (hx, None)
    every: Any = [tree_map(call.in_form, tuple(of)) if of else None for of in (h, c, gates)]
    return States(call.in_form(out), h_n, c_n, *every)


def _gates(
    cell: str, x: Tensor, h: Sequence[Tensor], h_0: Tensor, weights: list[Weights], rows: Rows
) -> tuple[dict[str, Tensor], ...]:
    """Returns the gates of every step of one layer by direction and name, in the shape of h."""
    x, found = without_padding(x, rows), []
    for d, w in enumerate(weights):
        gx = F.linear(x, w.w_ih, w.b_ih).flatten(0, -2)
        entered = entering(rows, d, h_0[d], h[d].flatten(0, -2))
        *_, gates = CELLS[cell](gx, entered, gx.new_zeros(()), w)  # they do not depend on c
        gates = [without_padding(gate.unflatten(0, h[d].shape[:-1]), rows) for gate in gates]
        found.append(dict(zip(_GATES.get(cell, ""), gates, strict=False)))
    return tuple(found)
