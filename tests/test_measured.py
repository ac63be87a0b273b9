"""``auto`` follows what it has measured; the CPU and a stand-in for its clock replace a GPU."""

from contextlib import nullcontext

import pytest
import torch
from pairs import LENGTHS, B, H, I, batch, packed
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import dispatch, functional, layer, measured
from fusedrnn.kernels.problem import KernelFailed

MODULE = {"num_layers": 2, "dropout": 0.3, "dtype": torch.float32}


@pytest.fixture
def timed(monkeypatch):
    """Has the calls that were timed; ``timed.ms`` is the time of the kernels, torch's is 1 ms."""

    class Timed(list):
        ms = 0.5

    def stopwatch(call, run, backend):
        timed.append(call.facts.steps)
        return {"triton": timed.ms, "aten": 1.0}[backend]

    timed = Timed()
    monkeypatch.setattr(dispatch, "_is_gpu", lambda device: True)
    monkeypatch.setattr(dispatch, "MEASURED", {})
    monkeypatch.setattr(measured, "_milliseconds", stopwatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch._decided.cache_clear()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield timed
    dispatch._decided.cache_clear()


@pytest.mark.parametrize("form", ["dense", "packed", "no gradients"])
@pytest.mark.parametrize(("ms", "backend"), [(0.5, "triton"), (2.0, "aten")])
def test_the_faster_backend_runs(timed, ms, backend, form):
    module, timed.ms = fusedrnn.LSTM(I, H, **MODULE), ms
    x = packed() if form == "packed" else batch()
    x = x.float() if form == "packed" else x.float().requires_grad_()
    with torch.set_grad_enabled(form != "no gradients"):
        torch.manual_seed(1)
        got = module(x)[0]
        assert len(timed) == 2 * measured._ROUNDS
        explanation = fusedrnn.explain(module, x)
        assert explanation.backend == backend
        assert f"the kernels {ms:g} ms, torch's operator 1 ms" in str(explanation)
        module(x)
        torch.manual_seed(1)
        with fusedrnn.use_backend(backend):
            want = module(x)[0]
    assert len(timed) == 2 * measured._ROUNDS
    torch.testing.assert_close(got.data, want.data, rtol=0, atol=0)


def test_once_for_each_of_three_classes_of_steps(timed, monkeypatch):
    monkeypatch.setattr(measured, "_results", lambda *_: [torch.zeros(1)])
    monkeypatch.setattr(measured, "_FORCED", "1")
    torch.backends.cudnn.benchmark = False
    module, timed.ms = fusedrnn.GRU(I, H), 2.0
    for steps in (30, 32, 5, 33, 256, 257, 300):
        module(torch.randn(steps, B, I))
    assert sorted(set(timed)) == [30, 33, 257]


def test_wrong_results_are_not_timed(timed, monkeypatch):
    module, stack = fusedrnn.GRU(I, H), functional.rnn_stack
    wrong = lambda *args: (stack(*args)[0] + 1e-4, *stack(*args)[1:])  # noqa: E731
    monkeypatch.setattr(functional, "rnn_stack", wrong)
    with pytest.warns(RuntimeWarning, match="wrong here"):
        module(batch().float())
    assert not timed
    assert fusedrnn.explain(module, batch().float()).backend == "aten"


def test_kernels_that_fail_are_reported_by_the_call_itself(timed, monkeypatch):
    def launch(*_):
        raise KernelFailed("no")

    monkeypatch.setattr(layer, "_launch", launch)
    monkeypatch.setattr(dispatch, "_planned_refusal", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="failed"):
        fusedrnn.GRU(I, H + 3)(batch().float())
    assert not timed


ELSEWHERE = ("forbidden", "capture", "compiler", "transform", "mode", "named", "step", "lengths")


@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere_nothing_is_measured(timed, where, monkeypatch):
    x, module, options, context = batch().float(), fusedrnn.GRU(I, H), {}, nullcontext()
    if where == "forbidden":
        monkeypatch.setattr(measured, "_FORCED", "0")
    elif where == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif where == "compiler":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif where == "transform":
        x, module = x.unsqueeze(0), torch.func.vmap(module)
    elif where == "lengths":
        options = {"lengths": LENGTHS}
    else:
        contexts = {"named": fusedrnn.use_backend("aten"), "mode": FlopCounterMode(display=False)}
        context = contexts.get(where, context)
    with context:
        module(x[:1] if where == "step" else x, **options)
    assert not timed
    assert list(dispatch.MEASURED.values()) == [None] * (where == "lengths")
