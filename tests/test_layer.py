"""The layers of one launch: what a schedule is given, and the products around it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusedrnn import layer
from fusedrnn.kernels.plan import Plan
from fusedrnn.kernels.rows import Rows
from fusedrnn.kernels.tensors import Grads, Layers
from fusedrnn.layer import Launch, StackConfig, gemm_precision, launches_of

T, B, I, H = 4, 3, 20, 4
CONFIG = StackConfig("lstm", "triton", True, 3, False, "tf32")


def plan(layers=1):
    return Plan("recorded", None, None, layers)


class Recorder:
    """A schedule that keeps what it is given and fills what it must write."""

    def forward(self, cell, plan, layers, rows):
        self.given = cell, layers, rows

    def backward(self, cell, plan, layers, grads, rows):
        self.given, self.grads = (cell, layers, rows), grads
        grads.gates.copy_(torch.arange(grads.gates.numel()).view_as(grads.gates))


def layers_of(D=1):
    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    w_ih, w_hh, b_ih, b_hh = (
        tuple(randn(4 * H, *more) for _ in range(D)) for more in ((I,), (H,), (), ())
    )
    return Layers(
        w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh,
        h_0=randn(D, B, H), c_0=randn(D, B, H), out=(randn(T * B, D * H),) * D,
        gates=randn(D, T * B, 4 * H), cs=randn(D, T * B, H),
    )  # fmt: skip


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(layer, "_schedule", lambda name: {"recorded": found}[name])
    return found


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_schedule_is_given_the_input_products(recorder, batch_first, has_bias):
    layers = layers_of(2)
    layers = layers if has_bias else layers._replace(b_ih=None, b_hh=None)
    x = torch.randn(T, B, I).double()
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if batch_first else x
    config = CONFIG._replace(bidirectional=True)
    layer.forward(config, plan(), x, layers, Rows(T, B))
    cell, given, rows = recorder.given
    assert (cell, rows) == ("lstm", Rows(T, B))
    for d in range(2):
        want = F.linear(x.reshape(-1, I), layers.w_ih[d], layers.b_ih[d] if has_bias else None)
        torch.testing.assert_close(given.gx[d], want, rtol=1e-13, atol=1e-13)
    assert given.out[0] is layers.out[0]


def test_gradients_of_all_layers_of_a_wavefront(recorder):
    """dx is that of the first layer; the weights' stand layer by layer."""
    one, two = layers_of(), layers_of()
    upper = torch.randn(4 * H, H).double()
    both = Layers(
        w_ih=(one.w_ih[0], upper), w_hh=one.w_hh + two.w_hh, b_ih=one.b_ih + two.b_ih,
        b_hh=one.b_hh + two.b_hh, h_0=torch.cat([one.h_0, two.h_0]), out=one.out + two.out,
        c_0=torch.cat([one.c_0, two.c_0]), cs=torch.cat([one.cs, two.cs]),
        gates=torch.cat([one.gates, two.gates]),
    )  # fmt: skip
    x, masked = torch.randn(T * B, I).double(), torch.randn(T * B, H).double()
    grads = Grads(h_0=torch.empty_like(both.h_0), c_0=torch.empty_like(both.c_0))
    given = (CONFIG, plan(2), [x, masked], both, grads, Rows(T, B))
    dx, found = layer.backward(*given, True, True)
    dgates = recorder.grads.gates
    assert dgates.shape == (2, T * B, 4 * H)
    torch.testing.assert_close(dx, dgates[0] @ one.w_ih[0])
    assert [g.shape for g in found] == [w.shape for w in (
        one.w_ih[0], one.w_hh[0], one.b_ih[0], one.b_hh[0],
        upper, two.w_hh[0], two.b_ih[0], two.b_hh[0],
    )]  # fmt: skip
    torch.testing.assert_close(found[0], dgates[0].t() @ x)
    torch.testing.assert_close(found[4], dgates[1].t() @ masked)
    h = torch.cat([two.h_0[0], two.out[0][:-B]])
    torch.testing.assert_close(found[5], dgates[1].t() @ h)
    torch.testing.assert_close(found[7], dgates[1].sum(0))


def test_launches_follow_the_plan(monkeypatch):
    asked = []

    def plan_stack(problem, chip):
        asked.append(problem)
        return [plan(2), plan(1)]

    monkeypatch.setattr(layer.planning, "plan_stack", plan_stack)
    h_0 = torch.zeros(3, B, H)
    assert launches_of(CONFIG, h_0, True, Rows(T, B)) == [
        Launch(range(2), plan(2)),
        Launch(range(2, 3), plan(1)),
    ]
    launches_of(CONFIG._replace(recompute=True), h_0, False, Rows(T, B, torch.zeros(1, T, B)))
    first, second = asked
    assert (first.layers, first.batch, first.hidden_size) == (3, B, H)
    assert (first.needs_grad, first.ragged, first.layer_by_layer) == (True, False, False)
    assert (second.needs_grad, second.ragged, second.layer_by_layer) == (False, True, True)
    loop = CONFIG._replace(backend="torch")
    assert launches_of(loop, h_0, True, Rows(T, B)) == [
        Launch(range(n, n + 1), None) for n in range(3)
    ]


def fail_within(context, seen):
    with context:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        raise KeyError


def test_precision_of_gemms_is_set_and_put_back(monkeypatch):
    """torch has one switch for the process; fp32 on CUDA alone needs it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x = torch.zeros(1)
    with gemm_precision("tf32", x):
        assert matmul.fp32_precision == before
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for precision, want in (("tf32", "tf32"), ("tf32x3", "ieee"), ("ieee", "ieee")):
        seen = []
        with pytest.raises(KeyError):
            fail_within(gemm_precision(precision, x), seen)
        assert (seen, matmul.fp32_precision) == ([want], before)
    with gemm_precision("tf32", x.half()):
        assert matmul.fp32_precision == before
