"""The modules as citizens of torch: constructors, weights, repr, copies, and replaced weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn

#: For each constructor call the class, positional and keyword arguments.
CONSTRUCTORS = [
    ("LSTM", (3, 4), {}),
    ("LSTM", (3, 4, 2, False, True, 0.5, True), {}),
    ("LSTM", (3, 4, 2, True, False, 0, False, 2, "cpu", torch.float64), {}),
    ("LSTM", (), {"input_size": 3, "hidden_size": 4, "proj_size": 3, "bidirectional": True}),
    ("LSTM", (3,), {"hidden_size": 4, "num_layers": 3, "dropout": 1, "dtype": torch.float16}),
    ("GRU", (3, 4), {}),
    ("GRU", (3, 4, 2, False, True, 0.5, True), {}),
    ("GRU", (3, 4, 1, True, False, 0.0, False, 0, "cpu", torch.float64), {}),
    ("GRU", (3, 4), {"bias": False, "batch_first": True, "device": "cpu"}),
    ("RNN", (3, 4), {}),
    ("RNN", (3, 4, 2), {"nonlinearity": "relu", "dropout": 0.25}),
    ("RNN", (3, 4, 2, "relu"), {"bias": False}),
    ("RNN", (3, 4, 2, "relu", False, True, 0.5, True), {}),
    ("RNN", (3, 4, 1, "tanh", True, False, 0.0, True, 0, "cpu", torch.float64), {}),
    ("LSTMCell", (3, 4), {}),
    ("LSTMCell", (3, 4, False, "cpu", torch.float64), {}),
    ("GRUCell", (3, 4), {"bias": False}),
    ("GRUCell", (3, 4, True, "cpu", torch.float64), {}),
    ("RNNCell", (3, 4, False, "relu", "cpu", torch.float64), {}),
    ("RNNCell", (3, 4), {"nonlinearity": "relu", "bias": False}),
]


def ids(cases):
    return [f"{i}-{case[0]}" for i, case in enumerate(cases)]


def both(name, args, kwargs):
    """torch's module and ours, each built after the same seed."""
    torch.manual_seed(5)
    theirs = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(5)
    return theirs, getattr(fusedrnn, name)(*args, **kwargs)


def output_of(module, *args):
    result = module(*args)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTORS, ids=ids(CONSTRUCTORS))
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_constructor_weights_and_repr_are_torchs(name, args, kwargs):
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


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTORS, ids=ids(CONSTRUCTORS))
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_state_dict_loads_both_ways(name, args, kwargs):
    theirs, ours = getattr(nn, name)(*args, **kwargs), getattr(fusedrnn, name)(*args, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not same_weights(theirs, ours)
    ours.load_state_dict(theirs.state_dict())
    assert same_weights(theirs, ours)
    ours.reset_parameters()
    assert not same_weights(theirs, ours)
    theirs.load_state_dict(ours.state_dict())
    assert same_weights(theirs, ours)


def test_dropout_with_one_layer_warns():
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        fusedrnn.GRU(3, 4, dropout=0.5)


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_reset_after_is_keyword_only_and_shown(name):
    ours = getattr(fusedrnn, name)(3, 4, reset_after=False)
    assert ours.reset_after is False
    assert repr(ours) == f"{name}(3, 4, reset_after=False)"
    theirs = getattr(nn, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3) if name == "GRUCell" else torch.randn(6, 5, 3)
    assert not torch.allclose(output_of(ours, x), output_of(theirs, x))
    ours.reset_after = True
    assert torch.equal(output_of(ours, x), output_of(theirs, x))


def test_unknown_nonlinearity_of_a_cell_raises_at_the_call():
    theirs, ours = both("RNNCell", (3, 4), {"nonlinearity": "gelu"})
    for cell in (theirs, ours):
        with pytest.raises(RuntimeError, match="nonlinearity"):
            cell(torch.zeros(2, 3))


def make(name: str) -> nn.Module:
    kwargs = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    return getattr(fusedrnn, name)(3, 4, **kwargs)


def input_of(name: str) -> torch.Tensor:
    return torch.randn(5, 3) if name.endswith("Cell") else torch.randn(6, 5, 3)


NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_run_and_are_independent(name):
    module, x = make(name), input_of(name)
    expected = output_of(module, x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert torch.equal(output_of(twin, x), expected)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(output_of(twin, x), expected)
        assert torch.equal(output_of(module, x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_saves_with_weights_only(name):
    module, twin = make(name), make(name)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_weights(module, twin)


@pytest.mark.parametrize("name", NAMES)
def test_moving_between_dtypes_and_from_meta(name):
    module, x = make(name), input_of(name)
    module.double()
    assert output_of(module, x.double()).dtype == torch.float64
    empty = type(module)(3, 4, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.isfinite(output_of(empty, x)).all()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
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


def weight_norm_by_hook(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_hh_l0")
    return "weight_hh_l0_g"


def weight_norm_by_parametrization(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    return "parametrizations.weight_hh_l0.original0"


def own_parametrization(module):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    return "parametrizations.weight_hh_l0.original"


def pruning(module):
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    return "weight_hh_l0_orig"


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    "wrap", [weight_norm_by_hook, weight_norm_by_parametrization, own_parametrization, pruning]
)
def test_wrapped_weights_run_train_and_copy(name, wrap):
    module, x = make(name), input_of(name)
    raw = wrap(module)
    output_of(module, x).sum().backward()
    assert module.get_parameter(raw).grad.abs().sum() > 0

    # The wrapped weight is what runs: compare with a plain module that holds its value.
    plain = make(name)
    for n in plain.state_dict():
        plain.get_parameter(n).data = getattr(module, n).detach()
    assert torch.equal(output_of(module, x), output_of(plain, x))

    # nn.LSTM's list of weights keeps a tensor with a history here, which deepcopy refuses.
    twin = copy.deepcopy(module)
    before = output_of(module, x)
    assert torch.equal(output_of(twin, x), before)
    with torch.no_grad():
        twin.get_parameter(raw).mul_(2)
    assert not torch.equal(output_of(twin, x), before)
    assert torch.equal(output_of(module, x), before)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_data_parallel_replica_reads_its_own_weights(name):
    module, x = make(name), input_of(name)
    replica = module._replicate_for_data_parallel()
    for n, p in module.named_parameters():
        setattr(replica, n, 2 * p)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    assert torch.equal(output_of(replica, x), output_of(doubled, x))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph_and_follows_the_backend(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make(name)

        def forward(self, x):
            return output_of(self.inner, x) * 2

    graphs = []

    def record(graph, _):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model, x = Model(), input_of(name)
    compiled = torch.compile(model, fullgraph=True, backend=record)
    for backend in ("aten", "torch"):
        with fusedrnn.use_backend(backend):
            assert torch.equal(compiled(x), model(x))
    assert ["rnn_forward" in graph for graph in graphs] == [False, True]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
