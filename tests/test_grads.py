"""The products over all rows: their exactness in fp32, and their equality with autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import grads
from fusedrnn.testing import assert_budget


@pytest.mark.parametrize("rows", [1, 7, 400, 801, 3333])
@pytest.mark.parametrize(("M", "N"), [(12, 1), (12, 5), (5, 12), (33, 40), (1, 1)])
def test_outer_is_the_product(rows, M, N):
    left, right = torch.randn(rows, M).double(), torch.randn(rows, N).double()
    found = grads.outer(left, right)
    assert found.is_contiguous()
    torch.testing.assert_close(found, left.t() @ right, rtol=1e-12, atol=1e-11)
    strided = torch.randn(rows, 3 * M).double()[:, M : 2 * M]
    torch.testing.assert_close(
        grads.outer(strided, right), strided.t() @ right, rtol=1e-12, atol=1e-11
    )


def test_a_long_sum_is_made_of_parts():
    """One product over all rows errs more, how much depends on the library and the processor."""
    left, right = torch.rand(100_000, 24) + 1, torch.rand(100_000, 9) + 1
    truth = left.double().t() @ right.double()
    ours, theirs = (
        (found - truth).abs().max() for found in (grads.outer(left, right), left.t() @ right)
    )
    assert ours < theirs / 1.5


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_sums_over_many_rows_are_as_exact_as_torchs(kind, layout):
    """One product over all 3200 rows leaves the error budget."""
    options = {} if layout == "packed" else {"num_layers": 2, "bidirectional": True}
    modules = [getattr(torch.nn, kind)(8, 8, **options).double() for _ in range(2)]
    modules += [getattr(fusedrnn, kind)(8, 8, **options)]
    for module in modules[:2]:
        module.load_state_dict(modules[2].state_dict())
    modules[1].float()
    x, lengths = torch.randn(200, 16, 8), torch.randint(100, 201, (16,))
    found = []
    for module in modules:
        given = x.to(module.weight_hh_l0.dtype)
        if layout == "packed":
            given = pack_padded_sequence(given, lengths, enforce_sorted=False)
        with fusedrnn.use_backend("torch"):
            output = module(given)[0]
        data = output if layout == "dense" else output.data
        weights = dict(module.named_parameters())
        cotangent = torch.sin(torch.arange(data.numel())).view_as(data).to(data.dtype)
        of_weights = torch.autograd.grad(data, list(weights.values()), cotangent)
        found.append(dict(zip(weights, of_weights, strict=True)))
    truth, theirs, ours = found
    for name, want in truth.items():
        assert_budget(name, ours[name], theirs[name], want)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_large_initial_states_do_not_round_the_other_terms(kind):
    """The terms of h_0 in dW_hh, which are large, are summed apart from those of the other h."""
    ours, theirs = getattr(fusedrnn, kind)(4, 32), getattr(torch.nn, kind)(4, 32)
    truth = getattr(torch.nn, kind)(4, 32).double()
    for module in (theirs, truth):
        module.load_state_dict(ours.state_dict())
    x, h_0, cotangent = torch.randn(30, 32, 4), torch.randn(1, 32, 32), torch.randn(30, 32, 32)
    found = []
    for module in (truth, theirs, ours):
        dtype = module.weight_hh_l0.dtype
        h = h_0.to(dtype)
        with fusedrnn.use_backend("torch"):
            output = module(x.to(dtype), (h, h) if kind == "LSTM" else h)[0]
        found += torch.autograd.grad(output, module.weight_hh_l0, cotangent.to(dtype))
    assert_budget("dW_hh", found[2], found[1], found[0])


def test_the_two_biases_do_not_share_a_gradient():
    """An optimizer may change .grad in place."""
    for kind in ("LSTM", "GRU", "RNN"):
        module = getattr(fusedrnn, kind)(3, 4)
        with fusedrnn.use_backend("torch"):
            module(torch.randn(12, 2, 3))[0].sum().backward()
        before = module.bias_hh_l0.grad.clone()
        module.bias_ih_l0.grad.zero_()
        assert torch.equal(module.bias_hh_l0.grad, before)
