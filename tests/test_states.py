"""Tests of ``module.states()``: every state and gate of every step, with gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_equivalence import LAYOUTS, LENGTHS, MODULES, RESET, build, states_for, with_nan_padding
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import fusedrnn
from fusedrnn import states as states_module
from fusedrnn.arguments import as_hx
from fusedrnn.testing import assert_budget

T, B, I, H = *RESET.shape, 3, 5
KINDS = {kind: LAYOUTS[kind] for kind in ("dense", "lengths", "reset", "both")}
BEYOND = torch.arange(T).unsqueeze(1) >= LENGTHS
GATES = {"lstm": "ifgo", "gru": "rzn", "gru_reset_before": "rzn"}
BACKENDS = ["torch", "triton"]
every_cell = pytest.mark.parametrize("cell", MODULES)


def inputs_of(module):
    """Returns x ``[T, B, I]`` and a tuple of initial states, all of which require gradients."""
    x = torch.randn(T, B, I, dtype=torch.float64).requires_grad_()
    return x, tuple(state.requires_grad_() for state in states_for(module, B))


def step(cell, x, h, c, weights):
    """Returns h, c and the gates after one step, from the equations of the textbook."""
    w_ih, w_hh, b_ih, b_hh = weights
    of_x, of_h = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    if cell == "lstm":
        i, f, g, o = (of_x + of_h).chunk(4)
        gates = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
        c = gates["f"] * c + gates["i"] * gates["g"]
        return gates["o"] * c.tanh(), c, gates
    if cell.startswith("rnn"):
        return getattr(torch, cell[4:])(of_x + of_h), None, {}
    (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3), of_h.chunk(3)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    if cell == "gru_reset_before":
        h_n, r_n = F.linear(r * h, w_hh.chunk(3)[2], b_hh.chunk(3)[2]), 1.0
    else:
        r_n = r
    n = (x_n + r_n * h_n).tanh()
    return (1 - z) * n + z * h, None, {"r": r, "z": z, "n": n}


def stepped(module, x, hx, lengths=None, reset=None):
    """Returns every state and gate by name, such as ``f[0][1]``, each sequence by itself."""
    cell, zero, named = module._cell, x.new_zeros(H), {}
    for layer in range(module.num_layers):
        for d in range(1 + module.bidirectional):
            suffix = f"_l{layer}" + ("_reverse" if d else "")
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = [getattr(module, name + suffix) for name in names]
            row = layer * (1 + module.bidirectional) + d
            parts = ["h", *(["c"] if cell == "lstm" else []), *GATES.get(cell, "")]
            found = {part: [[zero] * x.shape[1] for _ in range(len(x))] for part in parts}
            for b in range(x.shape[1]):
                n = len(x) if lengths is None else int(lengths[b])
                h, c = hx[0][row, b], hx[1][row, b] if cell == "lstm" else None
                for t in range(n) if d == 0 else reversed(range(n)):
                    border = t if d == 0 else t + 1
                    if reset is not None and border < n and reset[border, b]:
                        h, c = zero, zero
                    h, c, gates = step(cell, x[t, b], h, c, weights)
                    for part, value in ({"h": h, "c": c} | gates).items():
                        if part in found:
                            found[part][t][b] = value
            for part, rows in found.items():
                named[f"{part}[{layer}][{d}]"] = torch.stack([torch.stack(row) for row in rows])
        x = torch.cat([named[f"h[{layer}][{d}]"] for d in range(1 + module.bidirectional)], -1)
    return named


def members(states):
    """Returns the tensors of ``States`` by the names of ``stepped``."""
    named = {}
    for layer, of_layer in enumerate(states.h):
        for d, h in enumerate(of_layer):
            named[f"h[{layer}][{d}]"] = h
            if states.c is not None:
                named[f"c[{layer}][{d}]"] = states.c[layer][d]
            named |= {f"{g}[{layer}][{d}]": v for g, v in states.gates[layer][d].items()}
    return named


def run(module, backend, x, hx, kind):
    with fusedrnn.use_backend(backend), fusedrnn.use_precision("ieee"):
        return module.states(
            with_nan_padding(x, kind.get("lengths")), as_hx(hx), gates=True, **kind
        )


def grads_of(tensors, leaves, cotangents):
    return torch.autograd.grad(
        tensors, leaves, cotangents, retain_graph=True, materialize_grads=True
    )


def compare(module, backend, kind, chosen=None):
    """Compares values, and the gradients of the chosen members (None: of all).

    In fp64 to the last digits, in fp32 within the error budget.
    """
    x, hx = inputs_of(module)
    given, found = module.weight_hh_l0.dtype, []
    for ours, dtype in ((True, given), (False, torch.float64), (False, torch.float32)):
        same = copy.deepcopy(module).to(dtype)
        x_, *hx_ = (t.detach().to(dtype).requires_grad_() for t in (x, *hx))
        states = run(same, backend, x_, hx_, kind) if ours else None
        named = members(states) if ours else stepped(same, x_, hx_, **kind)
        if ours:
            assert_is_forward(same, states, x_, hx_, kind)
            cotangents = {n: torch.randn_like(named[n]) for n in chosen or named}
        assert "lengths" not in kind or not any(t[BEYOND].any() for t in named.values())
        arriving = [g.to(dtype) for g in cotangents.values()]
        leaves = (x_, *hx_, *same.parameters())
        grads = grads_of([named[n] for n in cotangents], leaves, arriving)
        found.append(named | {f"gradient {i}": g for i, g in enumerate(grads)})
    got, truth, ref = found
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        if given == torch.float64:
            torch.testing.assert_close(got[name], want, atol=1e-10, rtol=1e-9, msg=name)
        else:
            assert_budget(name, got[name], ref[name], want)


def assert_is_forward(module, states, x, hx, kind):
    with torch.no_grad(), fusedrnn.use_backend("torch"):
        output, final = module(with_nan_padding(x, kind.get("lengths")), as_hx(hx), **kind)
    finals = final if isinstance(final, tuple) else (final,)
    torch.testing.assert_close([*states[: 1 + len(finals)]], [output, *finals])


@pytest.mark.parametrize("kind", KINDS)
@every_cell
def test_every_state_and_gate_with_its_gradient(cell, kind):
    compare(build(cell, 2, 2), "torch", KINDS[kind])


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [*((cell, torch.float32) for cell in MODULES), ("gru_reset_before", torch.float64)],
)
def test_on_kernels(cell, dtype):
    """By the resident schedule and the stepwise one."""
    compare(build(cell, 1, 2, dtype), "triton", KINDS["both"])


@pytest.mark.parametrize(
    ("name", "backend"),
    [("h[0][1]", "torch"), ("c[0][0]", "torch"), ("f[0][1]", "torch"), ("c[0][0]", "triton")],
)
def test_gradient_through_one_member_alone(name, backend):
    compare(build("lstm", 1, 2), backend, KINDS["both"], [name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_gradients_in_the_padding_reach_nothing(backend):
    module = build("lstm", 1, 2)
    x, hx = inputs_of(module)
    tensors = list(members(run(module, backend, x, hx, KINDS["lengths"])).values())
    clean = [torch.randn_like(t) * ~BEYOND.unsqueeze(-1) for t in tensors]
    leaves = (x, *hx, *module.parameters())
    want = grads_of(tensors, leaves, clean)
    got = grads_of(tensors, leaves, [with_nan_padding(each, LENGTHS) for each in clean])
    assert all(map(torch.equal, got, want))


def test_second_derivatives():
    module, kind, found = build("lstm", 1, 2), KINDS["both"], []
    x, hx = inputs_of(module)
    leaves = (x, *hx, *module.parameters())
    for named in (members(run(module, "torch", x, hx, kind)), stepped(module, x, hx, **kind)):
        loss = sum(named[name].square().sum() for name in ("c[0][0]", "c[0][1]", "o[0][1]"))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-9)


def test_batch_first_and_unbatched():
    module = build("lstm", 2, 2, batch_first=True)
    x, hx = inputs_of(module)
    want = stepped(module, x, hx, reset=RESET)
    batched = members(module.states(x.transpose(0, 1), hx, reset=RESET.t(), gates=True))
    one = tuple(state[:, 2] for state in hx)
    alone = members(module.states(x[:, 2], one, reset=RESET[:, 2], gates=True))
    for name in want:
        torch.testing.assert_close(batched[name], want[name].transpose(0, 1))
        torch.testing.assert_close(alone[name], want[name][:, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_and_nested_with_gradients(backend):
    module, lengths = build("lstm", 1, 2), torch.tensor([2, 4, 1])
    x = torch.randn(4, 3, I, dtype=torch.float64, requires_grad=True)
    hx = tuple(state[:, :3] for state in inputs_of(module)[1])
    want = stepped(module, x, hx, lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    parts = [x[:n, b] for b, n in enumerate(lengths)]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    leaves = (x, *module.parameters())
    cotangents = [torch.randn_like(tensor) for tensor in want.values()]
    grads = grads_of(list(want.values()), leaves, cotangents)
    for input, padded in (
        (packed, lambda each: pad_packed_sequence(each)[0]),
        (nested, lambda each: pad_sequence(each.unbind())),
    ):
        with fusedrnn.use_backend(backend):
            got = members(module.states(input, hx, gates=True))
        got = {name: padded(each) for name, each in got.items()}
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads_of(list(got.values()), leaves, cotangents), grads)


def test_empty_batch_and_absent_members():
    x = torch.zeros(T, 0, I, dtype=torch.float64)
    for lengths in (None, torch.zeros(0, dtype=torch.long)):
        states = build("lstm", 2, 2).states(x, lengths=lengths, gates=True)
        assert (states.output.shape, states.h_n.shape) == ((T, 0, 2 * H), (4, 0, H))
        assert all(tensor.shape == (T, 0, H) for tensor in members(states).values())
    assert build("lstm").states(x).gates is None
    states = build("rnn_tanh").states(x, gates=True)
    assert (states.c, states.c_n, states.gates) == (None, None, (({},),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_between_layers_is_that_of_forward(backend):
    module, x, results = build("gru", 3, dropout=0.5), torch.randn(4, 2, I).double(), []
    with fusedrnn.use_backend(backend):
        for call in (module.states, module):
            torch.manual_seed(7)
            results.append(call(x, reset=RESET[:4, :2]))
        other = module.states(x, reset=RESET[:4, :2])
    torch.testing.assert_close(results[0].output, results[1][0])
    torch.testing.assert_close(results[0].h_n, results[1][1])
    assert all(of_layer[0].all() for of_layer in results[0].h)  # before dropout
    assert torch.equal(results[0].h[0][0], other.h[0][0])
    assert not torch.allclose(results[0].h[1][0], other.h[1][0])


def test_a_projection_and_a_refusal():
    module = fusedrnn.LSTM(I, H, proj_size=2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    states = module.states(x, lengths=LENGTHS)
    assert (states.h[0][0].shape, states.c[0][0].shape) == ((T, B, 2), (T, B, H))
    output, (_, c_n) = module(x, lengths=LENGTHS)
    torch.testing.assert_close(states.output, output)
    torch.testing.assert_close(states.c_n, c_n)
    with fusedrnn.use_backend("aten"), pytest.raises(NotImplementedError, match="no state but the"):
        module.states(x)


def test_a_state_that_leaves_the_step_instead_is_found(monkeypatch):
    monkeypatch.setattr(states_module, "entering", lambda *of: of[-1])
    with pytest.raises(AssertionError, match=r"[ifgo]\[0\]\[0\]"):
        compare(build("lstm"), "torch", {})
