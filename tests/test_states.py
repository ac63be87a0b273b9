"""`module.states()`: every state and gate of every step, and the gradients through them."""

from __future__ import annotations

import pytest
import torch
from test_ragged import KINDS, LENGTHS, MODULES, RESET, T, as_hx, build, padded_with_nan, states_for
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn.kernels.spec import Weights
from fusedrnn.reference import _CELLS

BACKENDS = ["torch", "triton"]
GATES = {"lstm": "ifgo", "gru": "rzn", "gru_reset_before": "rzn"}


def stepped(module, x, hx, lengths=None, reset=None):
    """h, c and gates, ``[layer][direction]``, each sequence walked by itself, step by step."""
    cell, two = module._cell, len(hx) == 2
    D = 1 + module.bidirectional
    T, B, _ = x.shape
    h_all, c_all, gates_all = [], [], []
    for layer in range(module.num_layers):
        of_layer = ([], [], [])
        for d in range(D):
            suffix = f"_l{layer}" + ("_reverse" if d else "")
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w = Weights(*(getattr(module, name + suffix) for name in names))
            row = layer * D + d
            hs, cs, gates = ([[None] * B for _ in range(T)] for _ in range(3))
            for b in range(B):
                n = T if lengths is None else int(lengths[b])
                h, c = hx[0][row, b], hx[1][row, b] if two else None
                for t in range(n) if d == 0 else reversed(range(n)):
                    border = t if d == 0 else t + 1
                    if reset is not None and border < n and reset[border, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c) if two else None
                    gx = torch.nn.functional.linear(x[t, b], w.w_ih, w.b_ih)
                    h, c, saved = _CELLS[cell](gx, h, c, w)
                    hs[t][b], cs[t][b], gates[t][b] = h, c, saved
                zero = torch.zeros_like(h)
                for t in range(n, T):
                    hs[t][b], cs[t][b] = zero, zero
                    gates[t][b] = (zero,) * 4
            of_layer[0].append(torch.stack([torch.stack(row) for row in hs]))
            of_layer[1].append(torch.stack([torch.stack(row) for row in cs]) if two else None)
            of_layer[2].append(
                {
                    name: torch.stack([torch.stack([g[i] for g in row]) for row in gates])
                    for i, name in enumerate(GATES.get(cell, ""))
                }
            )
        h_all.append(of_layer[0])
        c_all.append(of_layer[1])
        gates_all.append(of_layer[2])
        x = torch.cat(of_layer[0], -1)
    return h_all, c_all, gates_all


def leaves(h, c, gates):
    for of_layer in zip(h, c, gates, strict=True):
        for h_d, c_d, gates_d in zip(*of_layer, strict=True):
            yield h_d
            if c_d is not None:
                yield c_d
            yield from gates_d.values()


def of(states):
    c = states.c or [[None] * len(of_layer) for of_layer in states.h]
    return list(leaves(states.h, c, states.gates))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [None, "both"])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("cell", MODULES)
def test_every_state_and_gate_with_its_gradient(cell, layers, directions, kind, backend):
    module, options = build(cell, layers, directions), KINDS.get(kind, {})
    x = torch.randn(T, 5, 3, dtype=torch.float64, requires_grad=True)
    hx = tuple(state.requires_grad_() for state in states_for(module, 5))
    want = list(leaves(*stepped(module, x, hx, **options)))
    with fusedrnn.use_backend(backend):
        given = padded_with_nan(x, options.get("lengths"))
        states = module.states(given, as_hx(hx), gates=True, **options)
        output, _ = module(given, as_hx(hx), **options)
    got = of(states)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-10)
    torch.testing.assert_close(states.output, output)
    inputs = (x, *hx, *module.parameters())
    weights = [torch.randn_like(tensor) for tensor in want]
    for chosen in (slice(None), slice(0, 1), slice(-1, None)):  # all, and some of them alone
        grads = [
            torch.autograd.grad(
                sum((a * w).sum() for a, w in zip(each[chosen], weights[chosen], strict=True)),
                inputs,
                allow_unused=True,
                retain_graph=True,
            )
            for each in (got, want)
        ]
        for ours, theirs in zip(*grads, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero if ours is None or not ours.any() else ours,
                zero if theirs is None or not theirs.any() else theirs,
                atol=1e-10, rtol=1e-9,
            )  # fmt: skip


def test_forms_of_input():
    module = build("lstm", 2, 2, batch_first=True)
    x = torch.randn(5, T, 3, dtype=torch.float64)
    states = module.states(x, gates=True)
    assert states.h[1][0].shape == states.c[0][1].shape == (5, T, 5)
    assert states.gates[1][1]["o"].shape == (5, T, 5)
    torch.testing.assert_close(torch.cat(states.h[1], -1), states.output)
    alone = module.states(x[0], gates=True)
    torch.testing.assert_close(alone.gates[1][1]["o"], states.gates[1][1]["o"][0])
    torch.testing.assert_close(alone.c_n, states.c_n[:, 0])
    lengths = LENGTHS.clamp(min=1)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    of_packed = module.states(packed, gates=True)
    of_padded = module.states(x, lengths=lengths, gates=True)
    for ours, theirs in zip(of(of_packed), of(of_padded), strict=True):
        torch.testing.assert_close(pad_packed_sequence(ours, batch_first=True)[0], theirs)
    torch.testing.assert_close(of_packed.h_n, of_padded.h_n)


def test_what_was_not_asked_for_is_none():
    x = torch.randn(4, 2, 3)
    assert fusedrnn.LSTM(3, 5).states(x).gates is None
    states = fusedrnn.RNN(3, 5).states(x, gates=True)
    assert states.c is states.c_n is None
    assert states.gates == (({},),)


def test_dropout_between_layers_is_forwards():
    module = fusedrnn.GRU(3, 5, num_layers=3, dropout=0.5)
    x = torch.randn(4, 2, 3)
    torch.manual_seed(7)
    states = module.states(x, reset=RESET[:4, :2])
    torch.manual_seed(7)
    output, h_n = module(x, reset=RESET[:4, :2])
    torch.testing.assert_close(states.output, output)
    torch.testing.assert_close(states.h_n, h_n)


def test_a_projection():
    module = fusedrnn.LSTM(3, 5, proj_size=2, dtype=torch.float64)
    x = torch.randn(T, 5, 3, dtype=torch.float64)
    states = module.states(x, lengths=LENGTHS)
    assert states.h[0][0].shape == (T, 5, 2)
    assert states.c[0][0].shape == (T, 5, 5)
    output, (_, c_n) = module(x, lengths=LENGTHS)
    torch.testing.assert_close(states.output, output)
    last = (LENGTHS - 1).clamp(min=0)
    want = torch.where((LENGTHS > 0)[:, None], states.c[0][0][last, torch.arange(5)], 0.0)
    torch.testing.assert_close(c_n[0], want)
