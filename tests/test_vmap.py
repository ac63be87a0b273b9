"""``torch.func``: every transform against the plain derivatives of torch.nn, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.func import vmap as map_over
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import fusedrnn
from fusedrnn import stack, vmap

# torch itself imports it for forward-mode derivatives, and inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated")

N, T, B, I, H = 3, 4, 3, 2, 3
MODULES = {
    "lstm-2": ("LSTM", {"num_layers": 2}),
    "gru-both-ways": ("GRU", {"bidirectional": True}),
    "lstm-projected": ("LSTM", {"proj_size": 2}),
}
SIZES = torch.tensor([3, 2, 1])
LENGTHS = torch.tensor([[4, 1, 3], [2, 4, 1], [3, 3, 0]])


def pair_of(name):
    """Returns ours and torch's module with the same weights, and these by name."""
    kind, kwargs = MODULES[name]
    theirs = getattr(torch.nn, kind)(I, H, **kwargs).double()
    ours = getattr(fusedrnn, kind)(I, H, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, {name: p.detach() for name, p in theirs.named_parameters()}


@pytest.fixture(params=MODULES)
def pair(request):
    return pair_of(request.param)


def inputs(*shape):
    return torch.randn(*shape, B, I, dtype=torch.float64)


def loss(module):
    def of(params, x, **options):
        output, states = functional_call(module, params, (x,), options)
        output = output.data if isinstance(output, PackedSequence) else output
        return output.square().sum() + sum(state.sum() for state in tree_leaves(states))

    return of


def plain_grads(module, params, x, **options):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = loss(module)(leaves, x, **options)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def stacked(trees):
    return tree_map(lambda *tensors: torch.stack(tensors), *trees)


def assert_alike(got, want, tolerance=1e-10):
    for left, right in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_vmap_over_inputs_and_states(pair, backend):
    ours, theirs, _ = pair
    xs = inputs(N, T)
    state = theirs(xs[0])[1]
    states = stacked([tree_map(lambda t, n=n: n * t, state) for n in range(N)])
    nth = [tree_map(lambda t, n=n: t[n], states) for n in range(N)]
    with fusedrnn.use_backend(backend):
        for dim in (0, 2, -1):
            got = map_over(ours, in_dims=dim, out_dims=1)(xs.movedim(0, dim))
            want = stacked([theirs(x) for x in xs])
            assert_alike(got, tree_map(lambda t: t.movedim(0, 1), want))
        got = map_over(lambda hx: ours(xs[0], hx))(states)
    assert_alike(got, stacked([theirs(xs[0], hx) for hx in nth]))


def test_vmap_over_inputs_is_one_call(monkeypatch):
    """N calls of B sequences run as one of N * B, forward and backward."""
    batches, run, back = [], stack.forward, stack.backward
    monkeypatch.setattr(
        stack, "forward", lambda i, *a: (batches.append(i.h_0.shape[1]), run(i, *a))[1]
    )
    monkeypatch.setattr(
        stack, "backward", lambda i, *a: (batches.append(i.h_0.shape[1]), back(i, *a))[1]
    )
    ours, theirs, params = pair_of("gru-both-ways")
    xs = inputs(N, T)
    with fusedrnn.use_backend("torch"):
        got = map_over(grad(lambda x: loss(ours)(params, x)))(xs)
    assert batches == [N * B, N * B]
    leaf = xs.clone().requires_grad_()
    sum(loss(theirs)(params, x) for x in leaf).backward()
    assert_alike(got, leaf.grad)


def test_rows_mapped_to_the_wrong_sequence_are_found(monkeypatch):
    split = vmap._Fold.split
    monkeypatch.setattr(vmap._Fold, "split", lambda self, t: split(self, t).flip(0))
    with pytest.raises(AssertionError):
        test_vmap_over_inputs_and_states(pair_of("gru-both-ways"), "torch")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_per_sample_gradients(pair, backend):
    ours, theirs, params = pair
    xs = inputs(2, N, T)
    each = map_over(grad(loss(ours)), in_dims=(None, 0))
    with fusedrnn.use_backend(backend):
        got = each(params, xs[0]), map_over(each, in_dims=(None, 0))(params, xs)
    want = stacked([stacked([plain_grads(theirs, params, x) for x in group]) for group in xs])
    assert_alike(got, (tree_map(lambda t: t[0], want), want))


def test_gradients_of_maps(pair):
    """By ``grad``, which the map hides from the call, and by plain autograd."""
    ours, theirs, params = pair
    xs = inputs(N, T)
    got = grad(lambda p: map_over(lambda x: loss(ours)(p, x))(xs).sum())(params)
    each = stacked([plain_grads(theirs, params, x) for x in xs])
    assert_alike(got, {name: g.sum(0) for name, g in each.items()})
    leaf = xs.clone().requires_grad_()
    got = torch.autograd.grad(map_over(ours)(leaf)[0].square().sum(), (leaf, *ours.parameters()))
    want = stacked([theirs(x) for x in leaf])[0].square().sum()
    assert_alike(got, torch.autograd.grad(want, (leaf, *theirs.parameters())))


def test_ensembles(pair):
    """Weights of each member's own, with an input for each or one for all."""
    ours, theirs, weights = pair
    members = [{name: torch.randn_like(p) / 2 for name, p in weights.items()} for _ in range(N)]
    params, x, xs = stacked(members), inputs(T), inputs(N, T)
    call = lambda p, x: functional_call(ours, p, (x,))  # noqa: E731
    got = map_over(call, in_dims=(0, None))(params, x)
    assert_alike(got, stacked([functional_call(theirs, p, (x,)) for p in members]))
    want = stacked([plain_grads(theirs, p, x) for p, x in zip(members, xs, strict=True)])
    assert_alike(map_over(grad(loss(ours)))(params, xs), want)
    over_inputs = map_over(grad(loss(ours)), in_dims=(None, 0))
    got = map_over(over_inputs, in_dims=(0, None))(params, xs[:2])
    want = [stacked([plain_grads(theirs, p, x) for x in xs[:2]]) for p in members]
    assert_alike(got, stacked(want))


def test_jacobians(pair):
    ours, theirs, params = pair
    x, tangent = inputs(T), inputs(T)
    want = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    along = torch.einsum("abcdef,def->abc", want, tangent)

    def f(x):
        return functional_call(ours, params, (x,))[0]

    assert_alike(jacrev(f)(x), want)
    assert_alike(jacfwd(f)(x), want)
    assert_alike(jvp(f, (x,), (tangent,))[1], along)
    assert_alike(vjp(f, x)[1](along)[0], torch.einsum("abcdef,abc->def", want, along))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        assert_alike(forward_ad.unpack_dual(ours(dual)[0]).tangent, along)


def test_second_derivatives(pair):
    ours, theirs, params = pair
    x = inputs(2)[:, :2]
    want = torch.autograd.functional.hessian(lambda x: theirs(x)[0].square().sum(), x)

    def f(x):
        return functional_call(ours, params, (x,))[0].square().sum()

    assert_alike(hessian(f)(x), want)
    assert_alike(jacrev(jacrev(f))(x), want)
    assert_alike(map_over(hessian(f))(torch.stack((x, 2 * x)))[0], want)


def test_second_order_per_sample(pair):
    """A map over second derivatives, and the gradient of a map over gradients."""
    ours, theirs, params = pair
    xs = inputs(N, 2)[:, :, :2]

    def penalty(p, x):
        return grad(loss(ours), argnums=1)(p, x).square().sum()

    def plain(p, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(theirs)(p, x), x, create_graph=True)[0].square().sum()

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    keep = {"allow_unused": True, "materialize_grads": True}
    want = [torch.autograd.grad(plain(leaves, x), list(leaves.values()), **keep) for x in xs]
    want = [torch.stack(parts) for parts in zip(*want, strict=True)]
    got = map_over(grad(penalty), in_dims=(None, 0))(params, xs)
    assert_alike(list(got.values()), want, 1e-9)
    got = grad(lambda p: map_over(penalty, in_dims=(None, 0))(p, xs).sum())(params)
    assert_alike(list(got.values()), [w.sum(0) for w in want], 1e-9)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("reset_after", [True, False])
def test_lengths_and_resets(mapped, reset_after):
    module = fusedrnn.GRU(I, H, 2, bidirectional=True, reset_after=reset_after).double()
    xs, reset = inputs(N, T), torch.rand(N, T, B) < 0.3
    params = {name: p.detach() for name, p in module.named_parameters()}

    def own(p, x, l, r):
        return loss(module)(p, x, lengths=l, reset=r)

    lengths = LENGTHS if mapped else LENGTHS[:1].expand(N, B)
    reset = reset if mapped else reset[:1].expand(N, T, B)
    given = (LENGTHS, reset) if mapped else (LENGTHS[0], reset[0])
    dims = (None, 0, 0, 0) if mapped else (None, 0, None, None)
    got = map_over(grad(own), in_dims=dims)(params, xs, *given)
    calls = zip(xs, lengths, reset, strict=True)
    assert_alike(
        got, stacked([plain_grads(module, params, x, lengths=l, reset=r) for x, l, r in calls])
    )
    of_x = map_over(grad(own, argnums=1), in_dims=dims)(params, xs, *given)
    leaf = xs.clone().requires_grad_()
    sum(own(params, *each) for each in zip(leaf, lengths, reset, strict=True)).backward()
    assert_alike(of_x, leaf.grad)


def test_packed_rows_and_recomputed_gates():
    """These run call by call; the second also with a fold."""
    for kwargs, packs in (({}, True), ({"recompute": True}, False)):
        module = fusedrnn.LSTM(I, H, 2, **kwargs).double()
        params = {name: p.detach() for name, p in module.named_parameters()}

        def own(p, x, packs=packs, module=module):
            x = PackedSequence(x.flatten(0, 1)[: SIZES.sum()], SIZES) if packs else x
            return loss(module)(p, x)

        xs, found = inputs(N, T), []
        for x in xs:
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            found.append(torch.autograd.grad(own(leaves, x), list(leaves.values())))
        got = map_over(grad(own), in_dims=(None, 0))(params, xs)
        assert_alike(list(got.values()), [torch.stack(g) for g in zip(*found, strict=True)])


def test_cells_and_single_sequences():
    cell, gru = fusedrnn.LSTMCell(I, H).double(), fusedrnn.GRU(I, H).double()
    xs = inputs(N)
    assert_alike(map_over(cell)(xs), stacked([cell(x) for x in xs]))
    assert_alike(map_over(gru)(xs), stacked([gru(x) for x in xs]))  # unbatched: [T, I] each


def test_random_masks_follow_vmaps_rule():
    """Dropout draws: vmap refuses by default, as everywhere in torch."""
    module = fusedrnn.GRU(I, H, num_layers=2, dropout=0.5).double()
    with pytest.raises(RuntimeError, match="randomness"):
        map_over(module)(inputs(N, T))


def test_kernels():
    module = fusedrnn.GRU(I, H)
    params = {name: p.detach() for name, p in module.named_parameters()}
    xs = inputs(2, T).float()
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        got = map_over(module)(xs), map_over(grad(loss(module)), in_dims=(None, 0))(params, xs)
    want = stacked([module(x) for x in xs]), stacked([plain_grads(module, params, x) for x in xs])
    assert_alike(got, want, 1e-5)


def transforms(module, params):
    """Returns functions that transform, each with its arguments."""

    def f(p, x):
        return functional_call(module, p, (x,))[0]

    def of_loss(p, x):
        return f(p, x).square().sum()

    def of_x(x):
        return f(params, x)

    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    xs = inputs(N, T)
    members = {name: torch.stack([p, 2 * p, -p]) for name, p in params.items()}
    return {
        "vmap": (lambda p, xs: map_over(f, in_dims=(None, 0))(p, xs), params, xs),
        "per-sample": (lambda p, xs: map_over(grad(of_loss), in_dims=(None, 0))(p, xs), params, xs),
        "members": (lambda p, x: map_over(grad(of_loss), in_dims=(0, None))(p, x), members, x),
        "vjp": (lambda x: vjp(of_x, x)[1](torch.ones(T, B, H, dtype=torch.float64)), x),
        "jvp": (lambda x, v: jvp(of_x, (x,), (v,)), x[:2], tangent[:2]),
        "jacrev": (lambda x: jacrev(of_x)(x), x),
        "hessian": (lambda x: hessian(lambda x: of_loss(params, x))(x), x[:2]),
    }


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("kind", transforms(fusedrnn.RNN(I, H), {}))
def test_compiled_transforms_equal_plain_ones(kind):
    """One graph with our operator; a tangent that it dropped would be zero and no error."""
    ours, _, params = pair_of("lstm-2")
    f, *given = transforms(ours, params)[kind]
    with fusedrnn.use_backend("torch"):
        want = f(*given)
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(*given)
    assert_alike(got, want)
    assert all(t.count_nonzero() for t in tree_leaves(got))


@pytest.mark.usefixtures("_fresh")
def test_programs_take_transforms_and_refuse_tangents():
    """Compiled and exported programs contain the operators, which have rules."""
    ours, _, _ = pair_of("gru-both-ways")
    ours.requires_grad_(False)
    x, tangent = inputs(T), inputs(T)
    exported = torch.export.export(ours, (x,)).module()
    for program in (exported, torch.compile(ours, backend="aot_eager")):
        f = lambda x, program=program: program(x)[0]  # noqa: E731
        assert_alike(f(x), ours(x)[0])
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="carry no tangents; call the module itself"),
        ):
            f(forward_ad.make_dual(x, tangent))
    f = lambda x: exported(x)[0]  # noqa: E731
    assert_alike(map_over(f)(torch.stack([x, 2 * x])), stacked([ours(x)[0], ours(2 * x)[0]]))
    leaf = x.clone().requires_grad_()
    ours(leaf)[0].square().sum().backward()
    assert_alike(grad(lambda x: f(x).square().sum())(x), leaf.grad)
