"""The stack on real tensors: what is saved, what may be changed, and what a refusal leads to."""

import sys
from types import SimpleNamespace

import pytest
import torch
from pairs import B, H, I, T
from torch.utils._pytree import tree_map

from fusedrnn import layer, stack
from fusedrnn.kernels.rows import Rows
from fusedrnn.layer import Kind
from fusedrnn.records import StackConfig, StackGrads, StackInputs

L = 2
#: Calls of functions, Python's and C's, before a forward and a backward launch.
MOST = 72, 78


def config_of(cell, **options):
    return StackConfig(cell, "torch", True, L, False, "ieee")._replace(**options)


def inputs_of(config, dtype=torch.float64, rows=(T, B)):
    """Returns random inputs of ``L`` layers, rows ``[T, B]`` or packed ones."""
    G, states, D = config.spec.gates, config.spec.states, config.directions

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype)

    params = []
    for n in range(L):
        for _ in range(D):
            width = I if n == 0 else D * H
            params += [randn(G * H, width), randn(G * H, H), randn(G * H), randn(G * H)]
    h_0, c_0 = randn(L * D, B, H), randn(L * D, B, H) if states == 2 else None
    return StackInputs(randn(*rows, I), h_0, c_0, params, [torch.rand(*rows, D * H, dtype=dtype)])


@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_is_needed_is_computed(recompute):
    config = config_of("gru", recompute=recompute)
    inputs = stack.ready(inputs_of(config), config)
    outputs = stack.forward(inputs, Rows(T, B), config, True)

    def backward(*needs):
        grads = StackGrads(torch.ones_like(outputs.output), None, None, None)
        return stack.backward(inputs, outputs, grads, Rows(T, B), config, *needs)

    d_input, d_h_0, d_c_0, d_params = backward(True, True)
    assert d_c_0 is None
    none, alone, _, nothing = backward(False, False)
    assert (none, nothing) == (None, [])
    assert torch.equal(alone, d_h_0)
    assert torch.equal(backward(True, False)[0], d_input)
    assert all(map(torch.equal, backward(False, True)[3], d_params))


def test_tensors_of_any_strides():
    config = config_of("lstm", bidirectional=True)
    inputs, results = inputs_of(config), []

    def strided(tensor):
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan")).to(tensor)
        view = wide.transpose(0, -1)[::2].transpose(0, -1) if tensor.dim() > 1 else wide[::2]
        return view.copy_(tensor)

    for given in (inputs, tree_map(strided, inputs)):
        given = stack.ready(given, config)
        outputs = stack.forward(given, Rows(T, B), config, True)
        d_output = torch.ones(2 * H, B, T, dtype=torch.float64).permute(2, 1, 0)
        grads = StackGrads(d_output, None, None, None)
        found = stack.backward(given, outputs, grads, Rows(T, B), config, True, True)
        results.append([outputs.output, *found[:2], *found[3]])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("broken", "recompute"), [("forward", False), ("backward", True)])
def test_the_loop_answers_where_kernels_fail(broken, recompute, monkeypatch):
    """It goes on from what the kernels have saved; only ``auto`` does so, and remembers it."""
    resident = layer._schedule("resident")

    def fail(*_):
        raise OSError("no compiler\nat all")

    config = config_of("lstm", backend="auto", recompute=recompute)
    inputs = stack.ready(inputs_of(config, torch.float32), config)
    grads = StackGrads(torch.ones(T, B, H), None, None, None)
    run = (grads, Rows(T, B), config, True, True)
    want_outputs = stack.forward(inputs, Rows(T, B), config, True)
    want = stack.backward(inputs, want_outputs, *run)
    monkeypatch.setattr(resident, broken, fail)
    cause = r"kernels failed on cpu .OSError: no compiler"

    def both():
        outputs = stack.forward(inputs, Rows(T, B), config, True)
        return outputs, stack.backward(inputs, outputs, *run)

    with pytest.warns(RuntimeWarning, match=cause) as warned:
        outputs, got = both()
    assert len(warned) == 1
    torch.testing.assert_close([*outputs, *got], [*want_outputs, *want])
    stack.forward(inputs, Rows(T, B), config, True)  # without a warning


def test_python_calls_before_a_launch(monkeypatch):
    """The host's part of a launch: calls of functions from stack to schedule, one layer."""
    calls, counts = [], []

    def launch(*_):
        counts.append(calls.count("call") + calls.count("c_call"))

    def counted(run, *given, **options):
        calls.clear()
        sys.setprofile(lambda frame, event, arg: calls.append(event))
        result = run(*given, **options)
        sys.setprofile(None)
        return result

    schedule = SimpleNamespace(forward=launch, backward=launch)
    monkeypatch.setattr(layer, "_schedule", lambda name: schedule)
    config = config_of("lstm", backend="triton", num_layers=1)
    inputs = inputs_of(config, torch.float32)._replace(dropout_masks=[])
    inputs = inputs._replace(h_0=inputs.h_0[:1], c_0=inputs.c_0[:1], params=inputs.params[:4])
    kind, run = Kind(), (Rows(T, B), config, True)

    def forward():
        given = stack.ready(inputs, config)
        return given, stack.forward(given, *run, kind=kind)

    forward()  # it plans
    inputs, outputs = counted(forward)
    grads = StackGrads(outputs.output, None, None, None)
    counted(stack.backward, inputs, outputs, grads, *run, True, kind=kind)
    assert counts[1] <= MOST[0]
    assert counts[2] <= MOST[1]


def test_the_loop_takes_weights_at_any_address():
    """A kernel would be compiled again for them."""
    config = config_of("lstm")
    inputs = inputs_of(config)
    odd = [torch.cat([p.flatten()[:1], p.flatten()])[1:].view_as(p) for p in inputs.params]
    for backend, is_same in (("torch", True), ("triton", False)):
        found = stack.ready(inputs._replace(params=odd), config._replace(backend=backend))
        assert (found.params[1][1].data_ptr() == odd[5].data_ptr()) == is_same
