"""Tests of ``patch``, ``replace_modules`` and ``to_torch``: torch modules become ours, and back."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pairs import CELLS, NAMES, input_of, output_of, reloaded, saved
from test_modules import WRAPS, every_class
from torch import nn
from torch.nn.utils import parametrize

import fusedrnn

CLASSES = NAMES + CELLS
PLACES = (nn, nn.modules, nn.modules.rnn)
TORCHS = {name: getattr(nn, name) for name in CLASSES}
OURS = {name: getattr(fusedrnn, name) for name in CLASSES}
BOTH_WAYS = (fusedrnn.replace_modules, OURS), (fusedrnn.to_torch, TORCHS)


def named():
    """Returns the classes that torch's names lead to, after a check that all places agree."""
    assert all(getattr(place, name) is getattr(nn, name) for place in PLACES for name in CLASSES)
    return {name: getattr(nn, name) for name in CLASSES}


@pytest.fixture(autouse=True)
def _left_as_it_was():
    methods = [(kind.__init__, kind.forward) for kind in OURS.values()]
    yield
    fusedrnn.unpatch()
    assert named() == TORCHS
    assert torch._dynamo.config.allow_rnn is False
    assert [(kind.__init__, kind.forward) for kind in OURS.values()] == methods


def run_in_threads(work, count=4):
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def raise_in(block):
    with block:
        assert named() == OURS
        raise KeyError("inside")


def test_plain_calls_and_blocks():
    fusedrnn.unpatch()
    fusedrnn.patch()
    fusedrnn.patch()
    exposed = [module for path, module in list(sys.modules.items()) if path.startswith("torch.")]
    assert not [m for m in exposed for name in CLASSES if getattr(m, name, None) is TORCHS[name]]
    fusedrnn.unpatch()
    assert named() == TORCHS
    with fusedrnn.patch():
        with fusedrnn.patch():
            pass
        fusedrnn.unpatch()
        assert named() == OURS
        fusedrnn.patch()
    assert named() == OURS
    fusedrnn.unpatch()
    block = fusedrnn.patch()
    fusedrnn.unpatch()
    for _ in range(2):
        with pytest.raises(KeyError, match="inside"):
            raise_in(block)
        assert named() == TORCHS


def test_dynamos_switch_is_restored_after_the_last_of_several_threads():
    def work(_):
        for _ in range(20):
            with fusedrnn.patch():
                assert named() == OURS

    def switches():
        """Returns those of this thread and of a new one."""
        with ThreadPoolExecutor(1) as pool:
            return config.allow_rnn, pool.submit(lambda: config.allow_rnn).result()

    config = torch._dynamo.config
    for former in (False, True):
        with config.patch(allow_rnn=former):
            before = switches()
            with fusedrnn.patch():
                run_in_threads(work)
                assert named() == OURS
                assert switches() == (True, True)
            assert switches() == before
            assert before[0] is former


def test_replacements_by_other_code_are_restored_and_left_alone(monkeypatch):
    theirs = type("Theirs", (nn.LSTM,), {})
    monkeypatch.setattr(nn, "LSTM", theirs)
    monkeypatch.setattr(nn.modules.rnn, "GRU", nn.GRU)  # restored after the test
    with fusedrnn.patch():
        assert nn.LSTM is fusedrnn.LSTM
        nn.modules.rnn.GRU = theirs
    assert nn.LSTM is nn.modules.rnn.GRU is theirs
    monkeypatch.undo()


def naming(name):
    """Derives a class whose methods call their base by torch's name, looked up at each call."""

    class Naming(getattr(nn, name)):
        def __init__(self, *sizes):
            getattr(nn, name).__init__(self, *sizes)

        def forward(self, input, hx=None):
            return getattr(nn, name).forward(self, input, hx)

    return Naming


@every_class
def test_modules_and_checkpoints_from_both_sides_of_a_patch(name):
    """Earlier modules, and classes derived before, stay torch's; later and loaded ones are ours."""
    kind, x, plain = naming(name), input_of(name), TORCHS[name](3, 4)
    expected, derived, old = output_of(plain, x), kind(3, 4), copy.deepcopy(plain)
    vars(old).pop("proj_size", None)  # as in a file of torch before 1.8
    files = saved(plain), saved(old)
    with fusedrnn.patch():
        fresh, later, built = getattr(nn, name)(3, 4), naming(name)(3, 4), kind(3, 4)
        for module in (derived, fresh, later, built):
            module.load_state_dict(plain.state_dict())
        ours = [fresh, reloaded(fresh), *(torch.load(file, weights_only=False) for file in files)]
        for module in (plain, copy.deepcopy(plain), derived, built, later, *ours):
            torch.testing.assert_close(output_of(module, x), expected)
        assert not any("_flat_weights" in vars(module) for module in ours)
        assert {type(module) for module in ours} == {OURS[name]}
        assert isinstance(later, OURS[name])
        assert not isinstance(built, OURS[name])
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            pickle.dumps(plain)
    for module in (reloaded(fresh), copy.deepcopy(ours[2]), fusedrnn.to_torch(ours[2])):
        torch.testing.assert_close(output_of(module, x), expected)


class Model(nn.Module):
    """Every kind, nested, and one of them twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, num_layers=2, bidirectional=True))
        self.second = nn.ModuleDict({"gru": nn.GRU(8, 4), "rnn": nn.RNN(4, 4, nonlinearity="relu")})
        self.again = self.second["gru"]
        self.cells = nn.ModuleList([nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)])

    def forward(self, x):
        x = self.first(x)[0]
        x = self.second["rnn"](self.again(x)[0])[0]
        h, _ = self.cells[0](x[-1])
        return self.cells[2](self.cells[1](h))


def test_compiles_as_one_graph_while_patched():
    def work(_):
        model, x = Model(), torch.randn(6, 5, 3)
        result = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(result, model(x))
        result.sum().backward()
        assert model.again.weight_hh_l0.grad is not None

    torch._dynamo.reset()
    with fusedrnn.patch():
        work(0)
        run_in_threads(work, 1)


@pytest.mark.parametrize("patched", [False, True])
def test_replaced_modules_are_ours_and_the_same(patched):
    model, x = Model(), torch.randn(6, 5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    model.cells.eval()
    if patched:
        fusedrnn.patch()
    for change, classes in BOTH_WAYS:
        expected = model(x)
        for _ in range(2):  # the second call does nothing
            assert change(model) is model
        kinds = [type(m) for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
        assert dict(zip(CLASSES, kinds, strict=True)) == classes
        assert dict(model.named_modules(remove_duplicate=False)) == modules
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert not any(module.training for module in model.cells.modules())
        twins = [model, copy.deepcopy(model)]
        if not (patched and classes is TORCHS):
            twins.append(reloaded(model))
        for twin in twins:
            torch.testing.assert_close(twin(x), expected)
        model(x).sum().backward()
        optimizer.step()
        assert not torch.allclose(model(x), expected)


@every_class
def test_nothing_of_the_former_class_is_left(name):
    theirs, ours, seen = TORCHS[name](3, 4), OURS[name](3, 4), []
    fresh = set(vars(theirs))
    fusedrnn.replace_modules(theirs)
    assert set(vars(theirs)) == set(vars(ours)) - {"reset_after", "_flat_weight_refs"}
    assert repr(theirs) == repr(ours)
    theirs.register_forward_hook(lambda *_: seen.append("forward"))
    theirs.register_full_backward_hook(lambda *_: seen.append("backward"))
    next(theirs.parameters()).register_hook(lambda _: seen.append("gradient"))
    for module in (fusedrnn.to_torch(theirs), fusedrnn.to_torch(ours)):
        assert set(vars(module)) == fresh
        if not name.endswith("Cell"):
            assert [id(w) for w in module._flat_weights] == [id(p) for p in module.parameters()]
    output_of(fusedrnn.replace_modules(theirs), input_of(name).requires_grad_()).sum().backward()
    assert sorted(seen) == ["backward", "forward", "gradient"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", ["old weight_norm", "weight_norm", "pruning"])
def test_wrapped_weights_stay_wrapped(name, wrap):
    module, x = TORCHS[name](3, 4, 2), torch.randn(6, 5, 3)
    WRAPS[wrap](module)
    expected, keys = output_of(module, x), list(module.state_dict())
    for change, classes in BOTH_WAYS:
        change(module)
        assert parametrize.type_before_parametrizations(module) is classes[name]
        assert list(module.state_dict()) == keys
        if parametrize.is_parametrized(module) or classes is OURS:
            torch.testing.assert_close(output_of(copy.deepcopy(module), x), expected)
        module.zero_grad()
        output_of(module, x).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())
        torch.testing.assert_close(output_of(module, x), expected)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_other_classes_are_left_alone():
    model = nn.Sequential(
        naming("LSTM")(3, 4),
        torch.ao.nn.quantizable.LSTM(3, 4),
        torch.jit.script(nn.LSTM(3, 4)),
        torch.ao.nn.quantized.dynamic.GRU(3, 4),
        type("Mine", (fusedrnn.LSTM,), {})(3, 4),
    )
    before = [type(module) for module in model.modules()]
    fusedrnn.to_torch(fusedrnn.replace_modules(model))
    assert [type(module) for module in model.modules()] == before


@every_class
def test_scripts_run_torchs_operators(name):
    model, x = nn.Sequential(OURS[name](3, 4)), input_of(name)
    expected, parameters = output_of(model, x), list(model.parameters())
    script = torch.jit.script(model)
    assert torch.equal(output_of(script, x), expected)
    assert [p.data_ptr() for p in script.parameters()] == [p.data_ptr() for p in parameters]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
def test_quantization_leaves_nothing_out_without_a_word(name):
    quantize, model = torch.ao.quantization.quantize_dynamic, nn.Sequential(OURS[name](3, 4))
    early = nn.Sequential(TORCHS[name](3, 4))
    with pytest.warns(UserWarning, match="takes none of fusedrnn's modules"):
        quantize(model)
    with fusedrnn.patch():
        with pytest.warns(UserWarning, match="takes none of fusedrnn's modules"):
            quantize(model, {getattr(nn, name)})
        with pytest.warns(UserWarning, match="finds no nn.LSTM or nn.GRU while torch is patched"):
            quantize(early)
    quantized = quantize(fusedrnn.to_torch(model))
    assert "quantized" in type(quantized[0]).__module__


def with_forward(module):
    module.forward = module.forward
    return module


def with_stream(value):
    module = nn.LSTM(3, 4)
    module.stream = value
    return module


REFUSED = [
    (fusedrnn.to_torch, fusedrnn.GRU(3, 4, reset_after=False), "is a GRU with reset_after="),
    (fusedrnn.to_torch, fusedrnn.GRUCell(3, 4, reset_after=False), "is a GRUCell with reset_after"),
    (fusedrnn.to_torch, with_forward(fusedrnn.LSTM(3, 4)), "has a forward of its own"),
    (fusedrnn.replace_modules, with_forward(nn.LSTM(3, 4)), "has a forward of its own"),
    *((fusedrnn.replace_modules, with_stream(value), "has an attribute 'stream'")
      for value in (nn.Parameter(torch.zeros(4)), nn.Linear(1, 1), 5)),
]  # fmt: skip


@pytest.mark.parametrize(("change", "module", "reason"), REFUSED)
def test_what_cannot_change_is_refused_before_any_change(change, module, reason):
    model = nn.Sequential(
        (nn if change is fusedrnn.replace_modules else fusedrnn).RNN(3, 4), module
    )
    before, name = [type(each) for each in model.modules()], change.__name__
    with pytest.raises(ValueError, match=f"^{name}: module '1' {reason}"):
        change(model)
    with pytest.raises(ValueError, match=f"^{name}: the model {reason}"):
        change(module)
    assert [type(each) for each in model.modules()] == before
    with pytest.raises(TypeError, match=f"^{name} takes a torch.nn.Module; got list"):
        change([model])
