"""The operators: schema, fake kernels, autograd of every order, and programs that contain them."""

from itertools import product

import pytest
import torch
from pairs import LENGTHS, NAMES, RESET, B, H, I, T, assert_close, batch, build, leaves, states_for
from test_stack import config_of, inputs_of
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import reference
from fusedrnn.records import Sequences

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh")
FORMS = {
    "dense": Sequences(),
    "lengths": Sequences(lengths=LENGTHS, reset=RESET),
    "packed": Sequences(batch_sizes=torch.tensor([3, 2, 2, 1])),
}


def arguments(cell, form="dense", requires_grad=True, **options):
    """Returns the arguments of ``rnn_forward`` without ``save``."""
    config = config_of(cell, **options)
    given = inputs_of(config, rows=(8,) if form == "packed" else (T, B))
    for tensor in leaves([*given[:3], given.params]):
        tensor.requires_grad_(requires_grad)
    return *given, *FORMS[form], *config


def backward_arguments(cell, form):
    """Returns the arguments of ``rnn_backward`` after a forward."""
    given = arguments(cell, form, requires_grad=False)
    output, h_n, c_n, gates, cs, hidden = torch.ops.fusedrnn.rnn_forward(*given, True)
    is_lstm = cell == "lstm"
    grads = torch.ones_like(output), torch.ones_like(h_n), torch.ones_like(c_n) * is_lstm
    d_c_n, d_cs = (grads[2], torch.ones_like(cs)) if is_lstm else (None, None)
    saved = output, None, None, gates, cs, hidden
    return *grads[:2], d_c_n, d_cs, *given[:5], *saved, *given[5:], True, True


@pytest.mark.parametrize(
    ("cell", "form"),
    [*(("lstm", form) for form in FORMS), *((cell, "dense") for cell in CELLS[1:])],
)
def test_opcheck(cell, form):
    """Schemas, fake kernels and autograd agree with the operators on real tensors."""
    operators, checks = torch.ops.fusedrnn, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.rnn_forward, (*arguments(cell, form), True))
    given = backward_arguments(cell, form)
    torch.library.opcheck(operators.rnn_backward, given, test_utils=checks)


@pytest.mark.parametrize("options", [{"recompute": True}, {"backend": "aten"}, {}])
def test_fake_results_have_the_real_shapes(options):
    """With gates to save, but for the last."""
    given = *arguments("lstm", requires_grad=False, **options), bool(options)
    torch.library.opcheck(torch.ops.fusedrnn.rnn_forward, given, test_utils="test_faketensor")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(cell, form):
    """The gradients, and the gradients of the gradients, are those of finite differences."""
    (input, h_0, c_0, params, masks), rest = (given := arguments(cell, form))[:5], given[5:]
    masks = [mask.detach() for mask in masks]

    def f(input, h_0, w_hh, b_ih, *c_0):
        own = [params[0], params[1], b_ih, params[3], params[4], w_hh, *params[6:]]
        found = torch.ops.fusedrnn.rnn_forward(
            input, h_0, *(c_0 or (None,)), own, masks, *rest, True
        )
        return found[0], found[1], *([found[2], found[4]] if c_0 else [])

    sources = input, h_0, params[5], params[2], *([c_0] if c_0 is not None else [])
    assert torch.autograd.gradcheck(f, sources, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, sources, fast_mode=True)


def penalised(loss, sources, order):
    """Returns the gradients of a loss that sums gradients of the former order."""
    for _ in range(order - 1):
        grads = torch.autograd.grad(loss, sources, create_graph=True, materialize_grads=True)
        loss = sum(g.sin().sum() for g in grads)
    return torch.autograd.grad(loss, sources, materialize_grads=True)


def loss_of(results):
    return sum(result.sin().sum() for result in leaves(results))


plain = nn.Module.__call__


def carried(module, x):
    """The state of one call enters the next, with the same weights."""
    _, hx = module(x)
    return module(x.flip(0), hx)


def encoded(module, x):
    """The first state is a function of the input."""
    h = nn.functional.pad(x.mean(0), (0, H - I)).expand(module.num_layers, B, H)
    return module(x, (h, h.sin()) if module.mode == "LSTM" else h)


def tied(module, x):
    """One parameter is two arguments of one call, and one is frozen."""
    module.bias_hh_l0 = module.bias_ih_l0
    module.weight_ih_l0.requires_grad_(False)
    return module(x)


@pytest.mark.parametrize(
    ("name", "backend", "compose", "order"),
    [
        *product(NAMES, ["torch"], [plain], [3]),
        *product(["LSTM"], ["torch", "triton"], [carried, encoded, tied], [1, 2]),
    ],
)
def test_derivatives_of_every_order_are_torchs(name, backend, compose, order):
    """A gradient that reaches a weight through hx or the input is counted once."""
    x, found = batch()[:2].requires_grad_(), []
    deep = {"num_layers": 2, "bidirectional": True} if compose is plain else {}
    for module in build(name, **deep):
        with fusedrnn.use_backend(backend):
            loss = loss_of(compose(module, x))
            sources = [x, *(p for p in module.parameters() if p.requires_grad)]
            found.append(penalised(loss, sources, order))
    assert_close(found[1], found[0], 1e-10)


def test_second_derivatives_where_the_input_has_no_gradient():
    """Its gradient is an empty tensor, which has no derivative."""
    given = backward_arguments("lstm", "dense")
    input, params = given[4].requires_grad_(), [p.requires_grad_() for p in given[7]]
    d_input, d_h_0, _, d_params = torch.ops.fusedrnn.rnn_backward(*given[:-2], False, True)
    assert d_input.numel() == 0
    loss, found = d_h_0.sum() + d_params[1].sum(), []
    for total in (loss, loss + d_input.sum()):
        found.append(torch.autograd.grad(total, [input, *params], retain_graph=True))
    assert_close(found[1], found[0], 0)


def test_a_wrong_second_derivative_is_found(monkeypatch):
    """The comparison above fails where the reference loses a bias."""
    real = reference._linear_hh
    monkeypatch.setattr(
        reference, "_linear_hh", lambda h, w, *a: real(h, w._replace(b_hh=None), *a)
    )
    with pytest.raises(AssertionError):
        test_derivatives_of_every_order_are_torchs("GRU", "torch", carried, 2)


def test_parameters_whose_data_is_replaced_before_backward():
    _, ours = build("GRU")
    with fusedrnn.use_backend("torch"):
        loss = ours(batch())[0].sum()
    sources = list(ours.parameters())
    want = torch.autograd.grad(loss, sources, retain_graph=True)
    for p in sources:
        p.data = torch.randn_like(p)
    assert_close(torch.autograd.grad(loss, sources), want, 0)


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("GRU", 3, {}), ("GRU", 30, {}), ("RNN", 30, {}), ("LSTM", 4, {"lengths": LENGTHS})],
)
def test_outputs_may_be_modified_in_place(name, steps, options):
    """On the CPU, and detached; compiled, too."""
    _, ours = build(name, num_layers=2, batch_first=True)
    x, found = torch.randn(B, steps, I).double(), []
    for module in (ours, ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        output, states = module(x, **options)
        h_n, *_ = leaves(states)
        if not found:  # the truth is that of copies
            output, h_n = output.clone(), h_n.clone()
        output += 1
        output[:, 0] = 0
        nn.functional.relu(output, inplace=True)
        h_n.mul_(2)
        found.append(torch.autograd.grad(output.sum() + h_n.sum(), list(module.parameters())))
    assert_close(found[1:], [found[0]] * 2)
    if not options:  # with lengths it is a view
        output, h_n = ours(x)
        assert output.stride() == (H, B * H, 1)
        output.detach_(), h_n.detach_()


@pytest.mark.parametrize(
    ("name", "kwargs"), [("GRU", {}), ("LSTM", {"num_layers": 2}), ("LSTM", {"proj_size": 2})]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_programs_exported_without_gradients_can_be_differentiated(name, kwargs, frozen):
    _, module = build(name, **kwargs)
    x = batch()
    module.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        program = torch.export.export(module, (x,)).module()
    found = []
    for run in (module, program):
        given = x.clone().requires_grad_()
        loss = loss_of(run(given))
        sources = [given, *(() if frozen else run.parameters())]
        found.append(torch.autograd.grad(loss, sources))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_flops_are_those_of_torchs_products(name, needs_input):
    """For an LSTM on the CPU torch counts none."""
    theirs, ours = build(name, num_layers=2, bidirectional=True)
    x, hx, found = batch().requires_grad_(needs_input), states_for(ours, B).requires_grad_(), []
    for module in (theirs, ours):
        with fusedrnn.use_backend("torch"), FlopCounterMode(display=False) as counter:
            loss = module(x, hx)[0].sum()
            forward = counter.get_total_flops()
            loss.backward()
        found.append((forward, counter.get_total_flops()))
    assert found[0] == found[1]


def test_walkers_of_saved_tensors_meet_no_none():
    for name in NAMES:
        with fusedrnn.use_backend("torch"):
            output, _ = build(name)[1](batch())
        assert output.grad_fn.saved_tensors[0].shape == (T, B, I)


@pytest.mark.parametrize("create_graph", [False, True])
def test_foreign_tangents_are_refused(create_graph):
    """A gradient with a tangent reaches a graph that was built without: an error, and no zero."""
    _, module = build("GRU")
    x = batch().requires_grad_()
    with fusedrnn.use_backend("torch"):
        output, _ = module(x)
    arriving = torch.ones_like(output)
    (want,) = torch.autograd.grad(output, x, arriving, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arriving, arriving)
        with pytest.raises(NotImplementedError, match=r"forward mode AD|carry no tangents"):
            torch.autograd.grad(output, x, dual, retain_graph=True, create_graph=create_graph)
        assert_close(torch.autograd.grad(output, x, arriving), [want])


def test_eager_calls_skip_the_dispatcher(monkeypatch):
    """Unless a mode, a profiler, a subclass or a transform must see the operator."""
    module, x = build("GRU")[1], batch()
    with fusedrnn.use_backend("torch"):
        with torch.profiler.profile() as profile:
            module(x)
        assert "fusedrnn::rnn_forward" in {event.name for event in profile.events()}
        monkeypatch.setattr(torch.ops.fusedrnn, "rnn_forward", None)
        module(x)[0].sum().backward()
