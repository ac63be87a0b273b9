"""Every form of input through every backend, against torch's modules on the same weights.

On the aten backend results are torch's bit for bit; the pure-torch backend is compared in fp64.
"""

from __future__ import annotations

import pytest
import torch
from models import LoopGRU
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.testing import assert_budget

BACKENDS = ("aten", "torch")
STACKS = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "deep bidirectional, no bias": {"num_layers": 3, "bidirectional": True, "bias": False},
    "batch first": {"batch_first": True, "num_layers": 2},
}
NAMES = ("LSTM", "GRU", "RNN", "RNN relu")
LENGTHS = (4, 7, 4, 1, 7, 6)


def build(name: str, dtype: torch.dtype = torch.float64, **kwargs) -> tuple[nn.Module, nn.Module]:
    """torch's module and ours with the same weights."""
    name, *nonlinearity = name.split()
    kwargs |= {"nonlinearity": nonlinearity[0]} if nonlinearity else {}
    theirs = getattr(nn, name)(3, 5, dtype=dtype, **kwargs)
    ours = getattr(fusedrnn, name)(3, 5, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states_for(module: nn.Module, *middle: int) -> Tensor | tuple[Tensor, Tensor]:
    """A random hx, with ``middle`` between layers and columns."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    dtype = module.weight_hh_l0.dtype
    h = torch.randn(rows, *middle, module.proj_size or module.hidden_size, dtype=dtype)
    if module.mode != "LSTM":
        return h
    return h, torch.randn(rows, *middle, module.hidden_size, dtype=dtype)


def leaves(tree) -> list[Tensor]:
    """The tensors of an input, hx or result."""
    if tree is None:
        return []
    if isinstance(tree, PackedSequence):
        return [tree.data]
    return [tree] if isinstance(tree, Tensor) else [t for part in tree for t in leaves(part)]


def run(module: nn.Module, input, hx=None) -> list[Tensor]:
    """Outputs, states, and the gradients of input, hx and weights from random cotangents."""
    sources = [*leaves(input), *leaves(hx), *module.parameters()]
    for source in sources:
        source.requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)  # of the dropout masks
        results = leaves(module(input, hx))
    generator = torch.Generator().manual_seed(4)
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results
    ]
    return results + list(torch.autograd.grad(results, sources, cotangents, allow_unused=True))


def assert_same(backend: str, theirs: nn.Module, ours: nn.Module, input, hx=None) -> None:
    expected = run(theirs, input, hx)
    with fusedrnn.use_backend(backend):
        got = run(ours, input, hx)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        tolerance = 0 if backend == "aten" else 1e-12
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)
    assert got[0].stride() == expected[0].stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [False, True], ids=["no hx", "hx"])
def test_dense_input(backend, stack, name, given):
    theirs, ours = build(name, **STACKS[stack])
    batched = torch.randn(7, 6, 3, dtype=torch.float64)
    batch = 7 if theirs.batch_first else 6
    assert_same(backend, theirs, ours, batched, states_for(ours, batch) if given else None)
    unbatched = torch.randn(7, 3, dtype=torch.float64)
    assert_same(backend, theirs, ours, unbatched, states_for(ours) if given else None)


def packed(enforce_sorted: bool, lengths: tuple[int, ...] = LENGTHS) -> PackedSequence:
    lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    return pack_sequence(sequences, enforce_sorted=enforce_sorted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
def test_packed_input(backend, stack, name, is_sorted):
    theirs, ours = build(name, **STACKS[stack])
    input = packed(is_sorted)
    assert_same(backend, theirs, ours, input)
    assert_same(backend, theirs, ours, input, states_for(ours, len(LENGTHS)))
    with fusedrnn.use_backend(backend):
        output, _ = ours(input)
    assert output.batch_sizes is input.batch_sizes
    assert output.sorted_indices is input.sorted_indices
    assert output.unsorted_indices is input.unsorted_indices


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
def test_reset_before_runs_each_sequence_as_if_alone(is_packed, is_sorted):
    kwargs = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    loop, ours = LoopGRU(3, 5, **kwargs), fusedrnn.GRU(3, 5, reset_after=False, **kwargs)
    ours.load_state_dict(loop.state_dict())
    input, hx = packed(is_sorted), states_for(ours, len(LENGTHS))
    sequences = unpack_sequence(input)
    alone = [loop(s.unsqueeze(1), hx[:, i : i + 1]) for i, s in enumerate(sequences)]
    if is_packed:
        output, h_n = ours(input, hx)
        outputs = unpack_sequence(output)
    else:
        pairs = [ours(s, hx[:, i]) for i, s in enumerate(sequences)]
        outputs, h_n = [o for o, _ in pairs], torch.stack([h for _, h in pairs], 1)
    for got, (expected, _) in zip(outputs, alone, strict=True):
        torch.testing.assert_close(got, expected.squeeze(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(h_n, torch.cat([h for _, h in alone], 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_dropout_draws_torchs_masks(backend, name, dropout, is_packed):
    theirs, ours = build(name, num_layers=3, bidirectional=True, dropout=dropout)
    input = packed(False) if is_packed else torch.randn(7, 6, 3, dtype=torch.float64)
    trained = run(theirs, input)[0]
    assert_same(backend, theirs, ours, input)
    assert_same(backend, theirs.eval(), ours.eval(), input)
    assert not torch.allclose(trained, run(theirs, input)[0])


def test_dropout_takes_as_much_from_the_generator_as_torch():
    theirs, ours = build("GRU", torch.float32, num_layers=3, dropout=0.5)
    x, following = torch.randn(7, 6, 3), []
    for module, backend in ((theirs, "auto"), (ours, "aten"), (ours, "torch")):
        torch.manual_seed(9)
        with fusedrnn.use_backend(backend):
            module(x)
        following.append(torch.rand(4))
    assert torch.equal(following[0], following[1])
    assert torch.equal(following[0], following[2])


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_projection(backend, bias, is_packed):
    """h of 2 columns and c of 4, by every backend; triton runs it step by step, dense."""
    theirs, ours = build("LSTM", num_layers=2, bidirectional=True, proj_size=2, bias=bias)
    input = packed(False) if is_packed else torch.randn(7, 6, 3, dtype=torch.float64)
    if backend == "triton" and is_packed:
        with fusedrnn.use_backend("triton"), pytest.raises(NotImplementedError, match="dense"):
            ours(input)
        return
    assert_same(backend, theirs, ours, input)
    assert_same(backend, theirs, ours, input, states_for(ours, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(backend, name):
    theirs, ours = build(name, num_layers=2, bidirectional=True)
    assert_same(backend, theirs, ours, torch.zeros(7, 0, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_functions_are_the_modules(name):
    kwargs = {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}
    _, module = build(name, torch.float32, **kwargs)
    x = torch.randn(6, 7, 3)
    got = getattr(fusedrnn, name.lower())(x, None, list(module.parameters()), **kwargs)
    for g, e in zip(leaves(got), leaves(module(x)), strict=True):
        assert torch.equal(g, e)


def test_functions_take_the_equations():
    x = torch.randn(7, 6, 3)
    for module, got in (
        (m := fusedrnn.RNN(3, 5, nonlinearity="relu"), fusedrnn.rnn(
            x, None, list(m.parameters()), nonlinearity="relu"
        )),
        (m := fusedrnn.GRU(3, 5, reset_after=False), fusedrnn.gru(
            x, None, list(m.parameters()), reset_after=False
        )),
    ):  # fmt: skip
        assert torch.equal(got[0], module(x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "RNNCell relu"])
def test_cells(backend, bias, name):
    name, *nonlinearity = name.split()
    kwargs = {"bias": bias, "dtype": torch.float64}
    kwargs |= {"nonlinearity": nonlinearity[0]} if nonlinearity else {}
    theirs, ours = getattr(nn, name)(3, 5, **kwargs), getattr(fusedrnn, name)(3, 5, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    for batch in ((6,), (0,), ()):
        x, h, c = (torch.randn(*batch, n, dtype=torch.float64) for n in (3, 5, 5))
        for hx in (None, (h, c) if name == "LSTMCell" else h):
            assert_same(backend, theirs, ours, x, hx)


def test_cell_that_resets_before_is_one_step_of_the_gru():
    gru = fusedrnn.GRU(3, 5, reset_after=False)
    cell = fusedrnn.GRUCell(3, 5, reset_after=False)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in gru.state_dict().items()})
    x, h = torch.randn(6, 3), torch.randn(6, 5)
    assert torch.equal(cell(x, h), gru(x.unsqueeze(0), h.unsqueeze(0))[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_its_dtype(name):
    _, ours = build(name, torch.float32, num_layers=2, bidirectional=True)
    _, half = build(name, torch.bfloat16, num_layers=2, bidirectional=True)
    half.load_state_dict(ours.state_dict())
    x, hx = torch.randn(7, 6, 3), states_for(ours, 6)
    rounded = x.bfloat16(), hx.bfloat16() if isinstance(hx, Tensor) else [h.bfloat16() for h in hx]
    with fusedrnn.use_backend("torch"):
        expected = leaves(half(*rounded))
        with torch.autocast("cpu", torch.bfloat16):
            got = leaves(ours(x, hx))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.bfloat16
        assert torch.equal(g, e)
    got[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_autocast_leaves_float64_alone():
    _, ours = build("GRU")
    x = torch.randn(7, 6, 3, dtype=torch.float64)
    with fusedrnn.use_backend("torch"):
        expected = ours(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x)[0], expected)
            assert "float64" in str(fusedrnn.explain(ours, x))


def test_autocast_of_an_lstm_runs_on_a_cpu_that_onednn_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "_onednn_takes", lambda dtype: False)
    ours = fusedrnn.LSTM(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(7, 6, 3))[0].dtype == torch.bfloat16
        with (
            fusedrnn.use_backend("aten"),
            pytest.raises(NotImplementedError, match="needs a CPU with bfloat16"),
        ):
            ours(torch.randn(7, 6, 3))
    assert dispatch.choose(ours._prepare(torch.randn(7, 6, 3)).facts) == "aten"


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_works_in_eval(backend):
    theirs, ours = build("LSTM", num_layers=2)
    x = torch.randn(7, 6, 3, dtype=torch.float64)
    assert_same(backend, theirs.eval(), ours.eval(), x)


KERNELS = ("LSTM", "GRU", "GRU before", "RNN", "RNN relu")


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [*((name, False) for name in KERNELS), ("LSTM", True), (KERNELS[2], True)],
)
def test_modules_on_the_kernels(name, is_packed, device):
    before = name == "GRU before"
    kwargs = {"num_layers": 2, "bidirectional": True}
    if before:
        theirs, ours = None, fusedrnn.GRU(3, 5, reset_after=False, **kwargs).to(device)
    else:
        theirs, ours = build(name, torch.float32, **kwargs)
        ours = ours.to(device)
    input = packed(False, (1, 3, 3)) if is_packed else torch.randn(4, 3, 3, dtype=torch.float64)
    input = input.to(device, torch.float32)
    truth_of = fusedrnn.GRU(3, 5, reset_after=False, **kwargs) if before else theirs
    truth_of.load_state_dict(ours.state_dict())
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        got = run(ours, input)
    # gru_reset_before has no operator of torch's to err beside: its reference is ours in fp32.
    with fusedrnn.use_backend("torch" if before else "auto"):
        ref = run(truth_of, input.to("cpu"))
        truth = run(truth_of.double(), input.to("cpu", torch.float64))
    for i, tensors in enumerate(zip(got, ref, truth, strict=True)):
        assert_budget(f"tensor {i}", *tensors)
