"""``torch.func``: every transform against the same one of the reference, in fp64.

The reference is a composition of torch's operators; `test_reference.py` compares it with torch.nn.
"""

from itertools import product

import pytest
import torch
from pairs import assert_close
from test_reference import reference_of
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.func import vmap as map_over
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import fusedrnn
from fusedrnn import stack, vmap

N, T, B, I, H = 3, 4, 3, 2, 3
MODULES = {
    "lstm": lambda: fusedrnn.LSTM(I, H, num_layers=2),
    "gru": lambda: fusedrnn.GRU(I, H, bidirectional=True),
    "projected": lambda: fusedrnn.LSTM(I, H, proj_size=2),
}


def inputs(*shape):
    return torch.randn(*shape, B, I, dtype=torch.float64)


def call_of(module):
    """Returns ``call(params, x, hx)`` of a module."""
    return lambda p, x, hx=None, **options: functional_call(module, p, (x, hx), options)


def loss(call):
    def of(p, x, **options):
        output, states = call(p, x, **options)
        output = output.data if isinstance(output, PackedSequence) else output
        return output.square().sum() + sum(state.sum() for state in tree_leaves(states))

    return of


def weights_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def stacked(trees):
    return tree_map(lambda *tensors: torch.stack(tensors), *trees)


def members(p):
    """Returns the weights of an ensemble."""
    return {name: torch.stack([t, 2 * t, -t]) for name, t in p.items()}


def penalty(f):
    return lambda p, x: grad(loss(f), argnums=1)(p, x).square().sum()


def trained(f, p, xs):
    """Returns the weights after two steps, as the inner loop of MAML (Finn et al., 2017) takes."""
    for x in xs[1:]:
        p = {name: p[name] - 0.1 * dp for name, dp in grad(loss(f))(p, x).items()}
    return p


def differentiated(f, p, xs):
    """Returns the gradients of a map by plain autograd."""
    p, xs = tree_map(lambda t: t.clone().requires_grad_(), (p, xs))
    return torch.autograd.grad(map_over(loss(f), EACH)(p, xs).sum(), [xs, *p.values()])


def of_x(f, p):
    return lambda x: f(p, x)[0]


EACH, MEMBERS = (None, 0), (0, None)  # one set of weights, several inputs; and the reverse
#: Functions of a call, weights, inputs ``[N, T, B, I]``, and as many states.
TRANSFORMS = {
    "inputs": lambda f, p, xs, hxs: map_over(f, EACH, out_dims=1)(p, xs),
    "last dim": lambda f, p, xs, hxs: map_over(f, (None, -1))(p, xs.movedim(0, -1)),
    "states": lambda f, p, xs, hxs: map_over(f, (None, None, 0))(p, xs[0], hxs),
    "per-sample": lambda f, p, xs, hxs: map_over(grad(loss(f)), EACH)(p, xs),
    "of inputs": lambda f, p, xs, hxs: map_over(grad(loss(f), argnums=1), EACH)(p, xs),
    "of a map": lambda f, p, xs, hxs: grad(lambda p: map_over(loss(f), EACH)(p, xs).sum())(p),
    "plain autograd": lambda f, p, xs, hxs: differentiated(f, p, xs),
    "their own": lambda f, p, xs, hxs: map_over(grad(loss(f)))(members(p), xs),
    "both": lambda f, p, xs, hxs: map_over(map_over(grad(loss(f)), EACH), MEMBERS)(members(p), xs),
    "vjp": lambda f, p, xs, hxs: vjp(of_x(f, p), xs[0])[1](of_x(f, p)(xs[1])),
    "jvp": lambda f, p, xs, hxs: jvp(of_x(f, p), (xs[0],), (xs[1],)),
    "jacrev": lambda f, p, xs, hxs: jacrev(of_x(f, p))(xs[0]),
    "jacfwd": lambda f, p, xs, hxs: jacfwd(of_x(f, p))(xs[0]),
    "hessian": lambda f, p, xs, hxs: hessian(lambda x: loss(f)(p, x))(xs[0, :2]),
    "penalties": lambda f, p, xs, hxs: map_over(grad(penalty(f)), EACH)(p, xs),
    "inner loop": lambda f, p, xs, hxs: grad(lambda p: loss(f)(trained(f, p, xs), xs[0]))(p),
}


def check(module, kind, backend="torch", tolerance=1e-12, compiled=False):
    """Compares a transform; returns the result."""
    p, xs = weights_of(module), inputs(N, T).to(module.weight_hh_l0)
    states = call_of(module)(p, xs[0])[1]
    given = p, xs, stacked([tree_map(lambda t, n=n: n * t, states) for n in range(N)])
    with fusedrnn.use_backend(backend), fusedrnn.use_precision("ieee"):
        run = TRANSFORMS[kind]
        run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        got = run(call_of(module), *given)
    assert_close(got, TRANSFORMS[kind](reference_of(module, module._cell), *given), tolerance)
    return got


ON_AUTO = ("inputs", "per-sample", "both", "jacfwd", "penalties")


@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [*product(("lstm", "gru"), TRANSFORMS, ("torch",)), *product(MODULES, ON_AUTO, ("auto",))],
)
def test_transforms(name, kind, backend):
    check(MODULES[name]().double(), kind, backend)


@pytest.mark.parametrize("kind", ["inputs", "per-sample"])
def test_kernels(kind):
    check(fusedrnn.GRU(I, H), kind, "triton", 1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["per-sample", "their own", "jvp"])
def test_compiled_transforms(kind):
    """One graph with our operator; a tangent that it dropped would be zero and no error."""
    got = check(MODULES["lstm"]().double(), kind, compiled=True)
    assert all(t.count_nonzero() for t in tree_leaves(got))


def test_vmap_over_inputs_is_one_call(monkeypatch):
    """N calls of B sequences run as one of N * B, forward and backward."""
    batches = []

    def counted(run):
        return lambda i, *rest: (batches.append(i.h_0.shape[1]), run(i, *rest))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(stack, name, counted(getattr(stack, name)))
    module = MODULES["gru"]().double()
    with fusedrnn.use_backend("torch"):
        TRANSFORMS["of inputs"](call_of(module), weights_of(module), inputs(N, T), None)
    assert batches == [N * B, N * B]


def test_rows_mapped_to_the_wrong_sequence_are_found(monkeypatch):
    real = vmap._map

    def turned(*call):
        found, dims = real(*call)
        return tuple(t.flip(0) if isinstance(t, torch.Tensor) else t for t in found), dims

    monkeypatch.setattr(vmap, "_map", turned)
    with pytest.raises(AssertionError):
        check(MODULES["gru"]().double(), "inputs")


@pytest.mark.parametrize("form", ["mapped", "shared", "packed", "recompute"])
def test_other_forms_of_a_call(form):
    """With lengths and resets; packed rows and recomputed gates run call by call."""
    recompute = {"recompute": form == "recompute", "reset_after": form == "recompute"}
    module = fusedrnn.GRU(I, H, 2, bidirectional=True, **recompute).double()
    xs, p, sizes = inputs(N, T), weights_of(module), torch.tensor([3, 2, 1])
    lengths, reset = torch.tensor([[4, 1, 3], [2, 4, 1], [3, 3, 0]]), torch.rand(N, T, B) < 0.3
    given, dim = {"mapped": ((lengths, reset), 0), "shared": ((lengths[0], reset[0]), None)}.get(
        form, ((None, None), None)
    )

    def own(p, x, lengths, reset):
        x = PackedSequence(x.flatten(0, 1)[: sizes.sum()], sizes) if form == "packed" else x
        return loss(call_of(module))(p, x, lengths=lengths, reset=reset)

    of_each = zip(*given, strict=True) if form == "mapped" else [given] * N
    calls = [(p, x, *each) for x, each in zip(xs, of_each, strict=True)]
    for argnums in (0, 1):
        got = map_over(grad(own, argnums), (None, 0, dim, dim))(p, xs, *given)
        assert_close(got, stacked([grad(own, argnums)(*call) for call in calls]))


def test_cells_and_single_sequences():
    cell, gru = fusedrnn.LSTMCell(I, H).double(), fusedrnn.GRU(I, H).double()
    xs = inputs(N)
    assert_close(map_over(cell)(xs), stacked([cell(x) for x in xs]))
    assert_close(map_over(gru)(xs), stacked([gru(x) for x in xs]))  # unbatched: [T, I] each


def test_random_masks_follow_vmaps_rule():
    """Dropout draws: vmap refuses by default, as everywhere in torch."""
    module = fusedrnn.GRU(I, H, num_layers=2, dropout=0.5).double()
    with pytest.raises(RuntimeError, match="randomness"):
        map_over(module)(inputs(N, T))


@pytest.mark.usefixtures("fresh_dynamo")
def test_programs_take_transforms_and_refuse_tangents():
    """Compiled and exported programs contain the operators, which have rules."""
    ours = MODULES["gru"]().double().requires_grad_(False)
    x, tangent = inputs(T), inputs(T)
    exported = torch.export.export(ours, (x,)).module()
    for program in (exported, torch.compile(ours, backend="aot_eager")):
        f = lambda x, program=program: program(x)[0]  # noqa: E731
        assert_close(f(x), ours(x)[0])
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="carry no tangents; call the module itself"),
        ):
            f(forward_ad.make_dual(x, tangent))
    f = lambda x: exported(x)[0]  # noqa: E731
    assert_close(map_over(f)(torch.stack([x, 2 * x])), stacked([ours(x)[0], ours(2 * x)[0]]))
    leaf = x.clone().requires_grad_()
    ours(leaf)[0].square().sum().backward()
    assert_close(grad(lambda x: f(x).square().sum())(x), leaf.grad)
