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


def plan(layers=1):
    return Plan("recorded", None, None, layers)


def test_launches_follow_the_plan(monkeypatch):
    asked = []

    def plan_stack(problem, chip):
        asked.append(problem)
        return [plan(2), plan(1)]

    monkeypatch.setattr(layer.planning, "plan_stack", plan_stack)
    h_0 = torch.zeros(3, B, H)
    monkeypatch.setattr(layer, "_launches", layer._launches.__wrapped__)
    launches = Launch(range(2), plan(2)), Launch(range(2, 3), plan(1))
    assert launches_of(CONFIG, h_0, True, Rows(T, B)) == launches
    launches_of(CONFIG._replace(recompute=True), h_0, False, Rows(T, B, torch.zeros(1, T, B)))
    first, second = asked
    assert (first.layers, first.batch, first.hidden_size) == (3, B, H)
    assert (first.needs_grad, first.ragged, first.layer_by_layer) == (True, False, False)
    assert (second.needs_grad, second.ragged, second.layer_by_layer) == (False, True, True)
    loop = CONFIG._replace(backend="torch")
    assert [each.plan for each in launches_of(loop, h_0, True, Rows(T, B))] == [None] * 3


def test_precision_of_gemms_with_threads(monkeypatch):
    """The last thread puts back what the first has found; where it is right nothing is set."""

    class Matmul:
        def __init__(self, value):
            self.value, self.sets = value, []

        fp32_precision = property(
            lambda self: self.value,
            lambda self, value: (self.sets.append(value), setattr(self, "value", value)),
        )

    x = torch.zeros(1)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for found, sets in (("none", ["tf32", "none"]), ("tf32", [])):
        matmul = Matmul(found)
        monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
        first, second = gemm_precision("tf32", x), gemm_precision("tf32", x)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert matmul.value == "tf32"
        second.__exit__(None, None, None)
        assert (matmul.value, matmul.sets) == (found, sets)


def test_precision_of_gemms_is_set_and_put_back(monkeypatch):
    """torch has one switch for the process; fp32 on CUDA alone needs it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x = torch.zeros(1)
    with gemm_precision("tf32", x):
        assert matmul.fp32_precision == before
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for precision, want in (("tf32", "tf32"), ("tf32x3", "ieee"), ("ieee", "ieee")):
        with gemm_precision(precision, x):
            assert matmul.fp32_precision == want
        assert matmul.fp32_precision == before
    with pytest.raises(KeyError), gemm_precision("tf32", x):
        raise KeyError
    assert matmul.fp32_precision == before
    with gemm_precision("tf32", x.half()):
        assert matmul.fp32_precision == before
