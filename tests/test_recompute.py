"""``recompute=True``: the same gradients from a third of the memory, in every form of a call."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import layer

T, B, I, H = 7, 3, 4, 5
KINDS = {
    "lstm": ("LSTM", {}),
    "lstm-2-both-ways": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "lstm-batch-first-no-bias": ("LSTM", {"batch_first": True, "bias": False}),
    "gru-2": ("GRU", {"num_layers": 2, "dropout": 0.5}),
    "gru-both-ways": ("GRU", {"bidirectional": True}),
    "gru-reset-before": ("GRU", {"reset_after": False}),
    "rnn": ("RNN", {"num_layers": 2}),
}


def pair_of(kind, dtype=torch.float64):
    """Returns the same module without and with recompute."""
    name, kwargs = KINDS[kind]
    plain = getattr(fusedrnn, name)(I, H, **kwargs).to(dtype)
    again = getattr(fusedrnn, name)(I, H, recompute=True, **kwargs).to(dtype)
    again.load_state_dict(plain.state_dict())
    return plain, again


def everything(module, x, **options):
    """Returns outputs, states, and all gradients."""
    torch.manual_seed(1)  # the dropout masks
    if isinstance(x, torch.Tensor):
        x = data = x.clone().requires_grad_()
    else:
        data = x.data.clone().requires_grad_()
        x = x._replace(data=data)
    rows = module.num_layers * (1 + module.bidirectional)
    hx = torch.linspace(-1, 1, rows * B * H).reshape(rows, B, H).to(data).requires_grad_()
    states, leaves = hx, [data, hx]
    if module.mode == "LSTM":
        states = (hx, hx.detach().flip(0).requires_grad_())
        leaves.append(states[1])
    output, final = module(x, states, **options)
    results = [output if isinstance(output, torch.Tensor) else output.data]
    results += [final] if isinstance(final, torch.Tensor) else final
    total = sum((r * r.detach().cos()).sum() for r in results)
    return results, torch.autograd.grad(total, [*leaves, *module.parameters()])


def compare(kind, form, dtype, tolerance):
    plain, again = pair_of(kind, dtype)
    x = torch.randn(*((B, T) if plain.batch_first else (T, B)), I, dtype=dtype)
    options = {}
    if form == "lengths":
        options["lengths"] = torch.tensor([4, 7, 1])
    if form == "reset":
        options["reset"] = torch.rand(x.shape[:2]) < 0.3
    if form == "packed":
        x = pack_padded_sequence(x, [4, 7, 1], plain.batch_first, enforce_sorted=False)
    found = everything(again, x, **options), everything(plain, x, **options)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", ["dense", "lengths", "reset", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same(kind, form, monkeypatch):
    """In segments of two steps, of which the last found is one."""
    monkeypatch.setattr(layer, "_SEGMENT", 2 * B * 4 * H)
    with fusedrnn.use_backend("torch"):
        compare(kind, form, torch.float64, 1e-10)


@pytest.mark.parametrize(
    ("kind", "form"), [("lstm", "dense"), ("gru-both-ways", "lengths"), ("gru-2", "dense")]
)
def test_on_the_kernels(kind, form, monkeypatch):
    """Gates by schedule stepwise, one step of all rows; the recurrence as the plan says."""
    monkeypatch.setattr(layer, "_SEGMENT", 3 * B * 4 * H)
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        compare(kind, form, torch.float32, 2e-6)


def test_dense_steps_are_cut_and_what_is_left_comes_last(monkeypatch):
    monkeypatch.setattr(layer, "_SEGMENT", 3 * B * 4 * H)
    seen, gates = [], layer._gates
    monkeypatch.setattr(
        layer, "_gates", lambda config, x, *a: seen.append(len(x)) or gates(config, x, *a)
    )
    _, again = pair_of("lstm")
    with fusedrnn.use_backend("torch"):
        everything(again, torch.randn(T, B, I).double())
    assert seen == [3 * B, 3 * B, B]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "default", "again"), [("LSTM", 6, 2), ("GRU", 5, 1), ("RNN", 1, 1)]
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


def test_inference_keeps_nothing():
    module, x = fusedrnn.LSTM(8, 8, recompute=True), torch.randn(5, 2, 8)
    with torch.no_grad(), fusedrnn.use_backend("torch"):
        assert bytes_kept(module, x) == 0


# The field VmHWM, and not ru_maxrss, which a child process inherits from the one that started it.
LONG = r"""
import re, torch, fusedrnn
torch.set_num_threads(1)
module = fusedrnn.LSTM(256, 256, recompute=True)
x = torch.randn(20_000, 8, 256)
module(x)[0].square().mean().backward()
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_twenty_thousand_steps_in_two_gigabytes():
    """The whole process, with T = 20,000, B = 8, H = 256 in fp32."""
    done = subprocess.run(
        [sys.executable, "-c", LONG], capture_output=True, text=True, check=True, timeout=600
    )
    assert float(done.stdout) < 2
