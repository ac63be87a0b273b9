"""Tests of the error budget: it rejects planted bugs that loose tolerances accept."""

import copy

import pytest
import torch
from test_reference import Reference
from torch.utils._pytree import tree_map

from fusedrnn import reference
from fusedrnn.testing import assert_budget, error_budget, run_module

T, B, I, H = 24, 3, 4, 32


def lost_dc_n(cotangents, step):
    cotangents[2] = torch.zeros_like(cotangents[2])
    return step


def h_carried_in_bf16(cotangents, step):
    return lambda gx, h, c, w: step(gx, h.bfloat16().float(), c, w)


def last_step_skipped(cotangents, step):
    calls = iter(range(10**6))

    def change(gx, h, c, w):
        result = step(gx, h, c, w)
        return (h, c, result[2]) if next(calls) == T - 1 else result

    return change


def no_bug(cotangents, step):
    return step


@pytest.mark.parametrize("bug", [no_bug, lost_dc_n, h_carried_in_bf16, last_step_skipped])
def test_planted_bugs_are_rejected(bug, monkeypatch):
    module, x, hx = torch.nn.LSTM(I, H), torch.randn(T, B, I), tuple(torch.randn(2, 1, B, H))
    cotangents = [torch.randn(T, B, H), *torch.randn(2, 1, B, H)]
    ref = run_module(module, x, hx, cotangents)
    double = tree_map(torch.Tensor.double, (x, hx, cotangents))
    truth = run_module(copy.deepcopy(module).double(), *double)
    monkeypatch.setitem(reference.CELLS, "lstm", bug(cotangents, reference.CELLS["lstm"]))
    got = run_module(Reference(module, "lstm"), x, hx, cotangents)
    budgets = [error_budget(name, got[name], ref[name], truth[name]) for name in truth]
    assert all(budget.ok for budget in budgets) == (bug is no_bug), budgets


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
    """Each error is within the maximum's budget, but the relative RMS is over 5e-6."""
    truth = torch.ones(100, dtype=torch.float64)
    ref = truth.float()
    ref[0] += 1e-3  # torch's own error makes the maximum's budget wide
    budget = error_budget("drift", truth.float() + 2e-5, ref, truth)
    assert budget.max_err <= budget.allowed
    assert not budget.ok


def test_shapes_and_zeros():
    zero = torch.zeros(4)
    assert error_budget("zero", zero, zero, zero.double()).ok
    assert not error_budget("zero", zero + 1e-30, zero, zero.double()).ok
    with pytest.raises(ValueError, match="must be equal"):
        error_budget("x", torch.ones(2), torch.ones(3), torch.ones(3))
