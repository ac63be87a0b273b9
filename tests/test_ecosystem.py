"""Tests with other libraries: our models give the results of the same torch.nn models, in fp64."""

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
        make = getattr(library, cell)
        self.embedding = nn.Embedding(WORDS, I)
        self.rnn = make(I, H, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * H, 2)

    def forward(self, x):
        output, state = self.rnn(x if x.is_floating_point() else self.embedding(x))
        h_n = state[0] if isinstance(state, tuple) else state
        return self.head(output.mean(1) + torch.cat((h_n[2], h_n[3]), -1))


def pair(cell="LSTM"):
    """Our model and torch's, with the same weights."""
    ours, theirs = Model(fusedrnn, cell).double(), Model(nn, cell).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(size=B):
    return torch.randn(size, T, I, dtype=torch.float64)


def assert_alike(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# What Lightning asks of torch's trees when it looks at a loader.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@backends
def test_lightning_trains(backend, tmp_path, monkeypatch):
    """Compares losses and weights after every step; no file is left behind."""
    lightning = pytest.importorskip("lightning")

    class Training(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _):
            x, y = batch
            loss = nn.functional.mse_loss(self.model(x), y)
            self.log("loss", loss)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    monkeypatch.chdir(tmp_path)
    x = batch(16)
    data = TensorDataset(x, x.sum(1)[:, :2])

    def losses(model):
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=10,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        training = Training(model)
        trainer.fit(training, DataLoader(data, batch_size=8))
        return torch.stack(training.losses)

    ours, theirs = pair()
    before = {name: weight.clone() for name, weight in theirs.rnn.state_dict().items()}
    with fusedrnn.use_backend(backend):
        got = losses(ours)
    assert_alike(got, losses(theirs))
    assert got[-2:].mean() < got[:2].mean() / 2
    assert_alike(ours.state_dict(), theirs.state_dict())
    assert all((weight != before[name]).all() for name, weight in ours.rnn.state_dict().items())
    assert not list(tmp_path.iterdir())


@backends
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_captum_attributes(cell, backend):
    """Compares attributions of features and words, which add up to the output."""
    attr = pytest.importorskip("captum.attr")

    x, words = batch(), torch.randint(WORDS, (B, T))

    def attributions(model):
        features = attr.IntegratedGradients(model.eval())
        of_features, rest = features.attribute(x, target=1, return_convergence_delta=True)
        by_word = attr.LayerIntegratedGradients(model, model.embedding)
        return of_features, by_word.attribute(words, torch.zeros_like(words), target=0), rest

    ours, theirs = pair(cell)
    with fusedrnn.use_backend(backend):
        got = attributions(ours)
    assert_alike(got, attributions(theirs))
    assert all(attribution.abs().max() > 1e-3 for attribution in got[:2])
    assert got[-1].abs().max() < 1e-6


class Outputs(fusedrnn.LSTM):
    """An LSTM for Opacus, which needs a module that returns one tensor."""

    def forward(self, input):
        return super().forward(input)[0]


class Tagger(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(2 * H, 2)

    def forward(self, x):
        output = self.rnn(x)
        return self.head(output if isinstance(output, torch.Tensor) else output[0])


def taggers(**kwargs):
    shape = {"num_layers": 2, "bidirectional": True, **kwargs}
    ours, theirs = Tagger(Outputs(I, H, **shape)).double(), Tagger(nn.LSTM(I, H, **shape)).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients_by_a_loop(model, x, dim):
    """Returns the gradients of the sum of squares of each sample."""
    each = []
    for sample in x.split(1, dim):
        loss = model(sample).square().sum()
        each.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


# Opacus hooks modules whose input needs no gradient.
first_module = pytest.mark.filterwarnings("ignore:Full backward hook is firing when:UserWarning")


@first_module
@backends
@pytest.mark.parametrize("batch_first", [True, False])
def test_opacus_takes_gradients_per_sample(backend, batch_first):
    GradSampleModule = pytest.importorskip("opacus").GradSampleModule
    ours, theirs = taggers(batch_first=batch_first)
    x = batch() if batch_first else batch().transpose(0, 1)
    want = gradients_by_a_loop(theirs, x, 0 if batch_first else 1)
    model = GradSampleModule(ours, batch_first=batch_first, loss_reduction="sum")
    with fusedrnn.use_backend(backend):
        model(x).square().sum().backward()
    assert_alike([p.grad_sample for p in model.parameters()], want)


@first_module
def test_opacus_makes_a_private_step():
    """Compares with the mean of the gradients per sample, each clipped to norm 1."""
    GradSampleModule = pytest.importorskip("opacus").GradSampleModule
    DPOptimizer = pytest.importorskip("opacus.optimizers").DPOptimizer
    ours, theirs = taggers(batch_first=True)
    x = batch()
    grads = gradients_by_a_loop(theirs, x, 0)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    assert (norms > 1).any()
    for weight, grad in zip(theirs.parameters(), grads, strict=True):
        clipped = torch.einsum("b,b...->...", (1 / (norms + 1e-6)).clamp(max=1), grad)
        weight.data -= 0.1 * clipped / B

    model = GradSampleModule(ours, loss_reduction="sum")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    private = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=B)
    model(x).square().sum().backward()
    private.step()
    assert_alike(ours.state_dict(), theirs.state_dict())


@first_module
def test_opacus_raises_for_a_tuple():
    """The hooks of Opacus miss h_n in the tuple, and then it makes no step."""
    GradSampleModule = pytest.importorskip("opacus").GradSampleModule
    DPOptimizer = pytest.importorskip("opacus.optimizers").DPOptimizer
    model = GradSampleModule(pair()[0].rnn)
    with pytest.raises(TypeError, match="only integer tensors"):
        model(batch())[0].sum().backward()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    private = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=B)
    model(batch())[1][0].sum().backward()
    with pytest.raises(ValueError, match="Per sample gradient is not"):
        private.step()


def test_opacus_replaces_what_to_torch_gives():
    DPLSTM = pytest.importorskip("opacus.layers").DPLSTM
    ModuleValidator = pytest.importorskip("opacus.validators").ModuleValidator
    ours, theirs = (model.float() for model in pair())  # what a DPLSTM is made in
    fixed = ModuleValidator.fix(fusedrnn.to_torch(ours))
    assert type(fixed.rnn) is DPLSTM
    assert_alike(fixed.double()(x := batch()), theirs.double()(x))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_torchinfo_counts(cell):
    summary = pytest.importorskip("torchinfo").summary
    ours, theirs = pair(cell)
    words = torch.randint(WORDS, (B, T))
    got = summary(ours, input_data=words, verbose=0)
    rows = {row.class_name: row for row in got.summary_list}
    assert got.total_params == sum(p.numel() for p in theirs.parameters())
    assert rows[cell].num_params == sum(p.numel() for p in theirs.rnn.parameters())
    assert rows[cell].output_size == [B, T, 2 * H]
    assert rows["Linear"].output_size == [B, 2]
    assert str(got) == str(summary(theirs, input_data=words, verbose=0))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_safetensors_there_and_back(cell, tmp_path):
    """Moves weights to a module of torch.nn and back, bit for bit."""
    files = pytest.importorskip("safetensors.torch")
    there, back, x = tmp_path / "there.safetensors", tmp_path / "back.safetensors", batch()
    ours, theirs, again = Model(fusedrnn, cell), Model(nn, cell), Model(fusedrnn, cell)
    files.save_file(ours.state_dict(), there)
    theirs.load_state_dict(files.load_file(there))
    files.save_file(theirs.state_dict(), back)
    again.load_state_dict(files.load_file(back))
    assert there.read_bytes() == back.read_bytes()
    assert torch.equal(again(x.float()), ours(x.float()))
    assert_alike(ours.double()(x), theirs.double()(x))


def test_safetensors_of_tied_weights(tmp_path):
    """``save_model`` writes tied weights once, ``load_model`` keeps them tied."""
    files = pytest.importorskip("safetensors.torch")

    def tied(library):
        model = Model(library, "LSTM").double()
        for name in ("weight_hh_l0", "weight_hh_l1"):
            setattr(model.rnn, name + "_reverse", getattr(model.rnn, name))
        return model

    path, x = tmp_path / "tied.safetensors", batch()
    ours, theirs, again = tied(fusedrnn), tied(nn), tied(fusedrnn)
    with pytest.raises(RuntimeError, match="share memory"):
        files.save_file(ours.state_dict(), path)
    files.save_model(ours, path)
    assert len(files.load_file(path)) == len(ours.state_dict()) - 2
    files.load_model(theirs, path)
    assert_alike(ours(x), theirs(x))
    files.save_model(theirs, path)
    files.load_model(again, path)
    assert again.rnn.weight_hh_l1_reverse is again.rnn.weight_hh_l1
    assert torch.equal(again(x), ours(x))
