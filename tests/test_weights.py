"""Weights as of any module: wrapped, tied, frozen, replaced, copied, and trained through.

The truth is torch.nn's module in fp64, given the same weights. On `auto` the CPU runs torch's own
operator, on `torch` the loop, on `triton` the kernels step by step: one layer, since the
interpreter takes its time.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import test_modules_inputs as inputs
import torch
from test_modules_inputs import leaves
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize, prune

import fusedrnn

BACKENDS = ("auto", "torch", "triton")
NAMES = ("LSTM", "GRU", "RNN")
T, B = 2, 3

backends = pytest.mark.parametrize("backend", BACKENDS)
routes = pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for b in BACKENDS for n in NAMES if b != "triton" or n == "LSTM"],
)


def build(backend: str, name: str = "GRU", dtype: torch.dtype = torch.float64, **kwargs):
    """torch's module and ours, with as much around a cell as the backend has time for."""
    if backend != "triton":
        kwargs = {"num_layers": 2, "bidirectional": True, **kwargs}
    return inputs.build(name, dtype, **kwargs)


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


def train(module, steps: int = 2, make=torch.optim.Adam, clip: float | None = None) -> list[Tensor]:
    """What a loop of training leaves: every loss, norm and parameter."""
    optimizer, seen = make(raw(module), lr=0.05), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(module(batch(step)))
        loss.backward()
        seen.append(loss.detach())
        if clip:
            seen.append(clip_grad_norm_(module.parameters(), clip))
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


def mixed(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    parametrize.register_parametrization(module, "weight_hh_l0", Drop())
    parametrizations.spectral_norm(module, "weight_ih_l1_reverse")
    prune.random_unstructured(module, "bias_hh_l0", 0.5)


WRAPS = {
    "old weight_norm": old_weight_norm,
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_ih_l1"),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0_reverse"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l1"),
    "drop": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Drop()),
    "drop by hand": drop_by_hand,
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.4),
    "ln_structured": lambda m: prune.ln_structured(m, "weight_ih_l0", 0.4, n=2, dim=0),
    "mixed": mixed,
}


@pytest.mark.parametrize(
    ("backend", "name", "wrap"),
    [
        *((b, n, w) for b in BACKENDS[:2] for n in NAMES for w in WRAPS),
        *(("triton", "GRU", w) for w in ("old weight_norm", "drop", "l1_unstructured")),
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


@backends
@pytest.mark.parametrize("wrap", ["old weight_norm", "old spectral_norm", "l1_unstructured"])
def test_wrapped_modules_train_as_torchs(backend, wrap):
    """Of wrappers by hook; nn.LSTM itself does not see a parametrization."""
    theirs, ours = build(backend)
    for module in (theirs, ours):
        torch.manual_seed(1)  # of the power iteration
        WRAPS[wrap](module)
    assert_trains_alike(backend, theirs, ours)
    twin = copy.deepcopy(ours)
    assert_trains_alike(backend, theirs, twin, steps=1)


@backends
def test_wrappers_are_removed_without_a_trace(backend):
    theirs, ours = build(backend, "LSTM")
    prune.l1_unstructured(ours, "weight_hh_l0", 0.5)
    parametrizations.weight_norm(ours, "weight_ih_l0")
    with fusedrnn.use_backend(backend):
        want = ours(batch())[0]
        prune.remove(ours, "weight_hh_l0")
        parametrize.remove_parametrizations(ours, "weight_ih_l0")
        assert type(ours) is fusedrnn.LSTM
        assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert (theirs.weight_hh_l0 == 0).sum() == theirs.weight_hh_l0.numel() // 2
        assert_close([ours(batch())[0]], [want])
    assert_trains_alike(backend, theirs, ours)


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


def by_registration(module, weights):
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight.clone()))


def by_vector(module, weights):
    vector = nn.utils.parameters_to_vector([weights[n] for n, _ in module.named_parameters()])
    nn.utils.vector_to_parameters(vector, module.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), vector)


def by_assignment(module, weights):
    module.load_state_dict(weights, assign=True)


def after_meta(module, weights):
    module.to("meta")
    with fusedrnn.use_backend("auto"):
        output, _ = module(batch().to("meta"))
    assert output.shape == (T, B, 5 * (1 + module.bidirectional))
    module.to_empty(device="cpu").load_state_dict(weights)


def assigned_to_meta(module, weights):
    module.to("meta").load_state_dict(weights, assign=True)


def in_shared_memory(module, weights):
    module.share_memory()
    in_place(module, weights)
    assert all(p.is_shared() for p in module.parameters())


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


REPLACING = [
    *(by_attribute, by_data, in_place, by_registration, by_vector, by_assignment, by_swapping),
    *(after_meta, assigned_to_meta, in_shared_memory),
]


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


@backends
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_with_clipped_gradients(backend, optimizer):
    theirs, ours = build(backend, "LSTM")
    assert_trains_alike(backend, theirs, ours, make=optimizer, clip=0.5)


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


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "l1_unstructured"])
def test_state_dicts_of_wrapped_modules_go_through_a_file(wrap):
    theirs, ours = build("auto", "LSTM")
    for module in (theirs, ours):
        WRAPS[wrap](module)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    with torch.no_grad():
        assert torch.equal(ours.eval().weight_hh_l0, theirs.eval().weight_hh_l0)


def tensors_in(tree):
    """Of what a hook is given, without the module."""
    if isinstance(tree, (tuple, list)):
        return [tensor for part in tree for tensor in tensors_in(part)]
    return [tree] if isinstance(tree, Tensor) else []


@routes
def test_hooks_see_what_torchs_see(backend, name):
    found = []
    for module in build(backend, name):
        seen = {}
        keep = seen.__setitem__
        last = getattr(module, module._flat_weights_names[-1])
        x = batch().requires_grad_()
        for add, kind in (
            (module.register_forward_pre_hook, "arguments"),
            (module.register_forward_hook, "results"),
            (module.register_full_backward_pre_hook, "backward pre"),
            (module.register_full_backward_hook, "backward"),
            (module.weight_hh_l0.register_hook, "dW_hh"),
        ):
            add(lambda *given, keep=keep, kind=kind: keep(kind, tensors_in(given)))
        last.register_post_accumulate_grad_hook(lambda p, keep=keep: keep("last", [p.grad]))
        with fusedrnn.use_backend(backend):
            module(x)[0].sin().sum().backward()
        found.append(seen | {"x": [x.grad]})
    want, got = found
    assert got.keys() == want.keys()
    assert len(want) == 7
    for kind, tensors in want.items():
        assert_close(got[kind], tensors)
