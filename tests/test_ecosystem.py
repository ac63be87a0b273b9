"""Tests with other libraries: our models give the results of the same torch.nn models, in fp64."""

import contextlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedrnn

pytestmark = pytest.mark.ecosystem
I, H, T, B = 3, 4, 6, 5
WORDS = 7
backends = pytest.mark.parametrize("backend", ["auto", "torch"])


class Model(nn.Module):
    """Uses the output and the last h, so that gradients arrive in both."""

    def __init__(self, library, cell):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, I)
        self.rnn = getattr(library, cell)(I, H, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * H, 2)

    def forward(self, x):
        output, state = self.rnn(x if x.is_floating_point() else self.embedding(x))
        h_n = state[0] if isinstance(state, tuple) else state
        return self.head(output.mean(1) + torch.cat((h_n[2], h_n[3]), -1))


def pair(cell="LSTM"):
    """Returns our model and torch's, with the same weights."""
    ours, theirs = Model(fusedrnn, cell).double(), Model(nn, cell).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(size=B):
    return torch.randn(size, T, I, dtype=torch.float64)


def assert_alike(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# Lightning inspects torch's trees by a name that torch has deprecated.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@backends
def test_lightning_trains(backend, tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")

    class Training(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _):
            x, y = batch
            self.losses.append(nn.functional.mse_loss(self.model(x), y))
            return self.losses[-1]

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    def losses(model):
        names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = lightning.Trainer(
            accelerator="cpu", precision="64-true", max_epochs=10, **dict.fromkeys(names, False)
        )
        training = Training(model)
        trainer.fit(training, DataLoader(data, batch_size=8))
        return torch.stack(training.losses).detach()

    monkeypatch.chdir(tmp_path)
    x = batch(16)
    data, (ours, theirs) = TensorDataset(x, x.sum(1)[:, :2]), pair()
    with fusedrnn.use_backend(backend):
        got = losses(ours)
    assert_alike(got, losses(theirs))
    assert got[-2:].mean() < got[:2].mean() / 2
    assert_alike(ours.state_dict(), theirs.state_dict())


@backends
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_captum_attributes(cell, backend):
    attr = pytest.importorskip("captum.attr")
    x, words = batch(), torch.randint(WORDS, (B, T))

    def attributions(model):
        features = attr.IntegratedGradients(model.eval()).attribute(x, target=1)
        by_word = attr.LayerIntegratedGradients(model, model.embedding)
        return features, by_word.attribute(words, torch.zeros_like(words), target=0)

    ours, theirs = pair(cell)
    with fusedrnn.use_backend(backend):
        got = attributions(ours)
    assert_alike(got, attributions(theirs))
    assert all(attribution.abs().max() > 1e-3 for attribution in got)


class Outputs(fusedrnn.LSTM):
    """An LSTM for Opacus, which needs a module that returns one tensor."""

    def forward(self, input):
        return super().forward(input)[0]


# Opacus hooks modules whose input needs no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when:UserWarning")
@backends
@pytest.mark.parametrize("batch_first", [True, False])
def test_opacus_takes_gradients_per_sample(backend, batch_first):
    opacus = pytest.importorskip("opacus")
    shape = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    ours, theirs = Outputs(I, H, **shape).double(), nn.LSTM(I, H, **shape).double()
    ours.load_state_dict(theirs.state_dict())
    x, want = batch() if batch_first else batch().transpose(0, 1), []
    for sample in x.split(1, 0 if batch_first else 1):
        loss = theirs(sample)[0].square().sum()
        want.append(torch.autograd.grad(loss, list(theirs.parameters())))
    model = opacus.GradSampleModule(ours, batch_first=batch_first, loss_reduction="sum")
    with fusedrnn.use_backend(backend):
        model(x).square().sum().backward()
    got = [parameter.grad_sample for parameter in model.parameters()]
    assert_alike(got, [torch.stack(grads) for grads in zip(*want, strict=True)])


def test_opacus_replaces_what_to_torch_returns():
    layers = pytest.importorskip("opacus.layers")
    validators = pytest.importorskip("opacus.validators")
    ours, theirs = (model.float() for model in pair())  # Opacus makes a DPLSTM in fp32
    fixed = validators.ModuleValidator.fix(fusedrnn.to_torch(ours))
    assert type(fixed.rnn) is layers.DPLSTM
    assert_alike(fixed.double()(x := batch()), theirs.double()(x))


def test_safetensors_of_tied_weights(tmp_path):
    files, path, x = pytest.importorskip("safetensors.torch"), tmp_path / "tied", batch()
    models = [Model(library, "LSTM").double() for library in (fusedrnn, nn)]
    for model in models:
        model.rnn.weight_hh_l0_reverse = model.rnn.weight_hh_l0
    files.save_model(models[0], path)
    assert len(files.load_file(path)) == len(models[0].state_dict()) - 1
    files.load_model(models[1], path)
    assert_alike(models[0](x), models[1](x))


@pytest.mark.filterwarnings("ignore")  # of the exporter, and of the tracer below it
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_onnx_by_the_older_exporter(cell, tmp_path):
    """One operator of ONNX for each layer, for all T and B."""
    onnx = pytest.importorskip("onnx")
    runtime, path = pytest.importorskip("onnxruntime"), tmp_path / "model.onnx"
    ours, theirs = (model.float() for model in pair(cell))
    given, axes = (batch().float(),), {"x": {0: "B", 1: "T"}}
    torch.onnx.export(ours, given, path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    assert [node.op_type for node in onnx.load(path).graph.node].count(cell) == 2
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 11, I)
    (got,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_tensorboard_draws_torchs_operators(cell):
    graph = pytest.importorskip("torch.utils.tensorboard._pytorch_graph").graph  # of add_graph
    found = [sorted(n.op for n in graph(model, batch())[0].node) for model in pair(cell)]
    assert found[0] == found[1]
    assert f"aten::{cell.lower()}" in " ".join(found[0])


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_pyro_draws_weights(cell):
    """A Bayesian layer: its weights are samples, drawn by attribute."""
    pyro = pytest.importorskip("pyro")
    x, found = batch().float(), []
    for library in (fusedrnn, nn):
        torch.manual_seed(1)
        rnn = pyro.nn.PyroModule[getattr(library, cell)](I, H)
        prior = pyro.distributions.Normal(torch.zeros_like(rnn.weight_hh_l0), 1.0)
        rnn.weight_hh_l0 = pyro.nn.PyroSample(prior.to_event(2))
        found.append([rnn(x)[0] for _ in range(2)])
    torch.testing.assert_close(*found)
    assert not torch.equal(*found[0])


@pytest.mark.filterwarnings("ignore:distutils Version classes:DeprecationWarning")
@backends
def test_torchviz_draws_the_graph(backend):
    torchviz = pytest.importorskip("torchviz")
    ours, _ = pair("GRU")
    with fusedrnn.use_backend(backend):
        dot = torchviz.make_dot(ours(batch()), dict(ours.named_parameters()), show_saved=True)
    assert "rnn.weight_hh_l1_reverse" in dot.source


def darts(_):
    models, series = pytest.importorskip("darts.models"), pytest.importorskip("darts")
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    model = models.RNNModel(
        12, "LSTM", hidden_dim=8, training_length=18, n_epochs=2, random_state=0,
        pl_trainer_kwargs=trainer | {"enable_model_summary": False},
    )  # fmt: skip
    past = series.TimeSeries.from_values(torch.arange(60.0).sin().numpy())
    model.fit(past)
    return model.model, torch.from_numpy(model.predict(5, past).values())


def demucs(convert):
    demucs = pytest.importorskip("demucs.demucs").Demucs
    model = convert(demucs(["drums", "bass"], channels=4, depth=2, lstm_layers=2, resample=False))
    return model, model(torch.randn(1, 2, 2000))


def fastai(convert):
    model = convert(pytest.importorskip("fastai.text.models.awdlstm").AWD_LSTM(20, 6, 8, 2))
    return model, model(torch.randint(20, (3, 11)))


def sb3_contrib(convert):
    ppo = pytest.importorskip("sb3_contrib").RecurrentPPO(
        "MlpLstmPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=2, seed=0,
        device="cpu", policy_kwargs={"lstm_hidden_size": 8},
    )  # fmt: skip
    convert(ppo.policy)
    ppo.learn(64)
    return ppo.policy, torch.cat([p.detach().flatten() for p in ppo.policy.parameters()])


def speechbrain(convert):
    rnns = pytest.importorskip("speechbrain.nnet.RNN")
    sizes = {"cnn_channels": (4,), "cnn_blocks": 1, "rnn_neurons": 8, "dnn_neurons": 8}
    crdnn = pytest.importorskip("speechbrain.lobes.models.CRDNN").CRDNN
    model = convert(crdnn(input_shape=[2, 12, 16], rnn_class=rnns.LSTM, rnn_layers=2, **sizes))
    return model, model(torch.randn(2, 12, 16))


def torch_geometric(convert):
    """Over the neighbours of each node, as a graph's layers do."""
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    kinds = aggr.LSTMAggregation(I, H), aggr.GRUAggregation(I, H), aggr.Set2Set(I, 2)
    model, index = convert(nn.ModuleList(kinds)), torch.tensor([0, 0, 0, 1, 2, 2])
    x = torch.randn(6, I)
    return model, torch.cat([aggregate(x, index) for aggregate in model], 1)


def torchrl(convert):
    """Its modules cut a batch of steps where a trajectory begins."""
    rl, tensordict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict")
    keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    module = convert(rl.LSTMModule(I, H, **keys))
    is_init = torch.zeros(B, T, 1, dtype=torch.bool)
    is_init[:, 0], is_init[2, 3] = True, True
    given = {"x": torch.randn(B, T, I), "is_init": is_init}
    given |= dict.fromkeys("hc", torch.zeros(B, T, 1, H))
    with rl.set_recurrent_mode(True):
        return module, module(tensordict.TensorDict(given, [B, T]))["y"]


PROGRAMS = darts, demucs, fastai, sb3_contrib, speechbrain, torch_geometric, torchrl


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_computes_the_same_bits(program, monkeypatch, tmp_path):
    """Torch's run comes first, so that libraries are imported as without fusedrnn."""
    monkeypatch.chdir(tmp_path)
    if find_spec("torchaudio") is None:  # what is tested here does without
        monkeypatch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
    found = []
    for ours in (False, True):
        torch.manual_seed(0)
        with fusedrnn.patch() if ours else contextlib.nullcontext():
            model, y = program(fusedrnn.replace_modules if ours else lambda model: model)
        assert any(type(m).__module__ == "fusedrnn.modules" for m in model.modules()) == ours
        weights = [p for p in model.parameters() if p.requires_grad] if y.requires_grad else []
        grads = torch.autograd.grad(y.square().sum(), weights, allow_unused=True) if weights else ()
        found.append([y, *(g for g in grads if g is not None)])
    torch.testing.assert_close(*found, rtol=0, atol=0)
