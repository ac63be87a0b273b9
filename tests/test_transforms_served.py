"""Derivatives from outside of ``torch.func``: batches of gradients, compilers, foreign tangents.

What is served equals what plain calls give, one after another; the rest raises.
"""

from __future__ import annotations

import pytest
import torch
from test_transforms import assert_alike
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.func import vmap as map_over
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import fusedrnn

# What torch itself imports for forward-mode derivatives, and inductor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]

N, T, B, I, H = 3, 3, 3, 2, 3
RESET = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])
FORMS = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([3, 0, 2])},
    "reset": {"reset": RESET},
    "packed": None,
}
MODULES = {
    "lstm-2": lambda: fusedrnn.LSTM(I, H, num_layers=2),
    "gru-both-ways": lambda: fusedrnn.GRU(I, H, bidirectional=True),
    "gru-recompute": lambda: fusedrnn.GRU(I, H, recompute=True, reset_after=False),
}


def results_of(module, x, form):
    if form == "packed":
        (output, *_), states = module(PackedSequence(x.flatten(0, 1)[:6], torch.tensor([3, 2, 1])))
    else:
        output, states = module(x, **FORMS[form])
    return torch.cat([t.flatten() for t in (output, *tree_leaves(states))])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("backend", "name"), [*(("torch", name) for name in MODULES), ("triton", "lstm-2")]
)
def test_batches_of_gradients(backend, name, form):
    """``is_grads_batched`` is an older vmap than torch.func's."""
    module = MODULES[name]().double()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    sources = [x, *module.parameters()]
    with fusedrnn.use_backend(backend):
        results = results_of(module, x, form)
        vectors = torch.randn(N, len(results), dtype=torch.float64)

        def gradients(batched, **options):
            if batched:
                options |= {"is_grads_batched": True}
                return torch.autograd.grad(results, sources, vectors, retain_graph=True, **options)
            each = [
                torch.autograd.grad(results, sources, v, retain_graph=True, **options)
                for v in vectors
            ]
            return [torch.stack(parts) for parts in zip(*each, strict=True)]

        assert_alike(gradients(True), gradients(False))
        found, keep = [], {"retain_graph": True, "materialize_grads": True}
        for batched in (True, False):  # the gradients' own, and those one more time in a batch
            penalty = torch.stack([g.sin().sum() for g in gradients(batched, create_graph=True)])
            one = torch.autograd.grad(penalty.sum(), sources, retain_graph=True)
            basis = torch.eye(len(penalty), dtype=torch.float64)
            if batched:
                each = torch.autograd.grad(penalty, sources, basis, is_grads_batched=True, **keep)
            else:
                rows = [torch.autograd.grad(penalty, sources, v, **keep) for v in basis]
                each = [torch.stack(parts) for parts in zip(*rows, strict=True)]
            found.append([*one, *each])
        assert_alike(*found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_vectorised_jacobians(backend, form):
    module = MODULES["gru-both-ways"]().double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    f = lambda x: results_of(module, x, form)  # noqa: E731
    with fusedrnn.use_backend(backend):
        want = plain_jacobian(f, x)
        assert_alike(plain_jacobian(f, x, vectorize=True), want)
        of = lambda x: f(x).square().sum()  # noqa: E731
        assert_alike(plain_hessian(of, x, vectorize=True), plain_hessian(of, x))
        if form == "packed" and backend == "auto":
            return  # torch's operator itself has no forward-mode derivative there
        forward = plain_jacobian(f, x, vectorize=True, strategy="forward-mode")
        assert_alike(forward, want)


def test_gradcheck_of_batches():
    module = MODULES["lstm-2"]().double()
    x = torch.randn(2, 2, I, dtype=torch.float64, requires_grad=True)
    with fusedrnn.use_backend("torch"):
        f = lambda x, w: functional_call(module, {"weight_hh_l0": w}, (x,))[0]  # noqa: E731
        given = x, module.weight_hh_l0
        assert torch.autograd.gradcheck(f, given, check_batched_grad=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, given, check_batched_grad=True)


def transforms(module, params):
    """Each with its arguments."""

    def f(p, x):
        return functional_call(module, p, (x,))[0]

    def loss(p, x):
        return f(p, x).square().sum()

    def of_x(x):
        return f(params, x)

    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    xs = torch.randn(N, T, B, I, dtype=torch.float64)
    members = {name: torch.stack([p, 2 * p, -p]) for name, p in params.items()}

    def pulled(x):
        output, pull = vjp(of_x, x)
        return pull(torch.ones_like(output))

    def by_dual_numbers(x, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(of_x(forward_ad.make_dual(x, tangent))).tangent

    return {
        "vmap": (lambda p, xs: map_over(f, in_dims=(None, 0))(p, xs), params, xs),
        "ensemble": (lambda p, x: map_over(f, in_dims=(0, None))(p, x), members, x),
        "grad": (lambda p, x: grad(loss)(p, x), params, x),
        "per-sample": (lambda p, xs: map_over(grad(loss), in_dims=(None, 0))(p, xs), params, xs),
        "members": (lambda p, x: map_over(grad(loss), in_dims=(0, None))(p, x), members, x),
        "vjp": (pulled, x),
        "jvp": (lambda x, v: jvp(of_x, (x,), (v,)), x, tangent),
        "dual-numbers": (by_dual_numbers, x, tangent),
        "jacrev": (lambda x: jacrev(of_x)(x), x),
        "jacfwd": (lambda x: jacfwd(of_x)(x), x),
        "hessian": (lambda x: hessian(lambda x: loss(params, x))(x), x),
    }


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TRANSFORMS = tuple(transforms(fusedrnn.RNN(I, H), {}))
#: These take the reference, which is traced step by step.
TRACED = ("jvp", "dual-numbers", "jacfwd", "hessian")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("name", ["lstm-2", "gru-both-ways"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms_equal_plain_ones(backend, name, kind):
    """One graph, and in it our operator: a tangent that it dropped would be zero and no error."""
    module = MODULES[name]().double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    f, *given = transforms(module, params)[kind]
    with fusedrnn.use_backend("torch"):
        want = f(*given)
        got = torch.compile(f, fullgraph=True, backend=backend)(*given)
    assert_alike(got, want)
    assert all(t.count_nonzero() for t in tree_leaves(got))


@pytest.mark.usefixtures("_fresh")
def test_by_inductor():
    module = MODULES["gru-both-ways"]().double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    for kind in ("per-sample", "jvp"):
        f, *given = transforms(module, params)[kind]
        with fusedrnn.use_backend("torch"):
            assert_alike(torch.compile(f, fullgraph=True)(*given), f(*given))


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_was_compiled_without_tangents_refuses_them(backend):
    module = MODULES["gru-both-ways"]().double().requires_grad_(False)
    compiled = torch.compile(module, backend=backend)
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    assert_alike(compiled(x), module(x))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="carry no tangents; call the module itself"),
    ):
        compiled(forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_with_tangents_for_a_call_without_is_refused(create_graph, backend):
    """It would be differentiated forwards, through a backward that takes no tangents."""
    module, x = MODULES["lstm-2"]().double(), torch.randn(T, B, I, dtype=torch.float64)
    with fusedrnn.use_backend(backend):
        output, _ = module(x.requires_grad_())
        arriving = torch.ones_like(output)
        want = torch.autograd.grad(output, x, arriving, retain_graph=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(arriving, arriving)
            with pytest.raises(NotImplementedError, match=r"forward mode AD|carry no tangents"):
                torch.autograd.grad(output, x, dual, retain_graph=True, create_graph=create_graph)
            # One without tangents is nobody's concern.
            assert_alike(torch.autograd.grad(output, x, arriving), want)


def test_an_exported_program_takes_no_tangents_and_no_transform():
    module = MODULES["gru-both-ways"]().double().requires_grad_(False)
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    program = torch.export.export(module, (x,)).module()
    f = lambda x: program(x)[0]  # noqa: E731
    assert_alike(f(x), module(x)[0])
    with pytest.raises(NotImplementedError, match="carry no tangents; call the module itself"):
        jvp(f, (x,), (tangent,))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="carry no tangents; call the module itself"),
    ):
        f(forward_ad.make_dual(x, tangent))
    with pytest.raises(RuntimeError, match="Batching rule not implemented for fusedrnn"):
        map_over(f)(torch.stack([x, x]))
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda x: tree_map(torch.sum, f(x)))(x)
