"""Dropout between layers is torch's: its generator, its masks, on every backend.

On `auto` the CPU runs torch's operator; the loop and the kernels draw their masks themselves.
"""

from __future__ import annotations

import pytest
import torch
from test_modules_inputs import build, leaves
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import functional

BACKENDS = ("auto", "torch", "triton")
OURS = ("torch", "triton")
T, B = 2, 3
LENGTHS = torch.tensor([2, 1, 2])
RESET = torch.tensor([[False, True, False], [True, False, False]])

backends = pytest.mark.parametrize("backend", BACKENDS)
ours_only = pytest.mark.parametrize("backend", OURS)


def batch() -> Tensor:
    return torch.randn(T, B, 3, dtype=torch.float64)


def train(module: nn.Module, x: Tensor, run=None, **options) -> list[Tensor]:
    """Results and all gradients of one step of training."""
    x = x.detach().requires_grad_()
    results = leaves((run or module)(x, **options))
    loss = sum(result.square().sum() for result in results)
    return [*results, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_close(got, want) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def by_seed(state):
    torch.manual_seed(11)


def by_state(state):
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for b in BACKENDS for n in ("LSTM", "GRU", "RNN") if b != "triton" or n == "GRU"],
)
@pytest.mark.parametrize("restore", [by_seed, by_state])
def test_a_restored_generator_gives_torchs_masks(backend, name, restore):
    """Twice the same bit for bit, and what torch.nn does with that seed."""
    theirs, ours = build(name, num_layers=2, dropout=0.4)
    x = batch()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    want = train(theirs, x)
    found = []
    with fusedrnn.use_backend(backend):
        for _ in range(2):
            restore(state)
            found.append(train(ours, x))
        other = train(ours, x)
    assert all(map(torch.equal, *found))
    assert_close(found[0], want)
    assert not torch.allclose(other[0], want[0])


@ours_only
def test_the_masks_are_those_of_torchs_dropout_bit_for_bit(backend, monkeypatch):
    """0 or 1/(1-p) in the input's dtype, one for each layer but the last."""
    _, ours = build("GRU", torch.float32, num_layers=3, bidirectional=True, dropout=0.3)
    drawn, real = [], functional.dropout_masks
    monkeypatch.setattr(
        functional, "dropout_masks", lambda *args: drawn.extend(real(*args)) or list(drawn)
    )
    x = batch().float()
    torch.manual_seed(11)
    with fusedrnn.use_backend(backend), torch.no_grad():
        ours(x)
    torch.manual_seed(11)
    assert len(drawn) == 2
    for mask in drawn:
        assert torch.equal(mask, nn.functional.dropout(torch.ones(T, B, 10), 0.3))


@backends
def test_a_fork_of_the_generator_leaves_no_trace(backend):
    _, ours = build("LSTM", num_layers=2, dropout=0.5)
    x = batch()
    with fusedrnn.use_backend(backend):
        state = torch.get_rng_state()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            first = ours(x)[0]
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            assert torch.equal(ours(x)[0], first)
        ours(x)
        assert not torch.equal(torch.get_rng_state(), state)


@backends
@pytest.mark.parametrize(
    ("p", "training", "layers"), [(0.0, True, 2), (1.0, True, 2), (0.5, False, 2), (0.5, True, 1)]
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_nothing_is_drawn_where_nothing_is_random(backend, p, training, layers):
    theirs, ours = build("GRU", num_layers=layers, dropout=p)
    x = batch()
    want = train(theirs.train(training), x)
    state = torch.get_rng_state()
    with fusedrnn.use_backend(backend):
        got = train(ours.train(training), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(got, want)
    assert all(result.isfinite().all() for result in got)


FORMS = {
    "dense": (lambda: (batch(), {}), None),
    "batch first": (lambda: (batch().transpose(0, 1), {}), {"batch_first": True}),
    "unbatched": (lambda: (batch()[:, 0], {}), None),
    "lengths": (lambda: (batch(), {"lengths": LENGTHS}), None),
    "reset": (lambda: (batch(), {"reset": RESET}), None),
    "both": (lambda: (batch(), {"lengths": LENGTHS, "reset": RESET}), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_draws_alike_on_every_backend(form):
    make, options = FORMS[form]
    x, given = make()
    _, ours = build("LSTM", num_layers=2, dropout=0.4, **(options or {}))
    found, left = [], []
    for backend in BACKENDS:
        torch.manual_seed(3)
        with fusedrnn.use_backend(backend):
            found.append(train(ours, x, **given))
        left.append(torch.rand(3))
    for got, after in zip(found[1:], left[1:], strict=True):
        assert_close(got, found[0])
        assert torch.equal(after, left[0])


@ours_only
def test_states_are_those_of_the_forward(backend):
    _, ours = build("GRU", num_layers=2, dropout=0.4)
    x = batch()
    with fusedrnn.use_backend(backend):
        torch.manual_seed(3)
        want = ours(x)
        torch.manual_seed(3)
        states = ours.states(x)
    assert_close((states.output, states.h_n), want)


@backends
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_masks(backend, use_reentrant):
    """The recomputed forward draws what the first one drew; without its state it would not."""
    _, ours = build("GRU", num_layers=2, dropout=0.5)
    x = batch().requires_grad_()

    def gradients(**options):
        torch.manual_seed(7)
        ours.zero_grad()
        x.grad = None
        with fusedrnn.use_backend(backend):
            output = checkpoint(lambda x: ours(x)[0], x, **options) if options else ours(x)[0]
            output.square().sum().backward()
        return [x.grad, *(p.grad for p in ours.parameters())]

    want = gradients()
    assert all(map(torch.equal, gradients(use_reentrant=use_reentrant), want))
    if backend != "triton":
        other = gradients(use_reentrant=use_reentrant, preserve_rng_state=False)
        assert not torch.allclose(other[0], want[0])


@pytest.fixture
def deterministic():
    """`torch.use_deterministic_algorithms(True)`, which raises at what has no such algorithm."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("backend", "form"),
    [
        ("auto", "dense"),
        ("auto", "packed"),
        *(("torch", form) for form in ("dense", "lengths", "reset", "both", "packed", "jagged")),
        *(("triton", form) for form in ("dense", "both", "packed")),
    ],
)
def test_deterministic_algorithms_twice_the_same_bits(backend, form):
    _, ours = build("LSTM", num_layers=2, dropout=0.4)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (1, 2, 2)]
    if form == "packed":
        x, given = pack_sequence(sequences, enforce_sorted=False), {}
    elif form == "jagged":
        x, given = torch.nested.nested_tensor(sequences, layout=torch.jagged), {}
    else:
        x, given = FORMS[form][0]()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        with fusedrnn.use_backend(backend):
            output, final = ours(x, **given)
        output = output.values() if form == "jagged" else leaves(output)[0]
        results = [output, *leaves(final)]
        loss = sum(result.square().sum() for result in results)
        found.append([*results, *torch.autograd.grad(loss, list(ours.parameters()))])
    assert all(map(torch.equal, *found))
    assert all(result.isfinite().all() for result in found[0])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_deterministic_states_and_gates(backend):
    _, ours = build("GRU")
    x, found = batch(), []
    for _ in range(2):
        with fusedrnn.use_backend(backend):
            states = ours.states(x, lengths=LENGTHS, gates=True)
        loss = states.output.sum() + states.gates[0][0]["z"].square().sum()
        found.append([states.output, *torch.autograd.grad(loss, list(ours.parameters()))])
    assert all(map(torch.equal, *found))
