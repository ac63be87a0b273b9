"""The error budget must reject what loose tolerances accept: planted bugs, one by one."""

import copy

import pytest
import torch
from models import double, make_inputs, torch_module

from fusedrnn import reference
from fusedrnn.kernels.tensors import Weights
from fusedrnn.testing import Case, assert_budget, error_budget, run_module

CASE = Case(24, 3, 4, 32)


class Reference(torch.nn.Module):
    """The reference on the weights of a one-layer LSTM, whose step a bug may replace."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def named_parameters(self, *args, **kwargs):
        return self.module.named_parameters(*args, **kwargs)

    def forward(self, input, hx):
        weights = [[Weights(*self.module.parameters())]]
        output, h_n, c_n, _ = reference.differentiable_stack("lstm", input, *hx, weights, [])
        return output, (h_n, c_n)


def verdicts(cell, mutate, monkeypatch):
    """The budgets of every tensor when ``mutate(module, monkeypatch)`` has planted its bug."""
    module = torch_module(cell, CASE.I, CASE.H)
    x, hx, cotangents = make_inputs(cell, CASE)
    ref = run_module(module, x, hx, cotangents)
    truth = run_module(copy.deepcopy(module).double(), double(x), double(hx), double(cotangents))
    mutant = copy.deepcopy(module)
    x, hx, cotangents = mutate(mutant, monkeypatch, x, hx, cotangents)
    got = run_module(Reference(mutant), x, hx, cotangents)
    return [error_budget(name, got[name], ref[name], truth[name]) for name in truth]


def nothing(module, monkeypatch, *inputs):
    return inputs


def lost_b_hh(module, monkeypatch, *inputs):
    with torch.no_grad():
        module.bias_hh_l0.zero_()
    return inputs


def swapped_gates(module, monkeypatch, *inputs):
    with torch.no_grad():
        for parameter in module.parameters():
            first, second, *rest = parameter.chunk(4)
            parameter.copy_(torch.cat((second, first, *rest)))
    return inputs


def lost_dc_n(module, monkeypatch, x, hx, cotangents):
    return x, hx, [*cotangents[:2], torch.zeros_like(cotangents[2])]


def wrap_step(monkeypatch, change):
    step = reference._lstm_step
    monkeypatch.setitem(reference._CELLS, "lstm", lambda gx, h, c, w: change(step, gx, h, c, w))


def h_carried_in_bf16(module, monkeypatch, *inputs):
    wrap_step(monkeypatch, lambda step, gx, h, c, w: step(gx, h.bfloat16().float(), c, w))
    return inputs


def last_step_skipped(module, monkeypatch, *inputs):
    calls = iter(range(10**6))

    def change(step, gx, h, c, w):
        result = step(gx, h, c, w)
        return (h, c, result[2]) if next(calls) == CASE.T - 1 else result

    wrap_step(monkeypatch, change)
    return inputs


BUGS = [lost_b_hh, swapped_gates, lost_dc_n, h_carried_in_bf16, last_step_skipped]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bug_is_rejected(bug, monkeypatch):
    assert not all(budget.ok for budget in verdicts("lstm", bug, monkeypatch))


def test_no_bug_is_accepted(monkeypatch):
    for budget in verdicts("lstm", nothing, monkeypatch):
        assert budget.ok, budget


def test_one_wrong_element_or_nan_is_rejected():
    truth = torch.randn(40, 40, dtype=torch.float64)
    ref = truth.float()
    assert_budget("same", ref.clone(), ref, truth)
    for wrong in (1e-4, float("nan")):
        got = ref.clone()
        got[3, 7] += wrong
        with pytest.raises(AssertionError, match=r"one: OVER budget.*\(3, 7\)"):
            assert_budget("one", got, ref, truth)


def test_small_errors_everywhere_are_rejected():
    """Each within the maximum's budget, all together over the relative RMS of 5e-6."""
    truth = torch.ones(100, dtype=torch.float64)
    ref = truth.float()
    ref[0] += 1e-3  # torch is far off in one place, so the maximum's budget is wide
    budget = error_budget("drift", truth.float() + 2e-5, ref, truth)
    assert budget.max_err <= budget.allowed
    assert not budget.ok


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="must be equal"):
        error_budget("x", torch.ones(2), torch.ones(3), torch.ones(3))


def test_a_gradient_that_is_zero_throughout_is_compared_exactly():
    zero = torch.zeros(4)
    assert error_budget("zero", zero, zero, zero.double()).ok
    assert not error_budget("zero", zero + 1e-30, zero, zero.double()).ok
