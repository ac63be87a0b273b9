"""``torch.func`` over every cell and form of input: lengths, resets, packed rows, other equations.

The truth is one backward after another without any transform, which the other tests hold against
torch.nn. Members with lengths, resets and gradients are in `test_transforms.py`.
"""

from __future__ import annotations

import pytest
import torch
from test_transforms import assert_alike, stacked
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp
from torch.func import vmap as map_over
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import fusedrnn

# What torch itself imports for forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

N, T, B, I, H = 3, 3, 3, 2, 3
LENGTHS, SIZES = torch.tensor([3, 0, 2]), torch.tensor([3, 2, 1])
RESET = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])
FORMS = {
    "plain": {},
    "lengths": {"lengths": LENGTHS},
    "reset": {"reset": RESET},
    "both": {"lengths": LENGTHS, "reset": RESET},
    "packed": None,
}
MODULES = {
    "lstm-2": lambda: fusedrnn.LSTM(I, H, num_layers=2),
    "gru-both-ways": lambda: fusedrnn.GRU(I, H, bidirectional=True),
    "gru-reset-before": lambda: fusedrnn.GRU(I, H, num_layers=2, reset_after=False),
    "rnn-relu": lambda: fusedrnn.RNN(I, H, nonlinearity="relu", bidirectional=True),
    "lstm-projected": lambda: fusedrnn.LSTM(I, H, proj_size=2),
    "gru-recompute": lambda: fusedrnn.GRU(I, H, recompute=True),
}
# The interpreter takes its time: of each form and of each cell one.
INTERPRETED = [
    *(("gru-reset-before", form) for form in ("lengths", "packed")),
    *(("rnn-relu", form) for form in ("both", "packed")),
    ("lstm-2", "reset"),
]
calls = pytest.mark.parametrize(
    ("backend", "name", "form"),
    [
        *(("auto", name, form) for name in MODULES for form in FORMS),
        *(("triton", name, form) for name, form in INTERPRETED),
    ],
)


def build(name, form):
    """``f(params, x)``, which is all results in one vector, and params."""
    torch.manual_seed(0)
    module = MODULES[name]().double()

    def f(params, x):
        if form == "packed":
            given, options = PackedSequence(x.flatten(0, 1)[: SIZES.sum()], SIZES), {}
        else:
            given, options = x, FORMS[form]
        results = functional_call(module, params, (given,), options)
        output, states = results
        output = output.data if form == "packed" else output
        return torch.cat([t.flatten() for t in (output, *tree_leaves(states))])

    return f, {name: p.detach() for name, p in module.named_parameters()}


def gradients(f, params, x):
    """Of the results' squares in params, without a transform."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    return dict(
        zip(
            leaves,
            torch.autograd.grad(f(leaves, x).square().sum(), list(leaves.values())),
            strict=True,
        )
    )


@calls
def test_first_derivatives(backend, name, form):
    f, params = build(name, form)
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    of_x = lambda x: f(params, x)  # noqa: E731
    with fusedrnn.use_backend("torch"):
        want = torch.autograd.functional.jacobian(of_x, x)
        of_params = gradients(f, params, x)
    with fusedrnn.use_backend(backend):
        if backend != "triton":  # so many backwards take the interpreter long
            assert_alike(jacrev(of_x)(x), want)
        assert_alike(jacfwd(of_x)(x), want)
        assert_alike(jvp(of_x, (x,), (tangent,))[1], torch.einsum("oabc,abc->o", want, tangent))
        assert_alike(vjp(of_x, x)[1](torch.ones(len(want)).double())[0], want.sum(0))
        assert_alike(grad(lambda p: f(p, x).square().sum())(params), of_params)


@calls
def test_maps_and_gradients_of_each(backend, name, form):
    f, params = build(name, form)
    xs = torch.randn(N, T, B, I, dtype=torch.float64)
    with fusedrnn.use_backend("torch"):
        want = [f(params, x) for x in xs], [gradients(f, params, x) for x in xs]
    with fusedrnn.use_backend(backend):
        got = map_over(f, in_dims=(None, 0))(params, xs)
        of_each = map_over(grad(lambda p, x: f(p, x).square().sum()), in_dims=(None, 0))(params, xs)
    assert_alike(got, torch.stack(want[0]))
    assert_alike(of_each, stacked(want[1]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODULES)
def test_second_derivatives(name, form):
    f, params = build(name, form)
    x = torch.randn(T, B, I, dtype=torch.float64)
    loss = lambda p, x: f(p, x).square().sum()  # noqa: E731
    want = torch.autograd.functional.hessian(lambda x: loss(params, x), x)
    assert_alike(hessian(lambda x: loss(params, x))(x), want)
    along = {name: torch.randn_like(p) for name, p in params.items()}
    got = jvp(grad(loss), (params, x), (along, torch.zeros_like(x)))[1]
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    grads = torch.autograd.grad(loss(leaves, x), list(leaves.values()), create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(grads, along.values(), strict=True))
    want = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
    assert_alike(list(got.values()), want)


def of_members(f, params, xs):
    return map_over(f)(params, xs).square().sum()


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gru-reset-before", "rnn-relu", "gru-recompute"])
def test_ensembles_of_modules_with_gradients(name, form, backend, dtype):
    """``stack_module_state``, and one backward for all members, through autograd as it is."""
    f, _ = build(name, form)
    members = [MODULES[name]().to(dtype) for _ in range(N)]
    stack, _ = stack_module_state(members)
    xs = torch.randn(N, T, B, I, dtype=dtype)
    with fusedrnn.use_backend(backend), fusedrnn.use_precision("ieee"):
        got = torch.autograd.grad(of_members(f, stack, xs), list(stack.values()))
    want = []
    for member, x in zip(members, xs.double(), strict=True):
        params = {name: p.detach().double() for name, p in member.named_parameters()}
        with fusedrnn.use_backend("torch"):
            want.append(list(gradients(f, params, x).values()))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5  # as of members in test_transforms.py
    assert_alike([g.double() for g in got], stacked(want), tolerance)
