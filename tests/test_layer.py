"""The launches of a stack, and the precision of the products around them."""

import pytest
import torch

from fusedrnn import layer
from fusedrnn.kernels.plan import Plan
from fusedrnn.kernels.rows import Rows
from fusedrnn.layer import Launch, gemm_precision, launches_of
from fusedrnn.records import StackConfig

T, B, H = 4, 3, 4
CONFIG = StackConfig("lstm", "triton", True, 3, False, "tf32")


def test_launches_follow_the_plan(monkeypatch):
    asked, plans = [], [Plan("recorded", None, None, layers) for layers in (2, 1)]
    monkeypatch.setattr(layer.planning, "plan_stack", lambda *of: asked.append(of[0]) or plans)
    h_0 = torch.zeros(3, B, H)
    monkeypatch.setattr(layer, "_launches", layer._launches.__wrapped__)
    launches = Launch(range(2), plans[0]), Launch(range(2, 3), plans[1])
    assert launches_of(CONFIG, h_0, True, Rows(T, B)) == launches
    launches_of(CONFIG._replace(recompute=True), h_0, False, Rows(T, B, torch.zeros(1, T, B)))
    first, second = asked
    assert (first.layers, first.batch, first.hidden_size) == (3, B, H)
    assert (first.needs_grad, first.ragged, first.layer_by_layer) == (True, False, False)
    assert (second.needs_grad, second.ragged, second.layer_by_layer) == (False, True, True)
    loop = CONFIG._replace(backend="torch")
    assert [each.plan for each in launches_of(loop, h_0, True, Rows(T, B))] == [None] * 3


def test_precision_of_gemms_is_set_and_put_back(monkeypatch):
    """torch has one switch for the process, which fp32 on CUDA alone needs.

    The last thread puts back what the first has found; where it is right nothing is set.
    """
    real, sets, x = torch.backends.cuda.matmul, [], torch.zeros(1)

    class Matmul:
        fp32_precision = property(
            lambda self: real.fp32_precision,
            lambda self, value: (sets.append(value), setattr(real, "fp32_precision", value)),
        )

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    before = real.fp32_precision
    for precision, given, is_cuda, want in (
        ("tf32", x, False, []),
        ("tf32", x, True, ["tf32", before]),
        ("tf32x3", x, True, ["ieee", before]),
        ("ieee", x, True, ["ieee", before]),
        ("tf32", x.half(), True, []),
    ):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        first, second = gemm_precision(precision, given), gemm_precision(precision, given)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert sets == want[:1]
        second.__exit__(None, None, None)
        assert sets == want
        sets.clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with gemm_precision("tf32", x):
        with pytest.raises(KeyError), gemm_precision("tf32", x):  # it is right already
            raise KeyError
        assert sets == ["tf32"]
    assert real.fp32_precision == before
