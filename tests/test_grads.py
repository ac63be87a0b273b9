"""The products over all rows: their exactness in fp32, and their equality with autograd."""

import copy

import pytest
import torch
from oracle import torch_module
from test_equivalence import build, everything, runner, states_for

import fusedrnn
from fusedrnn import grads
from fusedrnn.testing import assert_budget


@pytest.mark.parametrize("rows", [1, 7, 400, 801, 3333])
@pytest.mark.parametrize(("M", "N"), [(12, 1), (12, 5), (5, 12), (33, 40), (1, 1)])
def test_outer_is_the_product(rows, M, N):
    strided, right = torch.randn(rows, 3 * M).double()[:, M : 2 * M], torch.randn(rows, N).double()
    for left in (strided, strided.contiguous()):
        found = grads.outer(left, right)
        assert found.is_contiguous()
        torch.testing.assert_close(found, left.t() @ right, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("T", "B", "I", "H"), [(200, 16, 8, 8), (30, 32, 4, 32)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_sums_over_many_rows_are_as_exact_as_torchs(cell, T, B, I, H):
    """One product over all 3200 rows, or one with the large terms of h_0, leaves the budget."""
    ours, theirs = build(cell, dtype=torch.float32, I=I, H=H), torch_module(cell, I, H)
    theirs.load_state_dict(ours.state_dict())
    x, hx, run = torch.randn(T, B, I), states_for(ours, B), runner("torch", "dense")
    truth = everything(run, copy.deepcopy(theirs).double(), x, hx, torch.float64)
    ref, got = (everything(run, module, x, hx, torch.float32) for module in (theirs, ours))
    for name, want in truth.items():
        assert_budget(name, got[name], ref[name], want)


def test_the_two_biases_do_not_share_a_gradient():
    """An optimizer may change .grad in place."""
    for kind in ("LSTM", "GRU", "RNN"):
        module = getattr(fusedrnn, kind)(3, 4)
        with fusedrnn.use_backend("torch"):
            module(torch.randn(12, 2, 3))[0].sum().backward()
        before = module.bias_hh_l0.grad.clone()
        module.bias_ih_l0.grad.zero_()
        assert torch.equal(module.bias_hh_l0.grad, before)
