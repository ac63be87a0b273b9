"""Small LSTMs whose steps are oneDNN's: against torch.nn in fp64, and who goes that way."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import launches, onednn
from fusedrnn.kernels.rows import Rows
from fusedrnn.kernels.spec import Weights
from fusedrnn.launches import Config
from fusedrnn.layout import Ragged
from fusedrnn.testing import assert_budget

T, B, I, H = 9, 3, 7, 5
#: Numbers of gx in two steps of B sequences: 9 steps are five segments.
TWO_STEPS = 2 * B * 4 * H


@pytest.fixture(autouse=True)
def _by_our_backend():
    with fusedrnn.use_backend("torch"):
        yield


@pytest.fixture
def runs(monkeypatch):
    """The calls of oneDNN's steps, forward and backward."""
    found = []

    def spied(name):
        run = getattr(launches, name)

        def spy(*arguments):
            found.append(name)
            return run(*arguments)

        monkeypatch.setattr(launches, name, spy)

    spied("lstm_forward")
    spied("lstm_backward")
    return found


def couple(L=1, D=1, bias=True, **options):
    """torch.nn's module and ours with the same weights."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(I, H, L, bias=bias, bidirectional=D == 2)
    ours = fusedrnn.LSTM(I, H, L, bias=bias, bidirectional=D == 2, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def found(module, x, states, dtype=torch.float32, scale=1.0):
    """Results and gradients of all of them, in ``dtype``."""
    module = module.to(dtype)
    leaves = [(t * scale).to(dtype).requires_grad_() for t in (x, *states)]
    output, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]))
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator).to(dtype) for r in results.values()]
    names = ["x", "h_0", "c_0", *(name for name, _ in module.named_parameters())]
    gradients = torch.autograd.grad(list(results.values()), [*leaves, *module.parameters()], grads)
    return {**results, **{f"d_{n}": g for n, g in zip(names, gradients, strict=True)}}


def inputs(T=T, B=B, D=1, L=1):
    torch.manual_seed(2)
    return torch.randn(T, B, I), [torch.randn(L * D, B, H) for _ in range(2)]


def assert_agrees(theirs, ours, x, states, scale=1.0):
    got, reference = (found(module, x, states, scale=scale) for module in (ours, theirs))
    truth = found(theirs, x, states, torch.float64, scale)
    assert set(got) == set(truth)
    for name, want in truth.items():
        assert_budget(name, got[name], reference[name], want)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("segment", [onednn.SEGMENT, TWO_STEPS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("L", "D"), [(1, 1), (1, 2), (2, 2)])
def test_agrees_with_torch(L, D, bias, segment, recompute, runs, monkeypatch):
    monkeypatch.setattr(onednn, "SEGMENT", segment)
    theirs, ours = couple(L, D, bias, recompute=recompute)
    assert_agrees(theirs, ours, *inputs(D=D, L=L))
    assert {"lstm_forward", "lstm_backward"} == set(runs)


@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 3), (9, 1), (5, 0)])
def test_few_steps_and_sequences(T, B, runs):
    x, states = inputs(T, B)
    if B:
        assert_agrees(*couple(), x, states)
    else:
        got = found(couple()[1], x, states)
        assert all(not value.any() for value in got.values())
    assert runs == ["lstm_forward", "lstm_backward"]


def test_small_signals_keep_their_relative_precision():
    assert_agrees(*couple(D=2, bias=False), *inputs(D=2), scale=1e-5)


def test_only_some_gradients():
    """Of the output alone, of a final state alone, and without any of the weights'."""
    theirs, ours = couple()
    x, (h_0, c_0) = inputs()
    for which in range(3):
        results = []
        for module in (theirs, ours):
            leaf = x.clone().requires_grad_()
            output, (h_n, c_n) = module(leaf, (h_0, c_0))
            loss = (output, h_n, c_n)[which].square().sum()
            results.append(torch.autograd.grad(loss, [leaf, *module.parameters()]))
        for got, want in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, want)
    fixed = ours.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(fixed(leaf)[0].sum(), [leaf])
    (want,) = torch.autograd.grad(theirs(leaf)[0].sum(), [leaf])
    torch.testing.assert_close(got, want)


def test_gradients_of_each_sample():
    """As many sums as samples, which oneDNN does not have."""
    _, ours = couple()
    params = {name: p.detach() for name, p in ours.named_parameters()}
    xs = torch.randn(4, T, B, I)

    def loss(params, x):
        return torch.func.functional_call(ours, params, x)[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, xs)
    for n, x in enumerate(xs):
        want = torch.func.grad(loss)(params, x)
        for name in params:
            torch.testing.assert_close(got[name][n], want[name])


def test_the_operator_is_registered_correctly():
    """Schema, fake kernels, autograd and dynamic shapes, by torch's own checker."""
    x, states = inputs()
    params = list(couple()[1].parameters())
    for recompute in (False, True):
        config = Config("lstm", "torch", True, 1, False, "ieee", recompute=recompute, onednn=True)
        torch.library.opcheck(
            torch.ops.fusedrnn.rnn_forward.default,
            (x.requires_grad_(), *states, params, [], *Ragged(), *config, True),
        )


@pytest.mark.parametrize(("recompute", "kept"), [(False, 4 * H), (True, 0)])
def test_gx_and_h_are_kept_and_no_c(recompute, kept):
    x, states = inputs()
    config = Config("lstm", "torch", True, 1, False, "ieee", recompute=recompute, onednn=True)
    arguments = x, *states, list(couple()[1].parameters()), [], *Ragged(), *config
    _, _, _, gates, cs, hidden = torch.ops.fusedrnn.rnn_forward(*arguments, True)
    assert (gates.numel(), cs.numel(), hidden.numel()) == (T * B * kept, 0, 0)


def test_backward_needs_no_more_than_a_segment(monkeypatch):
    """What oneDNN keeps does not grow with T."""
    monkeypatch.setattr(onednn, "SEGMENT", TWO_STEPS)
    sizes, run = [], onednn._Steps.backward

    def spy(self, steps, *arguments):
        sizes.append(steps.stop - steps.start)
        return run(self, steps, *arguments)

    monkeypatch.setattr(onednn._Steps, "backward", spy)
    found(couple()[1], *inputs())
    assert sizes == [1, 2, 2, 2, 2]


def test_backward_follows_forward_whatever_the_switch_says_by_then(runs):
    _, ours = couple()
    output, _ = ours(inputs()[0])
    torch._C._set_mkldnn_enabled(False)
    try:
        output.sum().backward()
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert runs == ["lstm_forward", "lstm_backward"]


def says(module, *arguments, **options):
    return str(fusedrnn.explain(module, *arguments, **options)).splitlines()[2]


def test_explain_says_whose_the_steps_are():
    x = inputs()[0]
    assert says(couple()[1], x) == "steps: oneDNN's"
    torch._C._set_mkldnn_enabled(False)
    try:
        assert says(couple()[1], x) == "steps: a loop"
    finally:
        torch._C._set_mkldnn_enabled(True)


def _others():
    x = inputs()[0]
    yield "lengths", fusedrnn.LSTM(I, H), x, {"lengths": torch.tensor([9, 2, 4])}
    yield "reset", fusedrnn.LSTM(I, H), x, {"reset": torch.rand(T, B) < 0.3}
    yield "packed", fusedrnn.LSTM(I, H), pack_padded_sequence(x, [9, 4, 2]), {}
    yield "projection", fusedrnn.LSTM(I, H, proj_size=2), x, {}
    yield "large", fusedrnn.LSTM(I, onednn.MOST + 1), x, {}
    yield "GRU", fusedrnn.GRU(I, H), x, {}
    for dtype in (torch.float64, torch.bfloat16):
        yield str(dtype), fusedrnn.LSTM(I, H, dtype=dtype), x.to(dtype), {}


@pytest.mark.parametrize(
    ("module", "x", "options"), [pytest.param(*rest, id=name) for name, *rest in _others()]
)
def test_what_it_does_not_take(module, x, options, runs):
    assert says(module, x, **options) == "steps: a loop"
    output = module(x, **options)[0]
    (output.data if hasattr(output, "batch_sizes") else output).float().sum().backward()
    assert runs == []


def test_states_of_every_step_are_the_loops(runs):
    couple()[1].states(inputs()[0])
    assert runs == []


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_and_device_do_not_matter(default):
    w = Weights(torch.empty(4 * H, 0), torch.randn(4 * H, H), None, None)
    gx, states = torch.randn(1, T * B, 4 * H), torch.zeros(2, 1, B, H)
    left = [torch.full((T * B, H), torch.nan) for _ in range(2)]

    def run(out):
        onednn.lstm_forward(gx, [w], *states, out, *torch.empty_like(states), Rows(T, B))

    run(left[0])
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            run(left[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(*left)


def test_tokens_train_by_it_too(runs):
    """Their gx is a look-up."""
    theirs = torch.nn.LSTM(I, H)
    ours = fusedrnn.TokenLSTM.of(None, theirs)
    tokens = torch.randint(I, (T, B))
    rows = torch.nn.functional.one_hot(tokens, I).float()
    got, want = (
        torch.autograd.grad(module(input)[0].square().sum(), list(module.parameters()))
        for module, input in ((ours, tokens), (theirs, rows))
    )
    torch.testing.assert_close(got, want)
    assert runs == ["lstm_forward", "lstm_backward"]


@pytest.mark.parametrize("first", ["inference", "another default device", "another default dtype"])
def test_what_is_kept_from_call_to_call_suits_every_later_call(first):
    """The identity and the zeros, whatever mode or default the first call found."""
    torch.manual_seed(0)
    module, x = fusedrnn.LSTM(4, 16), torch.randn(3, 2, 4)
    weights = list(module.parameters())
    with fusedrnn.use_backend("torch"):
        want = torch.autograd.grad(module(x)[0].sum(), weights)
        onednn._nothing_to_do.cache_clear()
        if first == "inference":
            with torch.inference_mode():
                module(x)
        elif first == "another default device":
            with torch.device("meta"):
                module(x, (x.new_zeros(1, 2, 16), x.new_zeros(1, 2, 16)))
        else:
            torch.set_default_dtype(torch.float64)
            try:
                module(x)
            finally:
                torch.set_default_dtype(torch.float32)
        got = torch.autograd.grad(module(x)[0].sum(), weights)
    for left, right in zip(got, want, strict=True):
        assert torch.equal(left, right)
