"""``recompute=True``: the same gradients from a third of the memory, in every form of a call."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import recompute

T, B, I, H = 7, 3, 4, 5
KINDS = {
    "lstm": ("LSTM", {}),
    "lstm-2-both-ways-dropout": (
        "LSTM",
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    ),
    "lstm-projected": ("LSTM", {"proj_size": 2, "bidirectional": True, "num_layers": 2}),
    "lstm-batch-first-no-bias": ("LSTM", {"batch_first": True, "bias": False}),
    "gru-2": ("GRU", {"num_layers": 2, "dropout": 0.5}),
    "gru-both-ways": ("GRU", {"bidirectional": True}),
    "gru-reset-before": ("GRU", {"reset_after": False, "bidirectional": True}),
    "rnn": ("RNN", {"num_layers": 2}),
}


def pair_of(kind, dtype=torch.float64):
    """The same module without and with recompute."""
    name, kwargs = KINDS[kind]
    torch.manual_seed(0)
    plain = getattr(fusedrnn, name)(I, H, **kwargs).to(dtype)
    again = getattr(fusedrnn, name)(I, H, recompute=True, **kwargs).to(dtype)
    again.load_state_dict(plain.state_dict())
    return plain, again


def everything(module, x, **options):
    """Outputs, states, and the gradients of all of them in the input, hx and the weights."""
    torch.manual_seed(1)  # the masks
    if isinstance(x, torch.Tensor):
        x = x.clone().requires_grad_()
        leaves = [x]
    else:
        data = x.data.clone().requires_grad_()
        x, leaves = x._replace(data=data), [data]
    rows = module.num_layers * (1 + module.bidirectional)
    P = module.proj_size or H
    hx = torch.linspace(-1, 1, rows * B * P, dtype=torch.float64).reshape(rows, B, P).to(leaves[0])
    hx = hx.requires_grad_()
    states = hx
    if module.mode == "LSTM":
        c = torch.linspace(1, -1, rows * B * H).reshape(rows, B, H).to(hx).requires_grad_()
        states, leaves = (hx, c), [*leaves, c]
    output, final = module(x, states, **options)
    results = [output.data if not isinstance(output, torch.Tensor) else output]
    results += [final] if isinstance(final, torch.Tensor) else final
    total = sum((r * r.detach().cos()).sum() for r in results)
    return results, torch.autograd.grad(total, [hx, *leaves, *module.parameters()])


def assert_equal(got, want, tolerance=1e-10):
    for left, right in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def inputs(kind, dtype=torch.float64):
    torch.manual_seed(2)
    batch_first = KINDS[kind][1].get("batch_first", False)
    return torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=dtype)


FORMS = ("dense", "lengths", "reset", "packed")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same(kind, form, monkeypatch):
    """In segments of 2 steps, of which the last found is one."""
    monkeypatch.setattr(recompute, "SEGMENT", 2 * B * 4 * H)
    (plain, again), x = pair_of(kind), inputs(kind)
    options = {}
    if form == "lengths":
        options["lengths"] = torch.tensor([4, 7, 1])
    if form == "reset":
        options["reset"] = torch.rand(x.shape[:2]) < 0.3
    if form == "packed":
        first = plain.batch_first
        x = pack_padded_sequence(x, torch.tensor([4, 7, 1]), first, enforce_sorted=False)
    with fusedrnn.use_backend("torch"):
        assert_equal(everything(again, x, **options), everything(plain, x, **options))


@pytest.mark.parametrize("form", ["dense", "lengths"])
@pytest.mark.parametrize(
    "kind", ["lstm", "gru-both-ways", "gru-reset-before", "lstm-2-both-ways-dropout"]
)
def test_on_the_kernels(kind, form, monkeypatch):
    """Gates by schedule stepwise, one step of all rows; the recurrence as the plan says."""
    monkeypatch.setattr(recompute, "SEGMENT", 3 * B * 4 * H)
    plain, again = pair_of(kind, torch.float32)
    x = inputs(kind, torch.float32)
    options = {"lengths": torch.tensor([4, 7, 1])} if form == "lengths" else {}
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        assert_equal(everything(again, x, **options), everything(plain, x, **options), 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_are_known_begin_with_the_same_zeros(kind, monkeypatch):
    """From the second call on h_0 and c_0 may be one tensor of zeros."""
    monkeypatch.setattr(recompute, "SEGMENT", 2 * B * 4 * H)  # segments that begin with a state
    plain, again = pair_of(kind)
    x = torch.randn(B, T, I, dtype=torch.float64)
    x = x if plain.batch_first else x.transpose(0, 1)
    for _ in range(3):
        found = []
        for module in (plain, again):
            torch.manual_seed(1)  # the masks
            with fusedrnn.use_backend("torch"):
                output = module(x)[0]
            found.append(torch.autograd.grad(output.square().sum(), list(module.parameters())))
        for left, right in zip(*found, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_a_wavefront_is_taken_apart():
    """Stacked layers save c of each, and each runs backwards by itself."""
    torch.manual_seed(0)
    plain = fusedrnn.LSTM(8, 96, num_layers=2, dtype=torch.float16)
    again = fusedrnn.LSTM(8, 96, num_layers=2, dtype=torch.float16, recompute=True)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 8, dtype=torch.float16)
    with fusedrnn.use_backend("triton"):
        assert len(fusedrnn.explain(again, x).layers) == 2
        found = []
        for module in (plain, again):
            given = x.clone().requires_grad_()
            out = module(given)[0]
            found.append(torch.autograd.grad(out.float().sum(), [given, *module.parameters()]))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, atol=2e-2, rtol=2e-2)


def bytes_kept(module, x):
    """What autograd keeps for backward, but for weights and the input itself."""
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
    """Numbers a unit, step, sequence, layer and direction; in 16 bit when the model is."""
    for recomputes, most in ((False, default), (True, again)):
        module = getattr(fusedrnn, kind)(64, 64, 2, bidirectional=True, recompute=recomputes)
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


def test_second_derivatives_compile_and_per_sample():
    plain, again = pair_of("gru-both-ways")
    x = inputs("gru-both-ways").requires_grad_()
    of = []
    for module in (plain, again):
        (d_x,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        of.append(torch.autograd.grad(d_x.square().sum(), [x, *module.parameters()]))
    for left, right in zip(*of, strict=True):
        torch.testing.assert_close(left, right)

    params = {name: p.detach() for name, p in plain.named_parameters()}
    xs = torch.randn(4, T, B, I, dtype=torch.float64)
    found = [
        vmap(
            grad(lambda p, x, m=m: functional_call(m, p, (x,))[0].square().sum()), in_dims=(None, 0)
        )(params, xs)
        for m in (plain, again)
    ]
    for name in params:
        torch.testing.assert_close(found[1][name], found[0][name])

    torch._dynamo.reset()
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x)[0].square().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(plain(x)[0].square().sum(), x))


def test_torch_cannot_and_the_module_says_that_it_does():
    module, x = fusedrnn.GRU(I, H, recompute=True), torch.randn(T, B, I)
    assert "recompute=True" in repr(module)
    assert "recompute" in str(fusedrnn.explain(module, x))
    with fusedrnn.use_backend("aten"):
        with pytest.raises(NotImplementedError, match="saves whatever its backward needs"):
            module(x)
        with torch.no_grad():
            module(x)


# VmHWM and not ru_maxrss: the latter goes over from the process that started this one, whose
# 2.9 GiB were once taken for it.
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
    """The whole process, T = 20,000, B = 8, H = 256, fp32."""
    ran = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 2.0
