"""Adoption without rewriting: torch's names lead to ours, and a model's modules become ours."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn
from fusedrnn import patching

ROOT = Path(__file__).parent.parent
NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
STACKS = NAMES[:3]
PLACES = (nn, nn.modules, nn.modules.rnn)
TORCHS = {name: getattr(nn, name) for name in NAMES}


def named() -> dict[str, set[type]]:
    """What torch's names lead to, in all places together."""
    return {name: {getattr(place, name) for place in PLACES} for name in NAMES}


UNPATCHED = {name: {TORCHS[name]} for name in NAMES}
PATCHED = {name: {getattr(fusedrnn, name)} for name in NAMES}


@pytest.fixture(autouse=True)
def _left_as_it_was():
    assert named() == UNPATCHED
    yield
    fusedrnn.unpatch()
    assert named() == UNPATCHED
    assert torch._dynamo.config.allow_rnn is False


def output_of(module, x):
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def input_of(name):
    return torch.randn(5, 3) if name.endswith("Cell") else torch.randn(6, 5, 3)


def saved(module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


# patch


def test_patch_reaches_every_place_and_unpatch_restores():
    fusedrnn.patch()
    assert named() == PATCHED
    for name in NAMES:
        module = getattr(nn, name)(3, 4)
        assert type(module) is getattr(fusedrnn, name)
        assert isinstance(module, getattr(nn, name))
    exposed = [
        f"{path}.{name}"
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] == "torch" and module is not None
        for name in NAMES
        if vars(module).get(name) is TORCHS[name]
    ]
    assert exposed == []
    fusedrnn.unpatch()
    assert named() == UNPATCHED


def test_calls_may_be_repeated():
    fusedrnn.unpatch()
    fusedrnn.patch()
    fusedrnn.patch()
    assert named() == PATCHED
    fusedrnn.unpatch()
    assert named() == UNPATCHED
    fusedrnn.unpatch()
    assert named() == UNPATCHED


def test_blocks_nest_and_calls_outlast_them():
    with fusedrnn.patch():
        with fusedrnn.patch():
            assert named() == PATCHED
        assert named() == PATCHED
        fusedrnn.unpatch()
        assert named() == PATCHED
        fusedrnn.patch()
    assert named() == PATCHED
    with fusedrnn.patch():
        pass
    assert named() == PATCHED
    fusedrnn.unpatch()
    assert named() == UNPATCHED


def raise_in(block):
    with block:
        assert named() == PATCHED
        raise KeyError("inside")


def test_a_block_takes_its_call_over_and_ends_by_an_exception_too():
    block = fusedrnn.patch()
    fusedrnn.unpatch()
    for _ in range(2):
        with pytest.raises(KeyError, match="inside"):
            raise_in(block)
        assert named() == UNPATCHED


def test_dynamos_switch_is_restored_and_overrules_what_export_left():
    config = torch._dynamo.config
    with config.patch(allow_rnn=False), fusedrnn.patch():
        assert config.allow_rnn is True
    with config.patch(allow_rnn=True):
        with fusedrnn.patch():
            pass
        assert config.allow_rnn is True
    assert config.allow_rnn is False
    fusedrnn.patch()
    torch.export.export(Both(), (torch.randn(6, 5, 3),))
    fusedrnn.unpatch()
    assert config.allow_rnn is False


def test_what_others_put_there_is_restored_and_left_alone():
    theirs = type("Theirs", (nn.LSTM,), {})
    try:
        nn.LSTM = theirs
        with fusedrnn.patch():
            assert nn.LSTM is fusedrnn.LSTM
            nn.modules.rnn.GRU = theirs
        assert nn.LSTM is theirs
        assert nn.modules.LSTM is TORCHS["LSTM"]
        assert nn.modules.rnn.GRU is theirs
    finally:
        nn.LSTM, nn.modules.rnn.GRU = TORCHS["LSTM"], TORCHS["GRU"]


def test_threads_wait_for_each_other(monkeypatch):
    class Slowly(tuple):
        def __iter__(self):
            for place in tuple(self[:]):
                time.sleep(0.01)
                yield place

    monkeypatch.setattr(patching, "_PLACES", Slowly(patching._PLACES))
    seen, start = [], threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(3):
            with fusedrnn.patch():
                seen.append(named())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [PATCHED] * 12
    assert named() == UNPATCHED


class Doubled(nn.LSTM):
    """A class derived before any patch."""

    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return 2 * output, states


def test_classes_and_modules_from_before_work_as_before():
    module, x = nn.LSTM(3, 4), torch.randn(6, 5, 3)
    expected = module(x)[0]
    derived = Doubled(3, 4)
    derived.load_state_dict(module.state_dict())
    with fusedrnn.patch():
        assert type(module) is TORCHS["LSTM"]
        assert not isinstance(module, nn.LSTM)
        assert torch.equal(module(x)[0], expected)
        assert torch.equal(copy.deepcopy(module)(x)[0], expected)
        assert torch.equal(derived(x)[0], 2 * expected)
        assert torch.equal(pickle.loads(pickle.dumps(derived))(x)[0], 2 * expected)
        assert isinstance(Doubled(3, 4), TORCHS["LSTM"])
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            pickle.dumps(module)
    assert isinstance(module, nn.LSTM)


def naming(base_name):
    """A class of torch's whose methods name their base by torch's name, looked up at each call."""

    class Naming(TORCHS[base_name]):
        def __init__(self, *sizes):
            getattr(nn, base_name).__init__(self, *sizes)
            self.calls = 0

        def forward(self, input, hx=None):
            self.calls += 1
            return getattr(nn, base_name).forward(self, input, hx)

    return Naming


@pytest.mark.parametrize("name", NAMES)
def test_a_class_from_before_may_name_its_base(name):
    """Old modules run and new ones are built; ours have their own methods, and back again."""
    kind, x = naming(name), input_of(name)
    module = kind(3, 4)
    expected = output_of(module, x)
    ours = getattr(fusedrnn, name)
    methods = ours.__init__, ours.forward
    with fusedrnn.patch():
        assert torch.equal(output_of(module, x), expected)
        new = kind(3, 4)
        new.load_state_dict(module.state_dict())
        assert torch.equal(output_of(new, x), expected)
        assert not isinstance(new, getattr(nn, name))
        assert isinstance(new, TORCHS[name])
        while_patched = naming_of_ours(name)(3, 4)
        while_patched.load_state_dict(module.state_dict())
        torch.testing.assert_close(output_of(while_patched, x), expected)
        assert isinstance(while_patched, ours)
        with pytest.raises(TypeError):
            ours()
    assert (ours.__init__, ours.forward) == methods
    assert torch.equal(output_of(module, x), expected)
    assert (module.calls, new.calls) == (3, 1)
    with pytest.raises(AttributeError):
        ours.forward(module, x)


def naming_of_ours(name):
    """The same, derived while patched."""

    class Naming(getattr(nn, name)):
        def __init__(self, *sizes):
            getattr(nn, name).__init__(self, *sizes)

        def forward(self, input, hx=None):
            return getattr(nn, name).forward(self, input, hx)

    return Naming


def test_a_class_derived_while_patched_stays_ours():
    with fusedrnn.patch():

        class Derived(nn.GRU):
            def forward(self, input, hx=None):
                return super().forward(input, hx)[0]

    x = torch.randn(6, 5, 3)
    with fusedrnn.use_backend("torch"):
        assert Derived(3, 4)(x).shape == (6, 5, 4)
    assert issubclass(Derived, fusedrnn.GRU)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_cross_over(name):
    x, theirs = input_of(name), TORCHS[name](3, 4)
    expected, whole = output_of(theirs, x), saved(theirs)
    with fusedrnn.patch():
        loaded = torch.load(whole, weights_only=False)
        assert type(loaded) is getattr(fusedrnn, name)
        assert "_flat_weights" not in vars(loaded)
        torch.testing.assert_close(output_of(loaded, x), expected)
        weights = saved(theirs.state_dict())
        fresh = getattr(nn, name)(3, 4)
        fresh.load_state_dict(torch.load(weights, weights_only=True))
        torch.testing.assert_close(output_of(fresh, x), expected)
        whole = saved(fresh)
    assert type(torch.load(whole, weights_only=False)) is getattr(fusedrnn, name)
    back = TORCHS[name](3, 4)
    back.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(output_of(back, x), expected)
    # What was loaded runs, copies, and goes back like any other.
    torch.testing.assert_close(output_of(copy.deepcopy(loaded), x), expected)
    torch.testing.assert_close(output_of(fusedrnn.to_torch(loaded), x), expected)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell = nn.LSTM(3, 4), nn.GRUCell(4, 4)

    def forward(self, x):
        return self.cell(self.lstm(x)[0][-1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph_while_patched(backend):
    results = []

    def work():
        model, x = Both(), torch.randn(6, 5, 3)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        result = compiled(x)
        torch.testing.assert_close(result, model(x))
        result.sum().backward()
        results.append(model.lstm.weight_hh_l0.grad is not None)

    torch._dynamo.reset()
    with fusedrnn.patch():
        work()
        thread = threading.Thread(target=work)  # since torch 2.12 its settings are its own
        thread.start()
        thread.join()
    assert results == [True, True]


FRESH = """
import torch
theirs = {name: getattr(torch.nn, name) for name in ("LSTM", "GRU", "LSTMCell")}
import fusedrnn
fusedrnn.patch()
from torch.ao.nn import quantizable
from torch.ao.nn.quantized.dynamic import GRU
from torch.ao.quantization import quantization_mappings as mappings
for name in ("LSTM", "GRU", "LSTMCell"):
    assert theirs[name] in mappings.DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS, name
assert quantizable.LSTM._FLOAT_MODULE is theirs["LSTM"]
assert quantizable.LSTM(3, 4)(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)
assert GRU._FLOAT_MODULE is theirs["GRU"]
fusedrnn.unpatch()
assert all(getattr(torch.nn, name) is theirs[name] for name in theirs)
"""


def test_torchs_own_users_of_the_names_keep_torchs():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# replace_modules and to_torch


def test_replaced_from_several_threads(monkeypatch):
    """One model in all of them at once, and each its own; none sees another's half-done work."""
    found = patching._found

    def slowly(*arguments):
        modules = found(*arguments)
        time.sleep(0.005)
        return modules

    monkeypatch.setattr(patching, "_found", slowly)
    shared, own = Model(), [Model() for _ in range(4)]
    x, start, errors = torch.randn(6, 5, 3), threading.Barrier(4), []
    expected, wanted = shared(x), [model(x) for model in own]

    def work(model):
        start.wait()
        try:
            for _ in range(5):
                fusedrnn.replace_modules(shared)
                fusedrnn.to_torch(fusedrnn.replace_modules(model))
            fusedrnn.replace_modules(model)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    torch.testing.assert_close(shared(x), expected)
    for model, want in zip(own, wanted, strict=True):
        torch.testing.assert_close(model(x), want)
    for model in (shared, *own):
        assert all(kind in patching._TORCHS_FOR_OURS for kind in kinds(model))
        assert len(kinds(model)) == 6


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


def kinds(model):
    """The classes of what is an LSTM, GRU, RNN or cell in a model."""
    bases = (nn.RNNBase, nn.RNNCellBase)
    return [type(module) for module in model.modules() if isinstance(module, bases)]


def test_replaced_modules_are_ours_and_the_same():
    model, x = Model(), torch.randn(6, 5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, parameters = model(x), dict(model.named_parameters())
    modules = dict(model.named_modules(remove_duplicate=False))
    model.cells.eval()
    assert fusedrnn.replace_modules(model) is model
    assert kinds(model) == [getattr(fusedrnn, name) for name in NAMES]
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert model.again is model.second["gru"]
    assert [n for n, m in model.named_modules() if not m.training] == [
        *(n for n in modules if n.startswith("cells"))
    ]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    for backend in ("auto", "torch"):
        with fusedrnn.use_backend(backend):
            torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), expected)

    before = model(x)
    assert fusedrnn.replace_modules(model) is model
    assert kinds(model) == [getattr(fusedrnn, name) for name in NAMES]
    for twin in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        assert torch.equal(twin(x), before)

    assert fusedrnn.to_torch(model) is model
    assert kinds(model) == list(TORCHS.values())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    torch.testing.assert_close(model(x), before)
    assert kinds(fusedrnn.to_torch(model)) == list(TORCHS.values())
    for twin in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_another_class_is_left_in_a_module(name):
    theirs, ours = TORCHS[name](3, 4), getattr(fusedrnn, name)(3, 4)
    fresh = set(vars(theirs))
    replaced = fusedrnn.replace_modules(theirs)
    assert replaced is theirs
    assert type(theirs) is type(ours)
    assert set(vars(theirs)) == set(vars(ours)) - {"reset_after"}
    assert repr(theirs) == repr(ours)
    fusedrnn.to_torch(theirs)
    fusedrnn.to_torch(ours)
    assert set(vars(theirs)) == set(vars(ours)) == fresh
    if name in STACKS:
        for module in (theirs, ours):
            assert [id(w) for w in module._flat_weights] == [id(p) for p in module.parameters()]
            assert not module._weights_have_changed()


def test_works_the_same_under_patch():
    model, x = Model(), torch.randn(6, 5, 3)
    expected = model(x)
    with fusedrnn.patch():
        fusedrnn.replace_modules(model)
        assert isinstance(model.again, nn.GRU)
        torch.testing.assert_close(model(x), expected)
        fusedrnn.to_torch(model)
        assert kinds(model) == list(TORCHS.values())
    torch.testing.assert_close(model(x), expected)


def test_weights_are_flattened_where_torch_does(monkeypatch):
    flattened = []
    monkeypatch.setattr(
        nn.RNNBase, "flatten_parameters", lambda self: flattened.append(type(self).__name__)
    )
    model = Model()
    theirs = list(flattened)
    flattened.clear()
    fusedrnn.replace_modules(model)
    assert flattened == []
    fusedrnn.to_torch(model)
    assert flattened == theirs  # as by their constructors: one by one, and no cell


@pytest.mark.parametrize("name", NAMES)
def test_hooks_go_on(name):
    module, seen, x = TORCHS[name](3, 4), [], input_of(name).requires_grad_()
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True)
    module.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
    module.register_state_dict_post_hook(lambda *_: seen.append("save"))
    module.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    module.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    next(module.parameters()).register_hook(lambda _: seen.append("gradient"))

    def all_of_them():
        seen.clear()
        output_of(module, x).sum().backward()
        module.load_state_dict(module.state_dict())
        return sorted(seen)

    expected = all_of_them()
    assert len(set(expected)) == 9
    for change in (fusedrnn.replace_modules, fusedrnn.to_torch):
        change(module)
        assert all_of_them() == expected


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def weight_norm_by_hook(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_hh_l0")
    return lambda: nn.utils.remove_weight_norm(module, "weight_hh_l0")


def weight_norm_by_parametrization(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    return lambda: parametrize.remove_parametrizations(module, "weight_hh_l0")


def two_parametrizations(module):
    parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    parametrize.register_parametrization(module, "weight_ih_l0", Halved())
    return lambda: [
        parametrize.remove_parametrizations(module, name)
        for name in ("weight_hh_l0", "weight_ih_l0")
    ]


def pruning(module):
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    return lambda: prune.remove(module, "weight_hh_l0")


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    "wrap", [weight_norm_by_hook, weight_norm_by_parametrization, two_parametrizations, pruning]
)
def test_wrapped_weights_stay_wrapped(name, wrap):
    module, x = TORCHS[name](3, 4), torch.randn(6, 5, 3)
    unwrap = wrap(module)
    expected, keys = output_of(module, x), list(module.state_dict())
    for change, classes in (
        (fusedrnn.replace_modules, vars(fusedrnn)),
        (fusedrnn.to_torch, TORCHS),
    ):
        change(module)
        assert parametrize.type_before_parametrizations(module) is classes[name]
        assert list(module.state_dict()) == keys
        torch.testing.assert_close(output_of(module, x), expected)
        module.zero_grad()
        output_of(module, x).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())
        if change is fusedrnn.replace_modules or parametrize.is_parametrized(module):
            # deepcopy refuses torch's where the hook or pruning left a weight with a history, and
            # after a forward a parametrized one's too; right after the change it must not.
            change(fusedrnn.replace_modules(module))
            torch.testing.assert_close(output_of(copy.deepcopy(module), x), expected)
    fusedrnn.replace_modules(module)
    unwrap()
    assert type(module) is getattr(fusedrnn, name)
    torch.testing.assert_close(output_of(module, x), expected)


def test_copies_of_a_parametrized_module_change_apart():
    one, x = nn.GRU(3, 4), torch.randn(6, 5, 3)
    parametrize.register_parametrization(one, "weight_hh_l0", Halved())
    other = copy.deepcopy(one)
    fusedrnn.replace_modules(one)
    assert isinstance(one, fusedrnn.GRU)
    assert isinstance(other, nn.GRU)
    torch.testing.assert_close(one(x)[0], other(x)[0])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_is_not_torchs_very_class_is_left_alone():
    class Mine(fusedrnn.LSTM):
        pass

    model = nn.Sequential(
        Doubled(3, 4),
        torch.ao.nn.quantizable.LSTM(3, 4),
        torch.jit.script(nn.LSTM(3, 4)),
        torch.ao.nn.quantized.dynamic.GRU(3, 4),
        Mine(3, 4),
    )
    parametrize.register_parametrization(model[0], "weight_hh_l0", Halved())
    before = [type(module) for module in model.modules()]
    fusedrnn.replace_modules(model)
    fusedrnn.to_torch(model)
    assert [type(module) for module in model.modules()] == before


def test_compiled_code_follows():
    graphs = []

    def record(graph, _):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model, x = nn.Sequential(nn.GRUCell(3, 4)), torch.randn(5, 3)
    compiled = torch.compile(model, backend=record)
    expected = compiled(x)
    fusedrnn.replace_modules(model)
    with fusedrnn.use_backend("torch"):
        torch.testing.assert_close(compiled(x), expected)
    fusedrnn.to_torch(model)
    torch.testing.assert_close(compiled(x), expected)
    assert ["rnn_forward" in graph for graph in graphs[:2]] == [False, True]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_goes_back_for_what_only_torchs_modules_can():
    model, x = fusedrnn.replace_modules(nn.Sequential(nn.LSTM(3, 4))), torch.randn(6, 5, 3)
    scripted = torch.jit.script(fusedrnn.to_torch(model))
    torch.testing.assert_close(scripted(x)[0], model(x)[0])


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_reset_before_has_no_way_back(name):
    module = getattr(fusedrnn, name)(3, 4, reset_after=False)
    model = nn.Sequential(nn.Sequential(fusedrnn.LSTM(3, 4)), module)
    with pytest.raises(ValueError, match=f"^to_torch: module '1' is a {name} with reset_after="):
        fusedrnn.to_torch(model)
    with pytest.raises(ValueError, match=f"^to_torch: the model is a {name} with reset_after="):
        fusedrnn.to_torch(module)
    assert type(model[0][0]) is fusedrnn.LSTM
    assert module.reset_after is False


def test_a_forward_of_its_own_is_not_lost_silently():
    model = nn.Sequential(nn.GRU(3, 4), nn.LSTM(3, 4))
    model[1].forward = model[1].forward
    with pytest.raises(ValueError, match=r"^replace_modules: module '1' has a forward of its own"):
        fusedrnn.replace_modules(model)
    assert kinds(model) == [TORCHS["GRU"], TORCHS["LSTM"]]
    del model[1].forward
    fusedrnn.replace_modules(model)
    model[1].forward = model[1].forward
    with pytest.raises(ValueError, match=r"^to_torch: module '1' has a forward of its own"):
        fusedrnn.to_torch(model)
    assert kinds(model) == [fusedrnn.GRU, fusedrnn.LSTM]


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(4)), nn.Linear(1, 1), 5])
def test_an_attribute_that_ours_would_hide_is_refused(value):
    module = nn.LSTM(3, 4)
    module.stream = value
    with pytest.raises(ValueError, match=r"^replace_modules: the model has an attribute 'stream'"):
        fusedrnn.replace_modules(module)
    assert type(module) is nn.LSTM
    assert module.stream is value


@pytest.mark.parametrize("change", [fusedrnn.replace_modules, fusedrnn.to_torch])
def test_only_modules_are_taken(change):
    with pytest.raises(TypeError, match=rf"^{change.__name__} takes a torch.nn.Module; got list"):
        change([nn.LSTM(3, 4)])
