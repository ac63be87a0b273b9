"""Each provider is gated by the precision it multiplies in, not by that of others."""

from __future__ import annotations

import pytest
import torch

import fusedrnn
from bench import peers
from bench.cases import EVERY_CELL, Workload
from bench.gate import Gate, torch_rnns_in
from bench.peer import both
from bench.providers import PROVIDERS, ROUNDOFF, TORCH, Provider
from bench.run import Settings, Subject

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ONE = Workload("one", "toy", "none", T=9, B=4, I=5, H=32)
TF32 = 2**-11


@pytest.fixture
def switches():
    """Sets torch's switches of RNNs and of products, for one test."""
    rnns, products = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnns.fp32_precision, products.fp32_precision

    def switch(rnn, matmul):
        rnns.fp32_precision, products.fp32_precision = rnn, matmul

    yield switch
    switch(*before)


def of(name, cell="lstm"):
    return PROVIDERS[name].precision(torch.float32, CUDA, cell)


def test_on_cuda_each_follows_the_switch_that_it_reads(switches):
    switches("tf32", "ieee")  # torch's defaults
    assert {n for n in PROVIDERS if of(n) == "ieee"} == {
        "eager loop", "compiled step", "compiled loop", "haste", "jax", "onnxruntime", "fastlstm",
    }  # fmt: skip
    assert all(of(n) == "tf32" for n in (TORCH, "fusedrnn", "fusedrnn triton", "torchrl", "keras"))
    switches("ieee", "tf32")
    assert all(of(n) == "tf32" for n in ("eager loop", "haste", "keras", "fusedrnn torch"))
    assert all(of(n) == "ieee" for n in (TORCH, "fusedrnn", "fusedrnn aten", "torchrl"))
    switches("ieee", "none")  # nobody has set it
    assert of("eager loop") == of("keras") == "ieee"
    with fusedrnn.use_precision("tf32x3"):
        assert of("fusedrnn triton") == "tf32x3"
        assert PROVIDERS["fusedrnn triton"].eps(torch.float32, CUDA, "gru") is None


def test_what_a_kernel_rounds_whatever_the_switches_say(switches):
    switches("ieee", "ieee")
    assert (of("flashrnn", "lstm"), of("flashrnn", "gru")) == ("tf32", "ieee")
    assert (of("haste", "lstm"), of("haste", "gru")) == ("ieee", "fp16")
    assert PROVIDERS["haste"].eps(torch.float32, CUDA, "gru") == TF32
    assert PROVIDERS["haste"].eps(torch.float32, CUDA, "lstm") is None


@pytest.mark.parametrize("cell", EVERY_CELL)
@pytest.mark.parametrize("name", PROVIDERS)
def test_the_cpu_rounds_nothing_and_other_dtypes_go_by_their_own_eps(name, cell, switches):
    switches("tf32", "tf32")
    entry = PROVIDERS[name]
    assert entry.precision(torch.float32, CPU, cell) == "ieee"
    assert entry.precision(torch.bfloat16, CUDA, cell) == "bfloat16"
    assert entry.eps(torch.float32, CPU, cell) is entry.eps(torch.bfloat16, CUDA, cell) is None
    assert entry.precision(torch.float32, CUDA, cell) in ROUNDOFF


class Rounded(peers.EagerLoop):
    """An eager loop whose recurrent weights have tf32's ten bits of fraction."""

    def convert(self, w_ih, w_hh, b_ih, b_hh):
        bits = w_hh.detach().view(torch.int32)
        kept = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
        return w_ih, w_hh + (kept - w_hh).detach(), b_ih, b_hh


@pytest.mark.parametrize(("name", "ok"), [("ieee", False), ("tf32", True), ("fp16", True)])
def test_tf32s_errors_pass_only_of_whom_multiplies_so(name, ok, monkeypatch):
    """As on CUDA, where the precision is asked; the other contenders' is tf32 meanwhile."""
    monkeypatch.setattr(Provider, "precision", lambda self, dtype, device, cell: self.fp32(cell))
    monkeypatch.setitem(PROVIDERS, "eager loop", Provider(both(Rounded), fp32=lambda cell: name))
    subject = Subject(ONE, "lstm", Settings(CPU))
    gate = Gate(ONE, "lstm", subject.weights, subject.gate_input())
    assert gate.judge("fusedrnn torch").ok
    assert gate.judge("eager loop").ok is ok


def test_the_yardstick_runs_in_the_precision_of_who_is_judged(monkeypatch, switches):
    """Else four times tf32's errors of cuDNN would be allowed to who multiplies in ieee."""
    switches("tf32", "ieee")
    monkeypatch.setattr(Provider, "precision", lambda self, dtype, device, cell: self.fp32(cell))
    ran = []
    original = Gate._run

    def spy(self, provider, dtype, backward=True):
        ran.append((provider, dtype, torch.backends.cudnn.rnn.fp32_precision))
        return original(self, provider, dtype, backward)

    monkeypatch.setattr(Gate, "_run", spy)
    subject = Subject(ONE, "gru", Settings(CPU))
    gate = Gate(ONE, "gru", subject.weights, subject.gate_input())
    for name in ("eager loop", "fusedrnn", "eager loop"):
        gate.judge(name)
    yardsticks = [switch for who, dtype, switch in ran if (who, dtype) == (TORCH, torch.float32)]
    assert yardsticks == ["ieee", "tf32"]  # each once
    assert {switch for who, _, switch in ran if who == "eager loop"} == {"tf32"}  # as it is set
    assert torch.backends.cudnn.rnn.fp32_precision == "tf32"


@pytest.mark.parametrize(
    ("name", "switch"),
    [("ieee", "ieee"), ("tf32x3", "ieee"), ("tf32", "tf32"), ("fp16", "tf32"), ("float16", "none")],
)
def test_the_switch_is_put_back(name, switch, switches):
    switches("none", "none")
    seen = []

    def breaks():
        with torch_rnns_in(name):
            seen.append(torch.backends.cudnn.rnn.fp32_precision)
            raise KeyError

    with pytest.raises(KeyError):
        breaks()
    assert seen == [switch]
    assert torch.backends.cudnn.rnn.fp32_precision == "none"
