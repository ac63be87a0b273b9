"""Weights as of any module: wrapped, tied, frozen, replaced, copied, and trained through.

The truth is torch.nn's module in fp64, given the same weights. ``aten`` is torch's own operator,
``torch`` the loop, ``triton`` the kernels, one layer, step by step.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_leaves as leaves

import fusedrnn

BACKENDS = ("aten", "torch", "triton")
NAMES = ("LSTM", "GRU", "RNN")
T, B = 2, 3

backends = pytest.mark.parametrize("backend", BACKENDS)
routes = pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for b in BACKENDS for n in NAMES if b != "triton" or n == "LSTM"],
)


def build(backend: str, name: str = "GRU", dtype: torch.dtype = torch.float64, **kwargs):
    """Returns torch's module and ours, two layers in both directions but on the kernels."""
    if backend != "triton":
        kwargs = {"num_layers": 2, "bidirectional": True, **kwargs}
    theirs = getattr(nn, name)(3, 5, dtype=dtype, **kwargs)
    ours = getattr(fusedrnn, name)(3, 5, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, B, 3, dtype=torch.float64, generator=generator)


def assert_close(got, want, tolerance: float = 1e-12) -> None:
    got, want = list(got), list(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


def loss_of(results) -> Tensor:
    return sum(result.sin().sum() for result in leaves(results))


def raw(module: nn.Module) -> list[Tensor]:
    return [p for _, p in sorted(module.named_parameters())]


def train(module, steps: int = 2) -> list[Tensor]:
    """Returns every loss of some steps of training, and the parameters after them."""
    optimizer, seen = torch.optim.Adam(raw(module), lr=0.05), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(module(batch(step)))
        loss.backward()
        seen.append(loss.detach())
        optimizer.step()
    return seen + [p.detach().clone() for p in raw(module)]


def assert_trains_alike(backend: str, theirs, ours, **options) -> None:
    before = [p.detach().clone() for p in raw(ours)]
    want = train(theirs, **options)
    with fusedrnn.use_backend(backend):
        assert_close(train(ours, **options), want, 1e-10)
    assert any(not torch.equal(b, p) for b, p in zip(before, raw(ours), strict=True))


# Wrapped weights.


class Drop(nn.Module):
    """Dropout of a weight, drawn anew at every access; keeps what it drew."""

    def __init__(self):
        super().__init__()
        self.drawn: list[Tensor] = []

    def forward(self, weight):
        self.drawn.append(nn.functional.dropout(weight, 0.5, self.training))
        return self.drawn[-1]


def old_weight_norm(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_hh_l0")


def drop_by_hand(module):
    """The older recipe: the Parameter is renamed, and a tensor stands in its place."""
    weight = module.weight_hh_l1
    del module.weight_hh_l1
    module.register_parameter("raw", weight)

    def draw(module, _):
        module.weight_hh_l1 = module.raw * (torch.arange(5.0, dtype=torch.float64) > 1)

    draw(module, ())
    module.register_forward_pre_hook(draw)


WRAPS = {
    "old weight_norm": old_weight_norm,
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_ih_l1"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0_reverse"),
    "drop": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Drop()),
    "drop by hand": drop_by_hand,
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.4),
}


@pytest.mark.parametrize(
    ("backend", "name", "wrap"),
    [
        *(("torch", n, w) for n in NAMES for w in WRAPS),
        *(("aten", "LSTM", w) for w in WRAPS),
        ("triton", "GRU", "old weight_norm"),
    ],
)
def test_a_wrapped_weight_runs_and_its_gradient_is_torchs(backend, name, wrap):
    theirs, ours = build(backend, name)
    WRAPS[wrap](ours)
    x = batch().requires_grad_()
    with parametrize.cached(), fusedrnn.use_backend(backend):
        for _ in range(2):  # what hooks leave behind after a backward does not disturb the next
            results = leaves(ours(x))
            weights = {n: getattr(ours, n) for n in ours._flat_weights_names}
            want = leaves(torch.func.functional_call(theirs, weights, (x,)))
            assert_close(results, want)
            sources = [x, *raw(ours)]
            got, want = (
                torch.autograd.grad(loss_of(r), sources, retain_graph=True) for r in (results, want)
            )
            assert_close(got, want)


@backends
def test_a_dropped_weight_is_drawn_once_a_call(backend):
    theirs, ours = build(backend, "LSTM")
    drop = Drop()
    parametrize.register_parametrization(ours, "weight_hh_l0", drop)
    drop.drawn.clear()
    x, (source,) = batch(), [ours.parametrizations.weight_hh_l0.original]
    with fusedrnn.use_backend(backend):
        for call in range(2):
            output, _ = ours(x)
            assert len(drop.drawn) == call + 1
            weights = dict(ours.named_parameters())
            weights = {n: p for n, p in weights.items() if "." not in n}
            weights["weight_hh_l0"] = drop.drawn[-1]
            want, _ = torch.func.functional_call(theirs, weights, (x,))
            assert_close([output], [want])
            (grad,) = torch.autograd.grad(output.sum(), source, retain_graph=True)
            assert_close([grad], torch.autograd.grad(want.sum(), source))
            assert torch.equal(grad == 0, drop.drawn[-1] == 0)
        assert not torch.equal(*drop.drawn)
        with parametrize.cached():
            assert torch.equal(ours(x)[0], ours(x)[0])
        assert len(drop.drawn) == 3


# Tied, frozen and replaced weights.


@backends
def test_gradients_of_tied_weights_add(backend):
    """Two modules share a weight, and one of them uses it for two things."""

    def tied(kind):
        torch.manual_seed(2)
        first, second = (kind(5, 5, layers, dtype=torch.float64) for layers in (1, 2))
        second.weight_hh_l0 = first.weight_hh_l0
        second.weight_ih_l1 = second.weight_hh_l1
        return nn.ModuleList((first, second))

    def run(modules):
        x = torch.ones(T, B, 5, dtype=torch.float64).cumsum(0)
        first, second = modules
        middle, _ = first(x)
        loss_of(second(middle)).backward()
        return [p.grad for p in raw(modules)]

    want = run(tied(nn.GRU))
    assert len(want) == 4 + 8 - 2
    with fusedrnn.use_backend(backend):
        assert_close(run(tied(fusedrnn.GRU)), want)


FROZEN = {
    "W_ih": ("weight_ih",),
    "W_hh": ("weight_hh",),
    "biases": ("bias",),
    "one layer": ("_l0",),
    "all but b_hh": ("weight", "bias_ih"),
    "all": ("",),
}


@backends
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_weights_get_no_gradient_and_the_others_theirs(backend, frozen):
    theirs, ours = build(backend, "LSTM")
    found = []
    for module in (theirs, ours):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not any(part in name for part in FROZEN[frozen]))
        x = batch().requires_grad_()
        with fusedrnn.use_backend(backend):
            loss_of(module(x)).backward()
        found.append({n: p.grad for n, p in module.named_parameters()} | {"x": x.grad})
    want, got = found
    for name in want:
        is_frozen = name != "x" and any(part in name for part in FROZEN[frozen])
        assert (got[name] is None) == is_frozen == (want[name] is None), name
    assert_close(*([g for g in of.values() if g is not None] for of in (got, want)))


def by_attribute(module, weights):
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight.clone()))


def by_data(module, weights):
    for name, weight in weights.items():
        getattr(module, name).data = weight.clone()


def in_place(module, weights):
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(module, name).copy_(weight)


def by_assignment(module, weights):
    module.load_state_dict(weights, assign=True)


def by_swapping(module, weights):
    """Conversion and loading keep each Parameter's identity, which an optimizer may hold."""
    before = list(map(id, module.parameters()))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.float().load_state_dict(weights)
        module.double().load_state_dict(weights)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert list(map(id, module.parameters())) == before


REPLACING = [by_attribute, by_data, in_place, by_assignment, by_swapping]


@pytest.mark.parametrize(
    ("backend", "replace"),
    [
        *((backend, replace) for backend in BACKENDS[:2] for replace in REPLACING),
        *(("triton", replace) for replace in (by_attribute, by_data, in_place)),
    ],
)
def test_new_weights_are_seen_at_once(backend, replace):
    """Also after a forward and backward with the old ones."""
    theirs, ours = build(backend)
    theirs.reset_parameters()
    with fusedrnn.use_backend(backend):
        loss_of(ours(batch())).backward()
        replace(ours, {n: p.detach().clone() for n, p in theirs.named_parameters()})
    ours.requires_grad_()
    assert_trains_alike(backend, theirs, ours)


@backends
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_new_data_before_backward_changes_no_gradient(backend, name):
    """``p.data = new`` replaces what the next forward reads, not what this one saved."""
    theirs, ours = build(backend, name)
    found = []
    for module in (theirs, ours):
        with fusedrnn.use_backend(backend):
            loss = loss_of(module(batch()))
        for p in module.parameters():
            p.data = torch.zeros_like(p)
        found.append(torch.autograd.grad(loss, raw(module)))
    assert_close(*found)


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 1, 2])])
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_the_output_may_be_modified_in_place(name, lengths):
    """As that of torch's operator on the CPU, by the loop at any number of steps."""
    _, ours = build("torch", name)
    found = []
    for in_place in (False, True):
        with fusedrnn.use_backend("torch"):
            output, h_n = ours(batch(), lengths=lengths)
        if in_place:
            output += 1
            output.relu_()
        else:
            output = (output + 1).relu()
        found.append(torch.autograd.grad(output.sum() + h_n.sum(), raw(ours)))
    assert_close(*found, 0)


@backends
def test_a_weight_changed_before_backward_is_noticed(backend):
    """The optimizer stepped too early: torch's error, and no wrong gradient."""
    for module in build(backend):
        with fusedrnn.use_backend(backend):
            output, _ = module(batch())
        with torch.no_grad():
            module.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@routes
def test_backward_twice_through_one_graph(backend, name):
    _, ours = build(backend, name)
    with fusedrnn.use_backend(backend):
        loss = loss_of(ours(batch()))
        first = torch.autograd.grad(loss, raw(ours), retain_graph=True)
        again = torch.autograd.grad(loss, raw(ours))
    assert all(map(torch.equal, first, again))


# Calls with other weights.


@routes
def test_functional_calls(backend, name):
    theirs, ours = build(backend, name)
    before = copy.deepcopy(ours.state_dict())
    weights = {n: (2 * p).detach().requires_grad_() for n, p in ours.named_parameters()}
    want = loss_of(torch.func.functional_call(theirs, weights, (batch(),)))
    want_grads = torch.autograd.grad(want, list(weights.values()))
    with fusedrnn.use_backend(backend):
        got = loss_of(torch.func.functional_call(ours, weights, (batch(),)))
        grads = torch.autograd.grad(got, list(weights.values()))
        with pytest.warns(FutureWarning, match="functional_call"):
            old = nn.utils.stateless.functional_call(ours, weights, (batch(),))
    assert_close([got, loss_of(old), *grads], [want, want, *want_grads])
    assert all(torch.equal(before[n], p) for n, p in ours.state_dict().items())


# Copies, files, hooks.


@routes
def test_a_copy_in_the_middle_of_training_goes_on_alike(backend, name):
    theirs, ours = build(backend, name)
    with fusedrnn.use_backend(backend):
        train(ours, 1)
        loss_of(ours(batch(7))).backward()
        twins = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    theirs.load_state_dict(ours.state_dict())
    start = copy.deepcopy(theirs)
    want = train(theirs)
    with fusedrnn.use_backend(backend):
        for module in twins:
            assert_close(train(module), want, 1e-10)
    assert_trains_alike(backend, start, ours)
