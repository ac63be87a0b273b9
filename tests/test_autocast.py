"""Autocast with every mixture of dtypes.

Under autocast the loop and the kernels compute as cuDNN does: input, hx and weights in autocast's
dtype, which the results have. On `auto` the CPU runs torch's own operator.
"""

import copy

import pytest
import torch
from pairs import B, H, I, T, assert_close, build, gradients, leaves, states_for

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.arguments import as_hx

FULL, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("name", "given", "backend", "half"),
    [
        ("LSTM", "mixed", "torch", BF16), ("LSTM", "mixed", "triton", HALF),
        ("GRU", "full", "torch", HALF), ("RNN", "half", "torch", BF16),
        ("LSTMCell", "full", "torch", BF16), ("LSTMCell", "full", "triton", HALF),
    ],
)  # fmt: skip
def test_any_mixture_of_dtypes_is_computed_in_autocasts(backend, half, name, given):
    """Bit for bit the module in that dtype; gradients have the dtypes of their tensors."""
    _, ours = build(name, FULL)
    low = copy.deepcopy(ours).to(half)
    kinds = {"full": (FULL, FULL), "half": (half, half), "mixed": (FULL, half)}[given]
    numbers = [torch.randn(B, I), *torch.randn(2, B, H)]
    if not name.endswith("Cell"):
        numbers = [torch.randn(T, B, I), *leaves(states_for(ours, B))]
    for of_x in (FULL, half):
        found = []
        for module in (low, ours):
            own = [t.to(k) for t, k in zip(numbers, (of_x, *kinds), strict=False)]
            own = [t.detach().to(half) if module is low else t.detach() for t in own]
            sources = [*(t.requires_grad_() for t in own), *module.parameters()]
            with fusedrnn.use_backend(backend), torch.autocast("cpu", half, module is ours):
                results = leaves(module(own[0], as_hx(own[1:])))
            found.append((results, gradients(results, sources)))
        (want, want_grads), (got, grads) = found
        assert_close(got, want, 0)
        assert [grad.dtype for grad in grads] == [source.dtype for source in sources]
        assert_close([grad.to(half) for grad in grads], want_grads, 0)


def test_an_lstm_runs_on_a_cpu_that_onednn_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "_onednn_takes", lambda dtype: False)
    monkeypatch.setattr(dispatch, "_decided", dispatch._decide)
    ours, x = fusedrnn.LSTM(I, H), torch.randn(T, B, I)
    with torch.autocast("cpu", BF16):
        assert ours(x)[0].dtype == BF16
        with (
            fusedrnn.use_backend("aten"),
            pytest.raises(NotImplementedError, match=r"needs a CPU with torch\.bfloat16"),
        ):
            ours(x)
    assert fusedrnn.explain(ours, x).backend == "aten"


def test_an_overflow_reaches_the_scaler():
    """As infinite gradients; in later steps, whose scale is smaller, there are none."""
    _, ours = build("GRU", FULL)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1)
    optimizer, before = torch.optim.SGD(ours.parameters(), lr=0.05), ours.weight_hh_l0.clone()
    for step in range(20):
        with fusedrnn.use_backend("torch"), torch.autocast("cpu", HALF):
            loss = ours(torch.ones(T, B, I))[0].float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert step or torch.equal(ours.weight_hh_l0, before)  # the first step is skipped
    assert scaler.get_scale() < 2.0**30
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    assert not torch.equal(ours.weight_hh_l0, before)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_switched_off_inside_and_float64(backend):
    _, ours = build("GRU", FULL)
    x, parameters = torch.randn(T, B, I), list(ours.parameters())
    with fusedrnn.use_backend(backend):
        want = ours(x)[0]
        with torch.autocast("cpu", HALF):
            with torch.autocast("cpu", enabled=False):
                got = ours(x)[0]
                inside = gradients([got], parameters)
            assert backend == "auto" or ours(x)[0].dtype == HALF
        assert_close([got, *inside], [want, *gradients([want], parameters)], 0)
        ours.double()
        want = ours(x.double())[0]
        with torch.autocast("cpu", BF16):
            assert_close([ours(x.double())[0]], [want], 0)
