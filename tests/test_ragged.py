"""Lengths, resets and packed input: everything equals the same sequences run one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import one_by_one
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import arguments, layout
from fusedrnn.kernels import rows as rows_module
from fusedrnn.kernels.rows import INITIAL, PREVIOUS, SKIPPED, ZERO, origins_of, packed_rows
from fusedrnn.testing import assert_budget

MODULES = {
    "lstm": lambda *a, **k: fusedrnn.LSTM(*a, **k),
    "gru": lambda *a, **k: fusedrnn.GRU(*a, **k),
    "gru_reset_before": lambda *a, **k: fusedrnn.GRU(*a, reset_after=False, **k),
    "rnn_tanh": lambda *a, **k: fusedrnn.RNN(*a, **k),
    "rnn_relu": lambda *a, **k: fusedrnn.RNN(*a, nonlinearity="relu", **k),
}
BACKENDS = ["torch", "triton"]
T, LENGTHS = 6, torch.tensor([4, 0, 6, 1, 5])
#: At the first step, in the middle, twice in a row, at the last step, and after the end.
RESET = torch.zeros(T, 5, dtype=torch.bool)
RESET[[0, 2, 3, 5], [0, 2, 2, 2]] = RESET[[4, 1, 5, 5], [4, 3, 0, 1]] = True
KINDS = {
    "lengths": {"lengths": LENGTHS},
    "reset": {"reset": RESET},
    "both": {"lengths": LENGTHS, "reset": RESET},
}


def build(cell, layers=1, directions=1, dtype=torch.float64, I=3, H=5, **options):
    options |= {"num_layers": layers, "bidirectional": directions == 2}
    return MODULES[cell](I, H, dtype=dtype, **options)


def states_for(module, batch, dtype=torch.float64):
    """h_0 and, for an LSTM, c_0, where the module is."""
    device = module.weight_hh_l0.device
    rows = module.num_layers * (1 + module.bidirectional)
    count = 2 if isinstance(module, fusedrnn.LSTM) else 1
    shape = rows, batch, module.hidden_size
    return tuple(torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(count))


def as_hx(states):
    return states if len(states) == 2 else states[0]


def everything(run, module, x, hx, dtype):
    """Output, states, and all gradients under one set of random cotangents, by name."""
    x = x.detach().to(dtype).requires_grad_()
    hx = tuple(state.detach().to(dtype).requires_grad_() for state in hx)
    output, final = run(module, x, hx)
    final = final if isinstance(final, tuple) else (final,)
    generator = torch.Generator().manual_seed(3)
    results = (output, *final)
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, dtype)
        for r in results
    ]
    leaves = (x, *hx, *module.parameters())
    # What no step leads to (the oracle's output where all lengths are 0) has no history.
    pairs = [(r, g) for r, g in zip(results, cotangents, strict=True) if r.requires_grad]
    given = [list(part) for part in zip(*pairs, strict=True)]
    grads = torch.autograd.grad(given[0], leaves, given[1], allow_unused=True)
    grads = [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
    ]
    names = ["output", *("h_n", "c_n")[: len(final)], "d_x", *("d_h_0", "d_c_0")[: len(hx)]]
    names += [f"d_{name}" for name, _ in module.named_parameters()]
    values = [*results, *grads]
    return {name: value.detach() for name, value in zip(names, values, strict=True)}


def padded_with_nan(x, lengths):
    if lengths is None:
        return x
    beyond = torch.arange(len(x)).unsqueeze(1) >= lengths
    return torch.where(beyond.unsqueeze(-1).to(x.device), torch.nan, x)


def ours(backend, **kind):
    """A run in which padding holds NaN, in the input and in the gradient that arrives."""

    def run(module, x, hx):
        x = padded_with_nan(x, kind.get("lengths"))
        with fusedrnn.use_backend(backend):
            output, final = module(x, as_hx(hx), **kind)
        if "lengths" in kind and output.requires_grad:
            output.register_hook(lambda grad: padded_with_nan(grad, kind["lengths"]))
        return output, final

    return run


def oracle(**kind):
    return lambda module, x, hx: one_by_one(module, x, hx, **kind)


def check(module, kind, backend, batch=5, steps=T):
    x = torch.randn(steps, batch, module.input_size, dtype=torch.float64)
    x, hx = x.to(module.weight_hh_l0.device), states_for(module, batch)
    want = everything(oracle(**kind), module, x, hx, torch.float64)
    got = everything(ours(backend, **kind), module, x, hx, torch.float64)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-11, rtol=1e-10, msg=name)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("cell", MODULES)
def test_equals_the_sequences_one_by_one(cell, layers, directions, kind, backend, device):
    """In fp64: the loop, and schedule stepwise. On a GPU, lengths and resets come from the CPU."""
    got = check(build(cell, layers, directions).to(device), KINDS[kind], backend)
    if "lengths" in KINDS[kind]:
        beyond = (torch.arange(T).unsqueeze(1) >= LENGTHS).to(device)
        assert not got["output"][beyond].any()


@pytest.mark.parametrize("kind", ["lengths", "both"])
@pytest.mark.parametrize(("layers", "directions"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("cell", MODULES)
def test_resident_kernels_in_fp32(cell, layers, directions, kind, device):
    check_budget(build(cell, layers, directions, torch.float32, H=20), KINDS[kind], device)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_half_precision_kernels(cell, device):
    check_budget(build(cell, 1, 2, torch.float16, H=20), KINDS["both"], device)


def check_budget(module, kind, device):
    """The kernels within the error budget that torch's own error on the same numbers sets."""
    dtype = module.weight_hh_l0.dtype
    module, double = module.to(device), copy.deepcopy(module).double()
    x, hx = torch.randn(T, 5, 3, dtype=torch.float64).to(dtype), states_for(module, 5, dtype)
    truth = everything(oracle(**kind), double, x, tuple(s.cpu() for s in hx), torch.float64)
    ref = everything(oracle(**kind), module, x.to(device), hx, dtype)
    with fusedrnn.use_precision("ieee"):
        got = everything(ours("triton", **kind), module, x.to(device), hx, dtype)
    for name in truth:
        assert_budget(name, got[name], ref[name], truth[name])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_lengths_and_resets(data):
    steps, batch = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    cell = data.draw(st.sampled_from(sorted(MODULES)))
    backend = data.draw(st.sampled_from(BACKENDS))
    row = st.lists(st.booleans(), min_size=batch, max_size=batch)
    kind = {}
    if data.draw(st.booleans()):
        kind["lengths"] = torch.tensor(
            data.draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
        )
    if data.draw(st.booleans()):
        resets = data.draw(st.lists(row, min_size=steps, max_size=steps))
        kind["reset"] = torch.tensor(resets)
    torch.manual_seed(0)
    module = build(cell, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)))
    check(module, kind, backend, batch, steps)


# PackedSequence and nested tensors.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", MODULES)
def test_packed_input_is_one_launch_and_never_padded(cell, backend, monkeypatch):
    """In one call of the launcher, on tensors that have a row for each step there is, no more."""
    from fusedrnn.kernels import resident

    seen = []
    real = resident.resident_fwd
    monkeypatch.setattr(
        resident,
        "resident_fwd",
        lambda cell, plan, x, *rest: seen.append(x.shape) or real(cell, plan, x, *rest),
    )
    module = build(cell, 2, 2, torch.float32, H=16)
    lengths = torch.tensor([3, 6, 1, 6])
    packed = pack_padded_sequence(torch.randn(6, 4, 3), lengths, enforce_sorted=False)
    hx = states_for(module, 4, torch.float32)
    with fusedrnn.use_backend(backend), torch.no_grad():
        output, final = module(packed, as_hx(hx))
    want, states = one_by_one(module, pad_packed_sequence(packed)[0], hx, lengths)
    torch.testing.assert_close(pad_packed_sequence(output)[0], want)
    final = final if isinstance(final, tuple) else (final,)
    for got, state in zip(final, states, strict=True):
        torch.testing.assert_close(got, state)
    if backend == "triton":
        assert len(seen) == 2  # one a layer, both directions
        assert all(int(lengths.sum()) in shape for shape in seen)


@pytest.mark.parametrize("cell", MODULES)
def test_nested_tensors_come_and_go(cell):
    module = build(cell, 2, 2)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 1)]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
    hx = states_for(module, 3)
    output, final = module(nested, as_hx(hx))
    assert output.is_nested
    assert output.layout == torch.jagged
    padded = torch.nn.utils.rnn.pad_sequence(sequences)
    want, states = one_by_one(module, padded, hx, torch.tensor([2, 5, 1]))
    for b, (got, n) in enumerate(zip(output.unbind(), (2, 5, 1), strict=True)):
        torch.testing.assert_close(got, want[:n, b])
    for got, state in zip(final if isinstance(final, tuple) else (final,), states, strict=True):
        torch.testing.assert_close(got, state)
    output.values().sum().backward()
    leaf = padded.requires_grad_()
    one_by_one(module, leaf, hx, torch.tensor([2, 5, 1]))[0].sum().backward()
    for b, (got, n) in enumerate(zip(nested.grad.unbind(), (2, 5, 1), strict=True)):
        torch.testing.assert_close(got, leaf.grad[:n, b])


# Forms of the arguments.


@pytest.mark.parametrize("backend", BACKENDS)
def test_forms_of_lengths_and_reset(backend):
    module = build("gru", 1, 2, batch_first=True)
    x = torch.randn(5, T, 3, dtype=torch.float64)
    with fusedrnn.use_backend(backend):
        want = module(x, lengths=LENGTHS, reset=RESET.t())[0]
        same = [
            module(x, lengths=LENGTHS.int(), reset=RESET.t().contiguous())[0],
            module(x, lengths=LENGTHS.tolist(), reset=RESET.t())[0],
            module(x, lengths=torch.stack((LENGTHS, LENGTHS), 1)[:, 0], reset=RESET.t())[0],
        ]
        alone = module(x[2], reset=RESET[:, 2])[0]
    for output in same:
        assert torch.equal(output, want)
    torch.testing.assert_close(alone, want[2])
    time_major, _ = one_by_one(module, x.transpose(0, 1), states_zero(module, 5), LENGTHS, RESET)
    torch.testing.assert_close(want, time_major.transpose(0, 1))


def states_zero(module, batch):
    return tuple(torch.zeros_like(s) for s in states_for(module, batch))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_of_the_steps_is_as_no_lengths(backend):
    module = build("lstm", 2, 2)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    with fusedrnn.use_backend(backend):
        full = module(x, lengths=torch.full((3,), 4))[0]
        plain = module(x)[0]
        none, (h_n, c_n) = module(x, lengths=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(full, plain, atol=1e-13, rtol=1e-13)
    assert not none.any()
    assert not h_n.any()
    assert not c_n.any()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_one_hx_for_all_sequences(cell, backend):
    module = build(cell, 2, 1)
    hx = tuple(state.requires_grad_() for state in states_for(module, 1))
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    with fusedrnn.use_backend(backend):
        output, _ = module(x, as_hx(hx))
        want, _ = module(x, as_hx(tuple(state.expand(-1, 3, -1).contiguous() for state in hx)))
    torch.testing.assert_close(output, want)
    got = torch.autograd.grad(output.sum(), hx)
    for g, w in zip(got, torch.autograd.grad(want.sum(), hx), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("cell", MODULES)
def test_derivatives_of_both_orders(cell):
    module = build(cell, 1, 2, H=2, I=2)
    lengths, reset = torch.tensor([3, 1]), torch.tensor([[0, 0], [1, 0], [0, 0]]).bool()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = tuple(state.requires_grad_() for state in states_for(module, 2))

    def run(x, *hx):
        with fusedrnn.use_backend("torch"):
            output, final = module(x, as_hx(hx), lengths=lengths, reset=reset)
        return output, *(final if isinstance(final, tuple) else (final,))

    assert torch.autograd.gradcheck(run, (x, *hx))
    assert torch.autograd.gradgradcheck(run, (x, *hx))


def test_lengths_under_autocast():
    module = fusedrnn.LSTM(3, 5)
    x, lengths = torch.randn(T, 5, 3), LENGTHS
    for hx_dtype in (torch.float32, torch.bfloat16):
        hx = states_for(module, 5, hx_dtype)
        with torch.autocast("cpu", torch.bfloat16), fusedrnn.use_backend("torch"):
            output, _ = module(x, hx, lengths=lengths)
        assert output.dtype == torch.bfloat16
        want, _ = module(x, tuple(s.float() for s in hx), lengths=lengths)
        torch.testing.assert_close(output.float(), want, atol=0.03, rtol=0.03)


BAD = {
    "lengths of floats": ({"lengths": LENGTHS.double()}, "lengths is torch.float64"),
    "lengths of bools": ({"lengths": LENGTHS > 1}, "lengths is torch.bool"),
    "lengths too few": ({"lengths": LENGTHS[:3]}, r"lengths has shape \(3,\); expected \(5,\)"),
    "lengths negative": ({"lengths": LENGTHS - 1}, "lengths has -1"),
    "lengths too large": ({"lengths": LENGTHS + 1}, "lengths has 7; the input has 6 steps"),
    "reset of integers": ({"reset": RESET.int()}, "reset is torch.int32"),
    "reset no tensor": ({"reset": [True]}, "reset is a list"),
    "reset transposed": ({"reset": RESET.t()}, r"reset has shape \(5, 6\); expected \(6, 5\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fusedrnn.GRU(3, 4)(torch.zeros(T, 5, 3), **options)


def test_what_has_lengths_of_its_own_takes_no_others():
    packed = pack_sequence([torch.zeros(3, 3), torch.zeros(2, 3)])
    for name, value in (("lengths", torch.tensor([1, 1])), ("reset", RESET)):
        with pytest.raises(ValueError, match=f"{name} was given with an input that has lengths"):
            fusedrnn.LSTM(3, 4)(packed, **{name: value})
    with pytest.raises(ValueError, match="lengths was given with an input without a batch"):
        fusedrnn.LSTM(3, 4)(torch.zeros(4, 3), lengths=torch.tensor([1]))
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(0, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="an empty sequence"):
        fusedrnn.LSTM(3, 4)(nested)


def test_torchs_own_operator_says_what_it_cannot():
    with fusedrnn.use_backend("aten"):
        with pytest.raises(NotImplementedError, match="takes no lengths and no reset"):
            fusedrnn.LSTM(3, 4)(torch.zeros(T, 5, 3), lengths=LENGTHS)
        with pytest.raises(NotImplementedError, match="keeps no state but the last"):
            fusedrnn.LSTM(3, 4).states(torch.zeros(T, 5, 3))


@pytest.mark.parametrize(("steps", "trains"), [(200_000, False), (20_000, True)])
def test_very_long_sequences(steps, trains):
    """A step costs the same however many there are; the last is padding."""
    module, theirs = fusedrnn.LSTM(1, 2), torch.nn.LSTM(1, 2)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(steps, 1, 1)
    with torch.set_grad_enabled(trains):
        output, (h_n, c_n) = module(x, lengths=torch.tensor([steps - 1]))
        want, (h_want, c_want) = theirs(x[:-1])
    assert not output[-1].any()
    torch.testing.assert_close(output[:-1], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((h_n, c_n), (h_want, c_want), atol=1e-5, rtol=1e-4)
    if trains:
        grads = torch.autograd.grad(output.square().mean(), list(module.parameters()))
        loss = want.square().sum() / output.numel()
        wanted = torch.autograd.grad(loss, list(theirs.parameters()))
        for got, expected in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


# The mechanism itself.


def test_origins_of_the_documented_example():
    """The table in docs/design.md."""
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[1, 0] = True
    origins = origins_of(4, 3, 2, torch.device("cpu"), torch.tensor([3, 0, 2]), reset)
    forward = [[INITIAL, ZERO, PREVIOUS, SKIPPED], [SKIPPED] * 4,
               [INITIAL, PREVIOUS, SKIPPED, SKIPPED]]  # fmt: skip
    backward = [[ZERO, PREVIOUS, INITIAL, SKIPPED], [SKIPPED] * 4,
                [PREVIOUS, INITIAL, SKIPPED, SKIPPED]]  # fmt: skip
    assert origins.transpose(1, 2).tolist() == [forward, backward]


def test_no_value_is_looked_at_on_the_way_to_the_kernels(monkeypatch):
    """What would wait for a GPU: there lengths and resets are only ever operands."""
    module = build("lstm", 2, 2, torch.float32)
    x = torch.randn(T, 5, 3, requires_grad=True)
    monkeypatch.setattr(arguments, "_checked_lengths", lambda lengths, *_: lengths)

    def look(self, *args, **kwargs):
        raise AssertionError("the host looked at a value")

    from fusedrnn.kernels import resident

    def watched(launch):
        def call(*args, **kwargs):
            with pytest.MonkeyPatch.context() as inside:  # the interpreter itself may look
                for name, real in looks.items():
                    inside.setattr(torch.Tensor, name, real)
                return launch(*args, **kwargs)

        return call

    for name in ("resident_fwd", "resident_bwd"):
        monkeypatch.setattr(resident, name, watched(getattr(resident, name)))
    names = ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__index__", "numpy")
    looks = {name: getattr(torch.Tensor, name) for name in names}
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, look)
    with fusedrnn.use_backend("triton"):
        output, _ = module(x, lengths=LENGTHS, reset=RESET)
        grads = torch.autograd.grad(output, (x, *module.parameters()), torch.ones_like(output))
    monkeypatch.undo()
    assert all(torch.isfinite(grad).all() for grad in grads)


def first_step_for_all(T, B, D, *rest):
    """The mask of step 0 used for all steps."""
    return origins_of(T, B, D, *rest)[:, :1].expand(D, T, B).contiguous()


def from_the_end_of_all(T, B, D, *rest):
    """The reverse direction does not begin at the end of its own sequence."""
    origins = origins_of(T, B, D, *rest)
    origins[1, :-1][origins[1, :-1] == INITIAL] = PREVIOUS
    return origins


def padding_counts(T, B, D, *rest):
    """Steps beyond the end are run like any other."""
    origins = origins_of(T, B, D, *rest)
    origins[origins == SKIPPED] = PREVIOUS
    return origins


def resets_lost(T, B, D, *rest):
    origins = origins_of(T, B, D, *rest)
    origins[origins == ZERO] = PREVIOUS
    return origins


@pytest.mark.parametrize(
    "trap", [first_step_for_all, from_the_end_of_all, padding_counts, resets_lost]
)
def test_traps_are_found(trap, monkeypatch):
    monkeypatch.setattr(layout, "origins_of", trap)
    with pytest.raises(AssertionError):
        check(build("gru", 1, 2), KINDS["both"], "triton")


def test_rows_of_packed_input():
    rows = packed_rows(torch.tensor([3, 2, 2, 1]), 2, torch.device("cpu"))
    assert rows.total == 8
    assert [(span.start, span.stop) for span in rows.spans()] == [(0, 3), (3, 5), (5, 7), (7, 8)]
    assert rows.starts.tolist() == [0, 3, 5, 7]
    assert rows.origins[0].tolist() == [[3, 3, 3], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert rows.origins[1].tolist() == [[1, 1, 3], [1, 1, 0], [1, 3, 0], [3, 0, 0]]
    assert rows_module.Rows(4, 2).spans()[3] == slice(6, 8)
