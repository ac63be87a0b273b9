"""`module.states()`: every state and gate of every step, and the gradients through them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import one_by_one
from test_ragged import (
    KINDS,
    LENGTHS,
    MODULES,
    RESET,
    T,
    as_hx,
    build,
    everything,
    oracle,
    padded_with_nan,
    states_for,
)
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import layout, ops
from fusedrnn.testing import assert_budget

BACKENDS = ["torch", "triton"]
GATES = {"lstm": "ifgo", "gru": "rzn", "gru_reset_before": "rzn"}
BEYOND = torch.arange(T).unsqueeze(1) >= LENGTHS


def step(cell, x, h, c, weights):
    """States after one step of one sequence, by the operators of torch.nn's cells, and the gates.

    torch has no gates to show and no GRU that resets before: these are the textbook's equations.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    x, h, c = x[None], h[None], None if c is None else c[None]
    of_x, of_h = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    if cell == "lstm":
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        gates = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
        h, c = torch.lstm_cell(x, (h, c), *weights)
    elif cell.startswith("gru"):
        x_r, x_z, x_n = of_x.chunk(3, -1)
        h_r, h_z, h_n = of_h.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        if cell == "gru":
            n = (x_n + r * h_n).tanh()
            h = torch.gru_cell(x, h, *weights)
        else:
            n = (x_n + F.linear(r * h, w_hh.chunk(3)[2], b_hh.chunk(3)[2])).tanh()
            h = (1 - z) * n + z * h
        gates = {"r": r, "z": z, "n": n}
    else:
        h, gates = getattr(torch, f"{cell}_cell")(x, h, *weights), {}
    return h[0], None if c is None else c[0], {name: gate[0] for name, gate in gates.items()}


def stepped(module, x, hx, lengths=None, reset=None):
    """h, c and gates, ``[layer][direction]``, each sequence walked by itself, step by step."""
    cell, two = module._cell, len(hx) == 2
    T, B, _ = x.shape
    h_all, c_all, gates_all = [], [], []
    for layer in range(module.num_layers):
        of_layer = ([], [], [])
        for d in range(1 + module.bidirectional):
            suffix = f"_l{layer}" + ("_reverse" if d else "")
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = [getattr(module, name + suffix) for name in names]
            row = layer * (1 + module.bidirectional) + d
            zero = torch.zeros_like(hx[0][0, 0])
            # What no step fills stays zero.
            hs, cs = [[zero] * B for _ in range(T)], [[zero] * B for _ in range(T)]
            gates = [[dict.fromkeys(GATES.get(cell, ""), zero)] * B for _ in range(T)]
            for b in range(B):
                n = T if lengths is None else int(lengths[b])
                h, c = hx[0][row, b], hx[1][row, b] if two else None
                for t in range(n) if d == 0 else reversed(range(n)):
                    border = t if d == 0 else t + 1
                    if reset is not None and border < n and reset[border, b]:
                        h, c = zero, zero if two else None
                    h, c, gates[t][b] = step(cell, x[t, b], h, c, weights)
                    hs[t][b], cs[t][b] = h, c
            of_layer[0].append(torch.stack([torch.stack(row) for row in hs]))
            of_layer[1].append(torch.stack([torch.stack(row) for row in cs]) if two else None)
            of_layer[2].append(
                {
                    name: torch.stack([torch.stack([g[name] for g in row]) for row in gates])
                    for name in GATES.get(cell, "")
                }
            )
        for every, own in zip((h_all, c_all, gates_all), of_layer, strict=True):
            every.append(own)
        x = torch.cat(of_layer[0], -1)
    return h_all, c_all, gates_all


def members(h, c, gates):
    """All tensors by name, as ``c[0][1]`` or ``f[0][1]``: layer 0, direction 1."""
    named = {}
    for layer, of_layer in enumerate(zip(h, c, gates, strict=True)):
        for d, (h_d, c_d, gates_d) in enumerate(zip(*of_layer, strict=True)):
            named[f"h[{layer}][{d}]"] = h_d
            if c_d is not None:
                named[f"c[{layer}][{d}]"] = c_d
            named |= {f"{name}[{layer}][{d}]": gate for name, gate in gates_d.items()}
    return named


def of(states):
    c = states.c or [[None] * len(of_layer) for of_layer in states.h]
    return members(states.h, c, states.gates)


def grads_of(tensors, inputs, cotangents):
    grads = torch.autograd.grad(tensors, inputs, cotangents, allow_unused=True, retain_graph=True)
    zeros = map(torch.zeros_like, inputs)
    return [zero if g is None else g for g, zero in zip(grads, zeros, strict=True)]


def prepared(module, dtype=torch.float64):
    x = torch.randn(T, 5, 3, dtype=torch.float64).to(dtype).requires_grad_()
    return x, tuple(state.requires_grad_() for state in states_for(module, 5, dtype))


def run(module, backend, x, hx, kind):
    """The module's members and States; padding holds NaN."""
    with fusedrnn.use_backend(backend), fusedrnn.use_precision("ieee"):
        given = padded_with_nan(x, kind.get("lengths"))
        states = module.states(given, as_hx(hx), gates=True, **kind)
    return of(states), states


def compare(module, backend, kind, chosen=None):
    """Values, and gradients of the chosen members (all of them if None) at random cotangents."""
    x, hx = prepared(module)
    want = members(*stepped(module, x, hx, **kind))
    got, states = run(module, backend, x, hx, kind)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-11, rtol=1e-10, msg=name)
        if "lengths" in kind:
            assert not got[name][BEYOND].any(), name
    D = 1 + module.bidirectional
    last = [want[f"h[{module.num_layers - 1}][{d}]"] for d in range(D)]
    torch.testing.assert_close(states.output, torch.cat(last, -1))
    _, final = one_by_one(module, x, hx, **kind)
    for ours, theirs in zip((states.h_n, states.c_n), final, strict=False):
        torch.testing.assert_close(ours, theirs)
    leaves = (x, *hx, *module.parameters())
    chosen = chosen or list(want)
    cotangents = [torch.randn_like(want[name]) for name in chosen]
    both = [grads_of([each[name] for name in chosen], leaves, cotangents) for each in (got, want)]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("cell", MODULES)
def test_every_state_and_gate_with_its_gradient(cell, layers, directions, kind):
    compare(build(cell, layers, directions), "torch", KINDS.get(kind, {}))


@pytest.mark.parametrize(
    ("layers", "directions", "kind"), [(1, 2, "both"), (2, 1, "lengths"), (1, 1, None)]
)
@pytest.mark.parametrize("cell", MODULES)
def test_the_stepwise_kernels(cell, layers, directions, kind):
    compare(build(cell, layers, directions), "triton", KINDS.get(kind, {}))


@pytest.mark.parametrize("kind", [None, "both"])
@pytest.mark.parametrize("cell", MODULES)
def test_the_resident_kernels_in_fp32(cell, kind):
    """Values and gradients, among them those of every c, within the error budget."""
    module, kind = build(cell, 1, 2, torch.float32), KINDS.get(kind, {})
    x, hx = prepared(module, torch.float32)
    cotangents, every = None, []
    for dtype, ours in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        same = copy.deepcopy(module).to(dtype)
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *hx)]
        x_, hx_ = leaves[0], tuple(leaves[1:])
        named = run(same, "triton", x_, hx_, kind)[0] if ours else None
        named = named or members(*stepped(same, x_, hx_, **kind))
        cotangents = cotangents or {n: torch.randn_like(t) for n, t in named.items()}
        given = [cotangents[name].to(dtype) for name in named]
        leaves += same.parameters()
        grads = grads_of(list(named.values()), leaves, given)
        every.append(named | {f"gradient {i}": g for i, g in enumerate(grads)})
    for name in every[2]:
        assert_budget(name, *(of_run[name] for of_run in every))


@pytest.mark.parametrize("name", ["h[0][1]", "h[1][0]", "c[0][0]", "c[1][1]", *"ifgo"])
def test_gradient_through_one_member_alone(name):
    """Of an LSTM, where all else has no gradient at all."""
    name += "" if "[" in name else "[0][1]"
    compare(build("lstm", 2, 2), "torch", KINDS["both"], [name])


@pytest.mark.parametrize("name", ["c[0][0]", "o[0][1]", "h[0][1]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["resident", "stepwise"])
def test_gradient_through_a_middle_step_of_the_kernels(name, dtype):
    module = build("lstm", 1, 2, dtype)
    x, hx = prepared(module, dtype)
    double = copy.deepcopy(module).double()
    x_, hx_ = x.double().detach().requires_grad_(), tuple(s.double() for s in hx)
    (got,) = torch.autograd.grad(run(module, "triton", x, hx, {})[0][name][2, 3].sum(), x)
    want = members(*stepped(double, x_, hx_))[name][2, 3].sum()
    (want,) = torch.autograd.grad(want, x_)
    assert want[2, 3].all()  # of that sequence, and up to that step in the direction's order
    assert not want[:, :3].any()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_that_arrives_in_the_padding_stays_there(backend):
    module = build("lstm", 1, 2)
    x, hx = prepared(module)
    named, _ = run(module, backend, x, hx, KINDS["lengths"])
    leaves = (x, *hx, *module.parameters())
    clean = [torch.randn_like(tensor) * ~BEYOND.unsqueeze(-1) for tensor in named.values()]
    poisoned = [padded_with_nan(cotangent, LENGTHS) for cotangent in clean]
    want = grads_of(list(named.values()), leaves, clean)
    for got, grad in zip(grads_of(list(named.values()), leaves, poisoned), want, strict=True):
        assert torch.equal(got, grad)


@pytest.mark.parametrize("kind", ["reset", "both"])
def test_second_derivatives(kind):
    module = build("lstm", 1, 2, H=3)
    x, hx = prepared(module)
    found = []
    for each in (
        run(module, "torch", x, hx, KINDS[kind])[0],
        members(*stepped(module, x, hx, **KINDS[kind])),
    ):
        loss = sum(each[name].square().sum() for name in ("c[0][0]", "c[0][1]", "o[0][1]"))
        leaves = (x, *hx, *module.parameters())
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-9)


def test_forms_of_input():
    module = build("lstm", 2, 2, batch_first=True)
    x = torch.randn(5, T, 3, dtype=torch.float64)
    states = module.states(x, gates=True)
    assert isinstance(states, fusedrnn.States)
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
    for ours, theirs in zip(of(of_packed).values(), of(of_padded).values(), strict=True):
        torch.testing.assert_close(pad_packed_sequence(ours, batch_first=True)[0], theirs)
    torch.testing.assert_close(of_packed.h_n, of_padded.h_n)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_batch_first_and_unbatched_with_resets(cell):
    module = build(cell, 2, 2, batch_first=True)
    x, hx = prepared(module)
    want = members(*stepped(module, x, hx, reset=RESET))
    kind = {"reset": RESET.t(), "gates": True}
    batched = of(module.states(x.transpose(0, 1), as_hx(hx), **kind))
    one = as_hx(tuple(state[:, 2] for state in hx))
    alone = of(module.states(x[:, 2], one, reset=RESET[:, 2], gates=True))
    for name in want:
        torch.testing.assert_close(batched[name], want[name].transpose(0, 1))
        torch.testing.assert_close(alone[name], want[name][:, 2])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_and_nested_with_gradients(backend, cell):
    module = build(cell, 1, 2)
    lengths = torch.tensor([2, 4, 1])
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    hx = states_for(module, 3)
    want = members(*stepped(module, x, hx, lengths))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    sequences = [x[:n, b] for b, n in enumerate(lengths)]
    nested = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    forms = (
        (packed, lambda each: pad_packed_sequence(each)[0]),
        (nested, lambda each: torch.nn.utils.rnn.pad_sequence(each.unbind())),
    )
    leaves = (x, *module.parameters())
    cotangents = [torch.randn_like(tensor) for tensor in want.values()]
    grads = grads_of(list(want.values()), leaves, cotangents)
    for input, padded in forms:
        with fusedrnn.use_backend(backend):
            got = of(module.states(input, as_hx(hx), gates=True))
        got = {name: padded(each) for name, each in got.items()}
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=name)
        for ours, theirs in zip(
            grads_of(list(got.values()), leaves, cotangents), grads, strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("cell", "gates"), [("lstm", False), ("lstm", True), ("gru", True), ("rnn_tanh", True)]
)
@pytest.mark.parametrize(
    "lengths", [None, torch.zeros(0, dtype=torch.long)], ids=["dense", "lengths"]
)
def test_empty_batch(cell, gates, lengths):
    x = torch.zeros(T, 0, 3, dtype=torch.float64)
    states = build(cell, 2, 2).states(x, lengths=lengths, gates=gates)
    assert states.output.shape == (T, 0, 10)
    assert states.h_n.shape == (4, 0, 5)
    everything = (*states.h, *(states.c or ()))
    everything += tuple(gate.values() for layer in states.gates or () for gate in layer)
    assert all(tensor.shape == (T, 0, 5) for part in everything for tensor in part)


def test_what_was_not_asked_for_is_none():
    x = torch.randn(4, 2, 3)
    assert fusedrnn.LSTM(3, 5).states(x).gates is None
    states = fusedrnn.RNN(3, 5).states(x, gates=True)
    assert states.c is states.c_n is None
    assert states.gates == (({},),)
    assert fusedrnn.GRU(3, 5).states(x).c is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_same(backend):
    module = build("lstm", 1, 2)
    x, hx = prepared(module)
    want, _ = run(module, backend, x, hx, KINDS["both"])
    with torch.no_grad():
        got, _ = run(module, backend, x, hx, KINDS["both"])
    for name in want:
        assert torch.equal(got[name], want[name])
        assert not got[name].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_dropout_between_layers_is_forwards(cell, backend):
    module = build(cell, 3, dropout=0.5)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    results = []
    with fusedrnn.use_backend(backend):
        for call in (module.states, module.states, module):
            torch.manual_seed(7)
            results.append(call(x, reset=RESET[:4, :2]))
        other = module.states(x, reset=RESET[:4, :2])  # another draw
    states, same, (output, final) = results
    h_n = final[0] if cell == "lstm" else final
    torch.testing.assert_close(states.output, output)
    torch.testing.assert_close(states.h_n, h_n)
    assert all(of_layer[0].all() for of_layer in states.h)  # before dropout
    assert torch.equal(states.h[1][0], same.h[1][0])
    assert torch.equal(states.h[0][0], other.h[0][0])
    assert not torch.allclose(states.h[1][0], other.h[1][0])


def test_autocast():
    module = build("lstm", 1, 2, torch.float32)
    half = copy.deepcopy(module).bfloat16()
    x = torch.randn(T, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = of(module.states(x, lengths=LENGTHS, gates=True))
    want = of(half.states(x.bfloat16(), lengths=LENGTHS, gates=True))
    for name in want:
        assert got[name].dtype == torch.bfloat16
        assert torch.equal(got[name], want[name])


def test_torchs_own_operator_refuses():
    module, x = fusedrnn.GRU(3, 5), torch.randn(4, 2, 3)
    with (
        fusedrnn.use_backend("aten"),
        pytest.raises(NotImplementedError, match="keeps no state but the last"),
    ):
        module.states(x)
    assert module.states(x).output.shape == (4, 2, 5)


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


@pytest.mark.parametrize("poison", [False, True])
def test_gradients_of_a_projection_with_lengths_and_resets(poison):
    """Here the loop runs on dense rows with gaps, where forward would pack them."""
    module = build("lstm", 2, 2, proj_size=2)
    x = torch.randn(T, 5, 3, dtype=torch.float64)
    hx = tuple(torch.randn(4, 5, n, dtype=torch.float64) for n in (2, 5))

    def ours(module, x, hx):
        states = module.states(padded_with_nan(x, LENGTHS), hx, **KINDS["both"])
        if poison:
            states.output.register_hook(lambda grad: padded_with_nan(grad, LENGTHS))
        return states.output, (states.h_n, states.c_n)

    want = everything(oracle(**KINDS["both"]), module, x, hx, torch.float64)
    got = everything(ours, module, x, hx, torch.float64)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-11, rtol=1e-10, msg=name)


# Traps: what would be wrong must be found.


def test_gates_of_the_step_itself_are_found(monkeypatch):
    """As if the state that leaves a step entered it."""
    monkeypatch.setattr(layout.Links, "entering", lambda self, left, initial: left)
    with pytest.raises(AssertionError, match=r"[ifgo]\[0\]\[0\]"):
        compare(build("lstm"), "torch", {})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lost_gradient_of_c_is_found(backend, monkeypatch):
    real = ops.stack_backward

    def without_d_cs(input, d_output, d_h_n, d_c_n, d_cs, *rest):
        return real(input, d_output, d_h_n, d_c_n, None, *rest)

    monkeypatch.setattr(ops, "stack_backward", without_d_cs)
    with pytest.raises(AssertionError, match="not close"):
        compare(build("lstm"), backend, {})
