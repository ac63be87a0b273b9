"""``recompute=True``: the same gradients from a third of the memory, in every form of a call."""

import pytest
import torch
from test_equivalence import MODULES, build, everything, runner, states_for
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import layer

T, B, I, H = 6, 5, 3, 5


@pytest.fixture(autouse=True)
def _segments_of_four_steps(monkeypatch):
    monkeypatch.setattr(layer, "_SEGMENT", 4 * B * 4 * H)


def compare(cell, form, backend, dtype, tolerance, shape=(2, 2), **options):
    """Compares a module with the same one that computes its gates again."""
    plain, again = (build(cell, *shape, dtype, recompute=r, **options) for r in (False, True))
    again.load_state_dict(plain.state_dict())
    x, hx, found = torch.randn(T, B, I), states_for(plain, B), []
    for module in (again, plain):
        torch.manual_seed(1)  # the dropout masks
        found.append(everything(runner(backend, form), module, x, hx, dtype))
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", ["dense", "batch_first", "both", "packed"])
@pytest.mark.parametrize("cell", MODULES)
def test_gradients_are_the_same(cell, form):
    """In segments of four steps, of which the last found is two."""
    options = {"batch_first": form == "batch_first", "bias": form == "dense"}
    compare(cell, form, "torch", torch.float64, 1e-10, (2, 1), dropout=0.5, **options)
    compare(cell, form, "torch", torch.float64, 1e-10, **options)


def test_on_the_kernels():
    """Gates by schedule stepwise, one step of all rows; the recurrence as the plan says."""
    compare("lstm", "dense", "triton", torch.float32, 2e-6, (1, 1))
    compare("gru", "lengths", "triton", torch.float32, 2e-6, (1, 2))


def test_the_gradient_of_the_last_state_alone():
    plain, again = build("lstm"), build("lstm", recompute=True)
    again.load_state_dict(plain.state_dict())
    x, hx = torch.randn(T, B, I).double(), [h.double() for h in states_for(plain, B)]
    found = [torch.autograd.grad(m(x, hx)[1][0].sum(), [*m.parameters()]) for m in (plain, again)]
    torch.testing.assert_close(*found)


def test_dense_steps_are_cut_and_what_is_left_comes_last(monkeypatch):
    seen, gates = [], layer._gates
    monkeypatch.setattr(
        layer, "_gates", lambda config, x, *a: seen.append(len(x)) or gates(config, x, *a)
    )
    module, x = build("lstm", recompute=True), torch.randn(T, B, I)
    everything(runner("torch", "dense"), module, x, states_for(module, B), torch.float64)
    assert seen == [4 * B, 2 * B]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_torchs_checkpoints_repeat_the_dropout_masks(backend):
    """Without the generator's state the call that is repeated would draw others."""
    ours, x = build("gru", 2, 1, dropout=0.5), torch.randn(T, B, I, dtype=torch.float64)

    def gradient(**options):
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        with fusedrnn.use_backend(backend):
            y = checkpoint(lambda x: ours(x)[0], leaf, **options) if options else ours(leaf)[0]
            y.square().sum().backward()
        return leaf.grad

    want, other = gradient(), gradient(use_reentrant=False, preserve_rng_state=False)
    assert all(torch.equal(gradient(use_reentrant=mode), want) for mode in (True, False))
    assert not torch.allclose(other, want)


def bytes_kept(module, x):
    """Returns what autograd keeps for backward, but for weights and the input itself."""
    kept: dict = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)[0]
    for tensor in (x, *module.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    if output.requires_grad:
        output.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize(
    ("kind", "default", "again", "dtype"),
    [
        ("LSTM", 6, 2, torch.float32),
        ("GRU", 5, 1, torch.float32),
        ("RNN", 1, 1, torch.float32),
        ("LSTM", 6, 2, torch.bfloat16),
    ],
)
def test_bytes_kept_for_backward(kind, default, again, dtype):
    """Numbers for each unit, step, sequence, layer and direction; in 16 bit if the model is."""
    for recompute, most in ((False, default), (True, again)):
        module = getattr(fusedrnn, kind)(64, 64, 2, bidirectional=True, recompute=recompute)
        module, x = module.to(dtype), torch.randn(50, 8, 64, dtype=dtype)
        with fusedrnn.use_backend("torch"):
            kept = bytes_kept(module, x)
        units = 50 * 8 * 64 * 2 * 2 * dtype.itemsize
        states = 4 * 2 * 2 * 8 * 64 * dtype.itemsize  # h_0, h_n and their c
        assert most * units <= kept <= most * units + states
        with torch.no_grad(), fusedrnn.use_backend("torch"):
            assert bytes_kept(module, x) == 0


def test_an_empty_batch():
    for module in (fusedrnn.LSTM(3, 4, recompute=True), fusedrnn.GRU(3, 4, recompute=True)):
        with fusedrnn.use_backend("torch"):
            module(torch.zeros(5, 0, 3))[0].sum().backward()
        assert not any(p.grad.any() for p in module.parameters())
