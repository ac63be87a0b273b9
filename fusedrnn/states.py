"""Every state and gate of every step, as tensors that gradients flow through.

Axes: T time, B batch, H hidden, P columns of h (H without a projection), L layers, D directions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .arguments import Call
from .functional import config_of, in_form, operands, states_in_form
from .kernels.rows import SKIPPED
from .kernels.spec import SPECS, Weights
from .launches import group_weights
from .layout import Links, layout_of, links_of, without_padding
from .reference import gates_of
from .transforms import rnn_stack


class States(NamedTuple):
    """What ``module.states(...)`` returns. Gradients flow through all of it.

    ``h``, ``c`` and ``gates`` are of one layer and direction each, ``h[layer][direction]``, in the
    form of the input: ``[T, B, ...]``, ``[B, T, ...]`` if ``batch_first``, without the batch of an
    unbatched input, packed or nested. Where ``lengths`` leaves a step out they are 0.

    Attributes:
        output: as of ``forward``.
        h_n: likewise.
        c_n: likewise; None in a GRU or RNN.
        h: h of every step, ``[T, B, P]``; before dropout.
        c: c of every step, ``[T, B, H]``; None in a GRU or RNN.
        gates: the activated gates of every step by torch's names, ``[T, B, H]`` each: of an LSTM
            ``i, f, g, o``, of a GRU ``r, z, n``, of an RNN none; None if they were not asked for.
    """

    output: Any
    h_n: Tensor
    c_n: Tensor | None
    h: tuple[tuple[Any, ...], ...]
    c: tuple[tuple[Any, ...], ...] | None
    gates: tuple[tuple[dict[str, Any], ...], ...] | None


def run(call: Call, wants_gates: bool) -> States:
    """Runs a prepared stack layer by layer.

    Gates are computed again from h of the step before, all steps at once: what gradients reach them
    then flows through h, and no kernel has to know.
    """
    call = call._replace(request=call.request._replace(states=True))
    request, D = call.request, call.request.directions
    config = config_of(call, dispatch.choose(request))._replace(num_layers=1)
    x, states, params, masks = operands(call)
    layout = layout_of(x, states[0].shape[1], D, call.ragged, False)
    links = [links_of(layout.rows, d, x.device) for d in range(D * wants_gates)]
    each, finals = len(params) // request.num_layers, []
    h, c, gates = [], [], []
    for layer in range(request.num_layers):
        given = [s[layer * D : (layer + 1) * D] for s in states]
        own = params[layer * each : (layer + 1) * each]
        out, final, cs = rnn_stack(x, given, own, [], call.ragged, config, keep_states=True)
        finals.append(final)
        h.append(out.chunk(D, -1))
        of_directions = () if cs is None or len(final) == 1 else cs.unbind()
        c.append([every.view(*out.shape[:-1], request.hidden_size) for every in of_directions])
        if wants_gates:
            (weights,) = group_weights(own, config)
            seen = without_padding(x, layout.rows)
            gates.append(
                [
                    _gates(request.cell, seen, h[-1][d], given[0][d], w, links[d])
                    for d, w in enumerate(weights)
                ]
            )
        x = out * masks[layer] if masks and layer < request.num_layers - 1 else out
    h_n, *c_n = states_in_form(call, [torch.cat(parts) for parts in zip(*finals, strict=True)])
    return States(
        output=in_form(call, out),
        h_n=h_n,
        c_n=c_n[0] if c_n else None,
        h=_formed(call, h),
        c=_formed(call, c) if c_n else None,
        gates=tuple(
            tuple({name: in_form(call, gate) for name, gate in named.items()} for named in of_layer)
            for of_layer in gates
        )
        if wants_gates
        else None,
    )


def _gates(
    cell: str, x: Tensor, h: Tensor, h_0: Tensor, w: Weights, links: Links
) -> dict[str, Tensor]:
    """One direction's gates of every step, by name, ``[..., H]``; zero where there is no step."""
    gx = F.linear(x, w.w_ih, w.b_ih).flatten(0, -2)
    named = gates_of(cell, gx, links.entering(h.flatten(0, -2), h_0), w)
    absent = (links.origins == SKIPPED).unsqueeze(1)
    shape = *h.shape[:-1], w.w_ih.shape[0] // SPECS[cell].gates
    return {name: torch.where(absent, 0.0, gate).view(shape) for name, gate in named.items()}


def _formed(call: Call, tensors: list) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(in_form(call, tensor) for tensor in of_layer) for of_layer in tensors)
