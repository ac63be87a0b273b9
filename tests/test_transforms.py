"""``torch.func``: every transform against the plain derivative of torch.nn, in fp64."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp
from torch.func import vmap as map_over
from torch.utils._pytree import tree_leaves, tree_map

import fusedrnn

# What torch itself imports for forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

N, T, B, I, H = 3, 4, 3, 2, 3
MODULES = {
    "lstm-2": ("LSTM", {"num_layers": 2}),
    "gru-both-ways": ("GRU", {"bidirectional": True}),
    "rnn-2": ("RNN", {"num_layers": 2, "bidirectional": True}),
    "lstm-projected": ("LSTM", {"proj_size": 2, "bidirectional": True}),
    "lstm-no-bias": ("LSTM", {"bias": False}),
}
BACKENDS = ("auto", "torch")


@pytest.fixture(params=MODULES)
def pair(request):
    """Ours and torch's module with the same weights, and these by name."""
    name, kwargs = MODULES[request.param]
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(I, H, **kwargs).double()
    ours = getattr(fusedrnn, name)(I, H, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, {name: p.detach() for name, p in theirs.named_parameters()}


def inputs(*shape):
    return torch.randn(*shape, B, I, dtype=torch.float64)


def loss(module):
    def of(params, x, **options):
        output, states = functional_call(module, params, (x,), options)
        return output.square().sum() + sum(state.sum() for state in tree_leaves(states))

    return of


def plain_grads(module, params, x, **options):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = loss(module)(leaves, x, **options)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def stacked(trees):
    return tree_map(lambda *tensors: torch.stack(tensors), *trees)


def assert_alike(got, want, tolerance=1e-10):
    got, want = tree_leaves(got), tree_leaves(want)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_vmap_over_inputs(pair, backend, dim):
    ours, theirs, _ = pair
    xs = inputs(N, T)
    with fusedrnn.use_backend(backend):
        got = map_over(ours, in_dims=dim, out_dims=1)(xs.movedim(0, dim))
    assert_alike(got, tree_map(lambda t: t.movedim(0, 1), stacked([theirs(x) for x in xs])))


def test_vmap_over_states_alone(pair):
    ours, theirs, _ = pair
    x = inputs(T)
    state = theirs(x)[1]
    states = stacked([tree_map(lambda t, n=n: n * t, state) for n in range(N)])
    got = map_over(lambda hx: ours(x, hx))(states)
    assert_alike(got, stacked([theirs(x, tree_map(lambda t, n=n: t[n], states)) for n in range(N)]))


@pytest.mark.parametrize("count", [1, N])
@pytest.mark.parametrize("backend", BACKENDS)
def test_per_sample_gradients(pair, backend, count):
    ours, theirs, params = pair
    xs = inputs(count, T)
    with fusedrnn.use_backend(backend):
        got = map_over(grad(loss(ours)), in_dims=(None, 0))(params, xs)
    assert_alike(got, stacked([plain_grads(theirs, params, x) for x in xs]))


def test_per_sample_gradients_cost_one_backward(pair, monkeypatch):
    from fusedrnn import launches as calls

    ours, _, params = pair
    launches, run = [], calls.loop_bwd
    monkeypatch.setattr(calls, "loop_bwd", lambda *args: (launches.append(1), run(*args))[1])
    map_over(grad(loss(ours)), in_dims=(None, 0))(params, inputs(N, T))
    assert len(launches) == ours.num_layers


def test_per_sample_gradients_of_groups(pair):
    """Two maps: groups of groups."""
    ours, theirs, params = pair
    xs = inputs(2, N, T)
    got = map_over(map_over(grad(loss(ours)), in_dims=(None, 0)), in_dims=(None, 0))(params, xs)
    assert_alike(got, stacked([stacked([plain_grads(theirs, params, x) for x in g]) for g in xs]))


def test_gradient_of_a_map(pair):
    """The map hides from the call that its weights require a gradient further out."""
    ours, theirs, params = pair
    xs = inputs(N, T)
    got = grad(lambda p: map_over(lambda x: loss(ours)(p, x))(xs).sum())(params)
    each = stacked([plain_grads(theirs, params, x) for x in xs])
    assert_alike(got, {name: g.sum(0) for name, g in each.items()})


def test_a_map_inside_plain_autograd(pair):
    ours, theirs, _ = pair
    xs = inputs(N, T).requires_grad_()
    got = torch.autograd.grad(map_over(ours)(xs)[0].square().sum(), (xs, *ours.parameters()))
    want = stacked([theirs(x) for x in xs])[0].square().sum()
    assert_alike(got, torch.autograd.grad(want, (xs, *theirs.parameters())))


def test_ensemble(pair):
    """Weights of their own, each with its input or all with the same one."""
    ours, theirs, weights = pair
    members = [{name: torch.randn_like(p) / 2 for name, p in weights.items()} for _ in range(N)]
    params = stacked(members)
    x, xs = inputs(T), inputs(N, T)
    call = lambda p, x: functional_call(ours, p, (x,))  # noqa: E731
    same = map_over(call, in_dims=(0, None))(params, x)
    assert_alike(same, stacked([functional_call(theirs, p, (x,)) for p in members]))
    got = map_over(grad(loss(ours)))(params, xs)
    pairs = zip(members, xs, strict=True)
    assert_alike(got, stacked([plain_grads(theirs, p, x) for p, x in pairs]))


def test_stack_module_state():
    torch.manual_seed(0)
    models = [fusedrnn.GRU(I, H).double() for _ in range(N)]
    params, buffers = stack_module_state(models)
    x = inputs(T)
    got = map_over(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    assert_alike(got, stacked([model(x) for model in models]))


def test_jacobians(pair):
    ours, theirs, params = pair
    x, tangent = inputs(T), inputs(T)
    want = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)

    def f(x):
        return functional_call(ours, params, (x,))[0]

    assert_alike(jacrev(f)(x), want)
    assert_alike(jacfwd(f)(x), want)
    along = torch.einsum("abcdef,def->abc", want, tangent)
    assert_alike(jvp(f, (x,), (tangent,))[1], along)
    assert_alike(vjp(f, x)[1](along)[0], torch.einsum("abcdef,abc->def", want, along))


def test_forward_mode_outside_of_torch_func(pair):
    ours, theirs, _ = pair
    x, tangent = inputs(T), inputs(T)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(ours(dual)[0]).tangent
    want = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    assert_alike(got, torch.einsum("abcdef,def->abc", want, tangent))


def test_hessians(pair):
    ours, theirs, params = pair
    x = inputs(2)[:, :2]
    want = torch.autograd.functional.hessian(lambda x: theirs(x)[0].square().sum(), x)

    def f(x):
        return functional_call(ours, params, (x,))[0].square().sum()

    assert_alike(hessian(f)(x), want)
    assert_alike(jacrev(jacrev(f))(x), want)
    assert_alike(jacrev(grad(f))(x), want)
    xs = torch.stack((x, 2 * x))
    assert_alike(map_over(hessian(f))(xs)[0], want)


def test_second_order_per_sample(pair):
    """A map over second derivatives: groups under the gradient of the gradient."""
    ours, theirs, params = pair
    xs = inputs(N, 2)[:, :, :2]

    def penalty(module):
        def of(p, x):
            found = grad(loss(module), argnums=1)(p, x)
            return found.square().sum()

        return of

    got = map_over(grad(penalty(ours)), in_dims=(None, 0))(params, xs)
    want = []
    for x in xs:
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        x = x.clone().requires_grad_()
        (d_x,) = torch.autograd.grad(loss(theirs)(leaves, x), x, create_graph=True)
        found = torch.autograd.grad(
            d_x.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        want.append(dict(zip(leaves, found, strict=True)))
    assert_alike(got, stacked(want), 1e-9)


def test_the_gradient_of_a_map_of_gradients(pair):
    """Groups again, now differentiated from outside."""
    ours, theirs, params = pair
    xs = inputs(N, 2)[:, :, :2]

    def spread(p):
        each = map_over(grad(loss(ours)), in_dims=(None, 0))(p, xs)
        return sum((g - g.mean(0)).square().sum() for g in each.values())

    def plain_spread(p):
        each = [
            torch.autograd.grad(loss(theirs)(p, x), list(p.values()), create_graph=True) for x in xs
        ]
        stacks = [torch.stack(parts) for parts in zip(*each, strict=True)]
        return sum((g - g.mean(0)).square().sum() for g in stacks)

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    want = torch.autograd.grad(plain_spread(leaves), list(leaves.values()))
    assert_alike(list(grad(spread)(params).values()), want, 1e-9)


@pytest.mark.parametrize("mapped", [True, False])
def test_lengths_and_resets(mapped):
    torch.manual_seed(0)
    module = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True).double()
    xs, lengths = inputs(N, T), torch.tensor([[4, 1, 3], [2, 4, 1], [3, 3, 0]])
    reset = torch.rand(N, T, B) < 0.3
    params = {name: p.detach() for name, p in module.named_parameters()}

    def own(p, x, l, r):
        return loss(module)(p, x, lengths=l, reset=r)

    if mapped:
        given = [(x, l, r) for x, l, r in zip(xs, lengths, reset, strict=True)]
        got = map_over(grad(own), in_dims=(None, 0, 0, 0))(params, xs, lengths, reset)
    else:
        given = [(x, lengths[0], reset[0]) for x in xs]
        dims = (None, 0, None, None)
        got = map_over(grad(own), in_dims=dims)(params, xs, lengths[0], reset[0])
    want = [plain_grads(module, params, x, lengths=l, reset=r) for x, l, r in given]
    assert_alike(got, stacked(want))


def test_cells_and_single_sequences():
    torch.manual_seed(0)
    cell, gru = fusedrnn.LSTMCell(I, H).double(), fusedrnn.GRU(I, H).double()
    xs = inputs(N)
    assert_alike(map_over(cell)(xs), stacked([cell(x) for x in xs]))
    xs = inputs(N)  # unbatched: [T, I] each
    assert_alike(map_over(gru)(xs), stacked([gru(x) for x in xs]))


def test_random_masks_follow_vmaps_rule():
    """Dropout draws: vmap refuses by default, as it does everywhere in torch."""
    module = fusedrnn.GRU(I, H, num_layers=2, dropout=0.5).double()
    with pytest.raises(RuntimeError, match="randomness"):
        map_over(module)(inputs(N, T))


def test_kernels_under_vmap(monkeypatch):
    """One launch of the kernels for all calls, and gradients apart."""
    from fusedrnn.kernels import resident

    launches, run = [], resident.resident_bwd
    monkeypatch.setattr(resident, "resident_bwd", lambda *a: (launches.append(1), run(*a))[1])
    torch.manual_seed(0)
    module = fusedrnn.GRU(I, H)
    params = {name: p.detach() for name, p in module.named_parameters()}
    xs = inputs(2, T).float()
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        got = map_over(grad(loss(module)), in_dims=(None, 0))(params, xs)
    assert len(launches) == 1
    assert_alike(got, stacked([plain_grads(module, params, x) for x in xs]), 1e-5)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels' launches, on the kernels and in fp32 as ieee."""
    from fusedrnn.kernels import resident, stepwise_launch

    seen = []
    for home in (resident, stepwise_launch):
        schedule = home.__name__.rpartition(".")[2].removesuffix("_launch")
        for name in (f"{schedule}_fwd", f"{schedule}_bwd"):
            run = getattr(home, name)
            watch = lambda *a, run=run, name=name: (seen.append(name), run(*a))  # noqa: E731
            monkeypatch.setattr(home, name, watch)
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        yield seen


#: Input and hidden size, the module's other arguments, and the schedule that takes it.
MEMBERS = {
    "lstm-2": ("LSTM", 2, H, {"num_layers": 2}, "resident"),
    "gru-both-ways": ("GRU", 2, H, {"bidirectional": True}, "resident"),
    "rnn-no-bias": ("RNN", 2, H, {"bias": False}, "resident"),
    "lstm-wide-input": ("LSTM", 70, H, {"bidirectional": True}, "resident"),  # projected by GEMMs
    "lstm-large": ("LSTM", 2, 68, {"num_layers": 2}, "stepwise"),
    "gru-large-both-ways": ("GRU", 2, 68, {"bidirectional": True, "bias": False}, "stepwise"),
}


@pytest.mark.parametrize("inside", [True, False], ids=("grad-inside", "grad-outside"))
@pytest.mark.parametrize("ragged", [False, True], ids=("dense", "ragged"))
@pytest.mark.parametrize("kind", MEMBERS)
def test_an_ensemble_is_one_launch_a_layer(kind, ragged, inside, launches):
    """Weights of their own on the kernels: equal to member after member, gradients too."""
    name, width, size, kwargs, schedule = MEMBERS[kind]
    torch.manual_seed(0)
    module = getattr(fusedrnn, name)(width, size, **kwargs)
    members = [
        {name: torch.randn_like(p) / size**0.5 for name, p in module.named_parameters()}
        for _ in range(N)
    ]
    params, xs = stacked(members), torch.randn(N, T, B, width)
    lengths, reset = torch.tensor([[4, 1, 3], [2, 4, 1], [3, 3, 2]]), torch.rand(N, T, B) < 0.3

    def of_member(p, x, l, r):
        return loss(module)(p, x, lengths=l, reset=r) if ragged else loss(module)(p, x)

    given = members, xs, lengths, reset
    want = stacked([grad(of_member)(*each) for each in zip(*given, strict=True)])
    launches.clear()
    if inside:
        got = map_over(grad(of_member))(params, xs, lengths, reset)
    else:
        got = grad(lambda p: map_over(of_member)(p, xs, lengths, reset).sum())(params)
    layers = kwargs.get("num_layers", 1)
    assert launches == [f"{schedule}_fwd"] * layers + [f"{schedule}_bwd"] * layers
    assert_alike(got, want, 1e-5)


def test_members_with_one_input_and_with_shared_weights(launches):
    """An input and some weights that all members share are expanded, and their gradients summed."""
    torch.manual_seed(0)
    module = fusedrnn.GRU(I, H)
    params = {name: p.detach() for name, p in module.named_parameters()}
    own = {"weight_hh_l0": torch.randn(N, *params["weight_hh_l0"].shape) / 2}
    x = inputs(T).float()

    def total(own, shared, x, mapped=True):
        call = lambda own: loss(module)({**shared, **own}, x)  # noqa: E731
        if mapped:
            return map_over(call)(own).sum()
        return sum(call({name: p[n] for name, p in own.items()}) for n in range(N))

    shared = {name: p for name, p in params.items() if name not in own}
    want = grad(total, (0, 1, 2))(own, shared, x, False)
    launches.clear()
    got = grad(total, (0, 1, 2))(own, shared, x)
    assert launches == ["resident_fwd", "resident_bwd"]
    assert_alike(got, want, 1e-5)


def test_second_derivatives_of_members(launches):
    torch.manual_seed(0)
    module = fusedrnn.RNN(I, H)
    members = [
        {name: torch.randn_like(p) / 2 for name, p in module.named_parameters()} for _ in range(2)
    ]
    xs = inputs(2, T).float()

    def penalty(p, x):
        return grad(lambda x: loss(module)(p, x))(x).square().sum()

    want = stacked([grad(penalty)(*each) for each in zip(members, xs, strict=True)])
    params = stacked(members)
    assert_alike(map_over(grad(penalty))(params, xs), want, 1e-4)
    assert_alike(grad(lambda p: map_over(penalty)(p, xs).sum())(params), want, 1e-4)


def test_inputs_mapped_over_members_and_members_over_inputs(launches):
    torch.manual_seed(0)
    module = fusedrnn.GRU(I, H)
    members = [
        {name: torch.randn_like(p) / 2 for name, p in module.named_parameters()} for _ in range(2)
    ]
    xs, params = inputs(N, T).float(), stacked(members)
    of_each = grad(loss(module))
    want = stacked([stacked([of_each(p, x) for x in xs]) for p in members])
    over_inputs = map_over(of_each, in_dims=(None, 0))
    assert_alike(map_over(over_inputs, in_dims=(0, None))(params, xs), want, 1e-5)
    over_members = map_over(of_each, in_dims=(0, None))
    got = map_over(over_members, in_dims=(None, 0), out_dims=1)(params, xs)
    assert_alike(got, want, 1e-5)

    def penalty(per_sample, p):
        return sum(t.square().sum() for t in tree_leaves(per_sample(p)))

    got = grad(lambda p: penalty(lambda p: map_over(over_inputs, in_dims=(0, None))(p, xs), p))(
        params
    )
    want = stacked([grad(lambda p: penalty(lambda p: over_inputs(p, xs), p))(p) for p in members])
    assert_alike(got, want, 1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=("bias", "no-bias"))
def test_an_ensemble_with_a_projection_is_one_launch_a_layer(bias, launches):
    torch.manual_seed(0)
    module = fusedrnn.LSTM(I, H, 2, proj_size=2, bidirectional=True, bias=bias)
    members = [
        {name: torch.randn_like(p) / 2 for name, p in module.named_parameters()} for _ in range(N)
    ]
    xs = inputs(N, T).float()
    want = stacked([grad(loss(module))(p, x) for p, x in zip(members, xs, strict=True)])
    launches.clear()
    got = map_over(grad(loss(module)))(stacked(members), xs)
    assert launches == ["stepwise_fwd"] * 2 + ["stepwise_bwd"] * 2
    assert_alike(got, want, 1e-5)


def test_members_whose_gates_are_made_again_run_one_by_one(launches):
    torch.manual_seed(0)
    module = fusedrnn.LSTM(I, H, recompute=True)
    params = {name: torch.stack([p.detach()] * 2) for name, p in module.named_parameters()}
    x = inputs(T).float()
    got = map_over(lambda p: functional_call(module, p, (x,))[0], in_dims=0)(params)
    assert len(launches) == 2
    assert_alike(got, torch.stack([module(x)[0]] * 2), 1e-5)
