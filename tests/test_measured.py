"""``auto`` follows what it has measured; the CPU and a stand-in for its clock replace a GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pairs import LENGTHS, H, I, batch, packed
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import dispatch, functional, layer, measured
from fusedrnn.kernels.problem import KernelFailed

MODULE = {"num_layers": 2, "dropout": 0.3, "dtype": torch.float32}


class Clock:
    """Stands for CUDA's events; ``times`` has T of each call that was timed."""

    def __init__(self):
        self.ms, self.times, self.run = {"triton": 0.5, "aten": 1.0}, [], measured._results

    def results(self, call, run, backend):
        self.last = call.facts.steps, self.ms[backend]
        return self.run(call, run, backend)

    def event(self, enable_timing):
        return SimpleNamespace(record=repr, synchronize=list, elapsed_time=self.elapsed)

    def elapsed(self, end):
        self.times.append(self.last[0])
        return self.last[1]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(dispatch, "_is_gpu", lambda device: True)
    monkeypatch.setattr(dispatch, "MEASURED", {})
    monkeypatch.setattr(measured, "_results", clock.results)
    monkeypatch.setattr(measured, "_ROUNDS", 1)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield clock


@pytest.mark.parametrize("form", ["dense", "packed", "no gradients"])
@pytest.mark.parametrize(("ms", "backend"), [(0.5, "triton"), (2.0, "aten")])
def test_the_faster_backend_runs(clock, ms, backend, form):
    module, clock.ms["triton"] = fusedrnn.LSTM(I, H, **MODULE), ms
    x = packed() if form == "packed" else batch()
    x = x.float() if form == "packed" else x.float().requires_grad_()
    with torch.set_grad_enabled(form != "no gradients"):
        torch.manual_seed(1)
        got = module(x)[0]
        assert len(clock.times) == 2
        explanation = fusedrnn.explain(module, x)
        assert explanation.backend == backend
        assert f"the kernels {ms:g} ms, torch's operator 1 ms" in str(explanation)
        module(x)
        torch.manual_seed(1)
        with fusedrnn.use_backend(backend):
            want = module(x)[0]
    assert len(clock.times) == 2
    torch.testing.assert_close(got.data, want.data, rtol=0, atol=0)


def test_once_for_each_of_three_classes_of_steps_and_power_of_two_of_sequences(clock, monkeypatch):
    clock.run, clock.ms["triton"] = (lambda *_: [torch.zeros(1)]), 2.0
    monkeypatch.setattr(measured, "_FORCED", "1")
    torch.backends.cudnn.benchmark = False
    module = fusedrnn.GRU(I, H)
    for T, B in ((30, 8), (32, 5), (5, 6), (33, 8), (256, 7), (257, 8), (300, 8), (29, 4)):
        module(torch.randn(T, B, I))
    assert clock.times == [30, 30, 33, 33, 257, 257, 29, 29]


def test_wrong_results_are_not_timed(clock, monkeypatch):
    module, stack = fusedrnn.GRU(I, H), functional.rnn_stack

    def wrong(*args, **options):
        output, *others = stack(*args, **options)
        return output + 1e-4, *others

    monkeypatch.setattr(functional, "rnn_stack", wrong)
    with pytest.warns(RuntimeWarning, match="wrong here"):
        module(batch().float())
    assert not clock.times
    assert fusedrnn.explain(module, batch().float()).backend == "aten"


def test_kernels_that_fail_are_reported_by_the_call_itself(clock, monkeypatch):
    def launch(*_):
        raise KernelFailed("no")

    monkeypatch.setattr(layer, "_launch", launch)
    monkeypatch.setattr(dispatch, "_planned_refusal", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="failed"):
        fusedrnn.GRU(I, H)(batch().float())
    assert not clock.times


ELSEWHERE = ("forbidden", "capture", "compiler", "transform", "mode", "named", "step", "lengths")


@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere_nothing_is_measured(clock, where, monkeypatch):
    x, module = batch().float(), fusedrnn.GRU(I, H)
    patches = {
        "forbidden": (measured, "_FORCED", "0"),
        "capture": (torch.cuda, "is_current_stream_capturing", lambda: True),
        "compiler": (torch.compiler, "is_compiling", lambda: True),
    }
    contexts = {"named": fusedrnn.use_backend("aten"), "mode": FlopCounterMode(display=False)}
    options = {"lengths": LENGTHS} if where == "lengths" else {}
    if where in patches:
        monkeypatch.setattr(*patches[where])
    if where == "transform":
        x, module = x.unsqueeze(0), torch.func.vmap(module)
    with contexts.get(where, nullcontext()):
        module(x[:1] if where == "step" else x, **options)
    assert not clock.times
    assert list(dispatch.MEASURED.values()) == [None] * (where == "lengths")
