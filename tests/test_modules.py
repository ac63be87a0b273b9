"""The modules as torch's: constructors, weights, repr, copies, pickles, and replaced weights."""

import copy
import inspect
import pickle

import pytest
import torch
from pairs import CELLS, NAMES, input_of, output_of, reloaded
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn

#: For each constructor call the class, positional and keyword arguments.
CONSTRUCTORS = [
    ("LSTM", (3, 4, 2, False, True, 0.5, True), {}),
    ("LSTM", (3, 4, 2, True, False, 0, False, 2, "cpu", torch.float64), {}),
    ("LSTM", (3,), {"hidden_size": 4, "num_layers": 3, "dropout": 1, "dtype": torch.float16}),
    ("GRU", (3, 4, 2, False, True, 0.5, True), {}),
    ("GRU", (3, 4), {"bias": False, "batch_first": True, "device": "cpu"}),
    ("RNN", (3, 4, 2, "relu"), {"bias": False}),
    ("RNN", (3, 4, 2, "relu", False, True, 0.5, True), {}),
    ("RNN", (3, 4, 1, "tanh", True, False, 0.0, True, 0, "cpu", torch.float64), {}),
    ("LSTMCell", (3, 4, False, "cpu", torch.float64), {}),
    ("GRUCell", (3, 4), {"bias": False}),
    ("RNNCell", (3, 4, False, "relu", "cpu", torch.float64), {}),
    ("RNNCell", (3, 4), {"nonlinearity": "relu", "bias": False}),
]


def both(name, args, kwargs):
    """torch's module and ours, each built after the same seed."""
    torch.manual_seed(5)
    theirs = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(5)
    return theirs, getattr(fusedrnn, name)(*args, **kwargs)


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTORS)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_constructor_weights_repr_and_state_dict_are_torchs(name, args, kwargs):
    theirs, ours = both(name, args, kwargs)
    assert repr(ours) == repr(theirs)
    for attribute in theirs.__constants__:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    names = [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_parameters()] == names
    for n, p in theirs.named_parameters():
        q = ours.get_parameter(n)
        assert (q.dtype, q.device, q.shape) == (p.dtype, p.device, p.shape), n
        assert torch.equal(p, q), n
    ours.reset_parameters()
    assert not torch.equal(next(ours.parameters()), next(theirs.parameters()))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_reset_after_is_keyword_only_and_shown(name):
    ours = getattr(fusedrnn, name)(3, 4, reset_after=False)
    assert ours.reset_after is False
    assert repr(ours) == f"{name}(3, 4, reset_after=False)"
    theirs = getattr(nn, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = input_of(name)
    assert not torch.allclose(output_of(ours, x), output_of(theirs, x))
    ours.reset_after = True
    assert torch.equal(output_of(ours, x), output_of(theirs, x))


def make(name: str) -> nn.Module:
    kwargs = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    return getattr(fusedrnn, name)(3, 4, **kwargs)


every_stack = pytest.mark.parametrize("name", NAMES)
every_class = pytest.mark.parametrize("name", NAMES + CELLS)


@every_stack
def test_weights_are_read_at_every_call(name):
    module, twin, x = make(name), make(name), input_of(name)
    expected = output_of(twin, x)
    called = torch.func.functional_call(module, dict(twin.named_parameters()), (x,))[0]
    assert torch.equal(called, expected)
    for n, p in twin.named_parameters():
        setattr(module, n, nn.Parameter(p.detach().clone()))
    assert torch.equal(output_of(module, x), expected)
    live = [id(p) for p in module.parameters()]
    assert [id(p) for p in module._flat_weights] == live
    assert [id(p) for layer in module.all_weights for p in layer] == live
    module.flatten_parameters()
    assert [id(p) for p in module.parameters()] == live
    replica = module._replicate_for_data_parallel()
    for n, p in twin.named_parameters():
        setattr(replica, n, p * 1)
    assert torch.equal(output_of(replica, x), expected)


class Drop(nn.Module):
    """Dropout of a weight, drawn anew at every access; keeps the draws."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, weight):
        self.drawn.append(nn.functional.dropout(weight, 0.5, self.training))
        return self.drawn[-1]


def old_weight_norm(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_hh_l0")


def drop_by_hand(module):
    """Renames the Parameter and leaves a tensor in its place, as older recipes do."""
    weight = module.weight_hh_l1
    del module.weight_hh_l1
    module.register_parameter("raw", weight)

    def draw(module, _):
        module.weight_hh_l1 = module.raw * (torch.arange(4.0) > 1)

    draw(module, ())
    module.register_forward_pre_hook(draw)


WRAPS = {
    "old weight_norm": old_weight_norm,
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_ih_l1"),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l1"),
    "drop by hand": drop_by_hand,
    "pruning": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    "drop": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Drop()),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_wrapped_weights_run_and_train(backend, wrap):
    """Results and gradients are torch's with the weights that the wrapper computes."""
    theirs, ours = both("LSTM", (3, 4, 2), {"bidirectional": True})
    WRAPS[wrap](ours)
    x = input_of("LSTM").requires_grad_()
    with parametrize.cached(), fusedrnn.use_backend(backend):
        for _ in range(2):  # hooks leave nothing behind that disturbs the next call
            output = ours(x)[0]
            weights = {n: getattr(ours, n) for n in ours._flat_weights_names}
            want = torch.func.functional_call(theirs, weights, (x,))[0]
            sources = [x, *ours.parameters()]
            got, expected = (
                [y, *torch.autograd.grad(y.sin().sum(), sources, retain_graph=True)]
                for y in (output, want)
            )
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [*((name, "") for name in NAMES + CELLS), ("LSTM", "old weight_norm"), ("LSTM", "pruning")],
)
def test_copies_and_pickles_run_and_are_independent(name, wrap):
    """nn.LSTM's list of weights breaks copies of wrapped ones."""
    module, x = make(name), input_of(name)
    if wrap:
        WRAPS[wrap](module)
    expected = output_of(module, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), reloaded(module)):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert torch.equal(output_of(twin, x), expected)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(output_of(twin, x), expected)
        assert torch.equal(output_of(module, x), expected)


def test_a_dropped_weight_is_drawn_once_a_call():
    module, drop, x = make("LSTM"), Drop(), input_of("LSTM")
    parametrize.register_parametrization(module, "weight_hh_l0", drop)
    drop.drawn.clear()
    output_of(module, x)
    output_of(module, x)
    assert len(drop.drawn) == 2
    assert not torch.equal(*drop.drawn)


def test_a_weight_changed_before_backward_is_noticed():
    """The optimizer stepped too early: torch's error, and no wrong gradient."""
    for backend in ("auto", "torch"):
        module = make("GRU")
        with fusedrnn.use_backend(backend):
            output = output_of(module, input_of("GRU"))
        with torch.no_grad():
            module.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@every_stack
def test_assignments_to_flat_weights_act_as_in_torch(name):
    """By index and as a whole, with gradients; a new Parameter or a conversion ends them."""
    theirs, ours = both(name, (3, 4, 2), {})
    x, found = input_of(name), []
    for module in (theirs, ours):
        w = module.weight_hh_l0.detach().clone().requires_grad_()
        module._flat_weights[1] = w * 2
        outputs = [output_of(module, x)]
        grads = torch.autograd.grad(outputs[0].sum(), w)
        module._flat_weights = [3 * p.detach() for p in module.parameters()]
        outputs.append(output_of(module, x))
        module.weight_hh_l0 = nn.Parameter(w.detach())
        outputs.append(output_of(module, x))
        module.float()
        outputs.append(output_of(module, x))
        found.append([*outputs, *grads])
    assert all(map(torch.equal, *found))
    assert [id(p) for p in ours._flat_weights] == [id(p) for p in ours.parameters()]
    ours._flat_weights[0] = ours._flat_weights[0].double()
    with pytest.raises(ValueError, match=r"the weights are torch\.float64"):
        ours(x)


@every_class
def test_names_and_signatures_are_torchs(name):
    theirs, ours = getattr(nn, name), getattr(fusedrnn, name)
    assert set(dir(theirs)) <= set(dir(ours))
    assert set(dir(theirs(3, 4))) - {"_flat_weight_refs"} <= set(dir(ours(3, 4)))
    for method in ("forward", "__call__", "extra_repr", "check_forward_args", "permute_hidden"):
        if hasattr(theirs, method):
            names = [list(inspect.signature(getattr(k, method)).parameters) for k in (theirs, ours)]
            assert names[1][: len(names[0])] == names[0], method
    if name == "LSTM":  # RNNBase has others of these names
        for method in ("check_forward_args", "get_expected_cell_size", "permute_hidden"):
            assert getattr(ours, method) is getattr(theirs, method)


def test_classes_behind_ours_are_called():
    """As those of a framework, in the method resolution order."""
    seen = []

    class Behind(nn.Module):
        def __setattr__(self, name, value):
            seen.append(name)
            super().__setattr__(name, value)

        def __setstate__(self, state):
            seen.append("state")
            super().__setstate__(state)

    module = type("Mixed", (fusedrnn.GRU, Behind), {})(3, 4)
    module.__setstate__(module.__getstate__())
    assert {"weight_hh_l0", "state"} <= set(seen)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_with_one_bias(name, missing):
    theirs, ours = both(name, (3, 4), {})
    x, found = input_of(name), []
    for module in (theirs, ours):
        setattr(module, missing, None)
        with fusedrnn.use_backend("torch"):
            output = output_of(module, x)
        found.append([output, *torch.autograd.grad(output.sum(), list(module.parameters()))])
    torch.testing.assert_close(*found)


class Tagger(nn.Module):
    """A stack on packed words, the last h of it through a cell."""

    def __init__(self, library, name):
        super().__init__()
        self.rnn, self.cell = getattr(library, name)(3, 4), getattr(library, name + "Cell")(4, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        output = self.rnn(packed)[0]
        h = self.cell(self.rnn(x)[0][-1])
        return nn.utils.rnn.pad_packed_sequence(output)[0], h[0] if isinstance(h, tuple) else h


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_stack
def test_jit_trace_records_torchs_operators_for_all_sizes(name):
    theirs, ours = Tagger(nn, name), Tagger(fusedrnn, name)
    ours.load_state_dict(theirs.state_dict())
    traced = torch.jit.trace(ours, (torch.randn(30, 5, 3), torch.tensor([30, 2, 30, 7, 9])))
    assert "fusedrnn::" not in str(traced.inlined_graph)
    given = torch.randn(20, 3, 3), torch.tensor([4, 20, 9])
    found = []
    for model in (theirs, traced):
        results = model(*given)
        loss = sum(result.sin().sum() for result in results)
        found.append([*results, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found)


@every_stack
def test_symbolic_trace_sees_leaves(name):
    class Model(Tagger):
        def forward(self, x, hx):
            return self.cell(self.rnn(x, hx=hx)[0][-1])

    graphs = [torch.fx.symbolic_trace(Model(library, name)).graph for library in (nn, fusedrnn)]
    calls = [[n.target for n in graph.nodes if n.op == "call_module"] for graph in graphs]
    assert calls == [["rnn", "cell"]] * 2
    model = Model(fusedrnn, name)
    x, h = input_of(name), torch.randn(1, 5, 4)
    hx = (h, h) if name == "LSTM" else h
    assert torch.equal(torch.fx.symbolic_trace(model)(x, hx)[0], model(x, hx)[0])
