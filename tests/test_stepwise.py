"""Schedule stepwise against plain torch and autograd, in the interpreter or on a GPU."""

import math

import pytest
import torch
from kernel_cases import Shape, differences, expected, rows_of, tensors

from fusedrnn.kernels import stepwise
from fusedrnn.kernels.plan import CHIPS, Problem
from fusedrnn.kernels.plan import stepwise as plan_of
from fusedrnn.kernels.rows import Rows
from fusedrnn.kernels.spec import SPECS

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64


def run(cell, data, rows):
    """Forward and backward, which fill the tensors."""
    layers, grads = data
    D, B, H = layers.h_0.shape
    plan = plan_of(Problem(cell, H, B, D, layers.h_0.dtype, "ieee", True), CHIPS["sm_90"])
    stepwise.forward(cell, plan, layers, rows)
    stepwise.backward(cell, plan, layers, grads, rows)


TINY, LARGE = Shape(3, 5, 5, D=2), Shape(2, 9, 70)  # large: several tiles of rows and of units
CASES = [
    *((cell, TINY, FP32) for cell in SPECS),
    *((cell, TINY._replace(rows="ragged"), FP32) for cell in ("lstm", "gru_reset_before")),
    *((cell, TINY._replace(rows="packed"), FP32) for cell in ("lstm", "gru_reset_before")),
    ("lstm", LARGE, FP32),
    ("gru_reset_before", LARGE._replace(rows="packed", bias=False), FP64),
    ("gru", LARGE._replace(rows="ragged"), FP16),
    ("lstm", Shape(1, 1, 1), FP32),
]


@pytest.mark.parametrize(("cell", "shape", "dtype"), CASES)
def test_equals_autograd(cell, shape, dtype, device):
    data = tensors(cell, shape, dtype, device)
    run(cell, data, rows_of(shape, device))
    assert not differences(cell, shape, data)


def test_no_output_gradient_is_a_gradient_of_zero(device):
    layers, grads = tensors("lstm", Shape(3, 5, 5), FP32, device)
    run("lstm", (layers, grads._replace(out=None, cs=None)), Rows(3, 5))
    none = grads.gates.clone(), grads.h_0.clone()
    zero = {"out": torch.zeros_like(grads.out), "cs": torch.zeros_like(layers.cs)}
    run("lstm", (layers, grads._replace(**zero)), Rows(3, 5))
    assert all(map(torch.equal, none, (grads.gates, grads.h_0)))


def test_nothing_saved(device):
    layers, _ = tensors("lstm", Shape(3, 5, 5), FP16, device)
    plan = plan_of(Problem("lstm", 5, 5, 1, FP16, "ieee", False), CHIPS["sm_90"])
    stepwise.forward("lstm", plan, layers, Rows(3, 5))
    whole = layers.out[0].clone(), layers.h_n.clone(), layers.c_n.clone()
    stepwise.forward("lstm", plan, layers._replace(gates=None, cs=None), Rows(3, 5))
    assert all(map(torch.equal, whole, (layers.out[0], layers.h_n, layers.c_n)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_small_steps_are_not_rounded_away(cell, dtype, device):
    """Sixteen additions to 1, each of a quarter of a unit in the last place of 16 bits.

    To c or h in the first sequence, and to its gradient in the second, where the state stays.
    """
    T, tiny, one = 16, torch.finfo(dtype).eps / 4, 20.0  # the sigmoid and tanh of 20 are 1
    shape = Shape(T, 2, 1, bias=False)
    layers, grads = tensors(cell, shape, dtype, device)
    grads = grads._replace(cs=torch.zeros_like(layers.cs) if cell == "lstm" else None)
    grads.out.zero_()
    grads.h_n.zero_()
    layers.w_hh[0].zero_()
    if cell == "lstm":  # c' = c + g
        start, gx = (1.0, 0.0), ((one, one, tiny, one), (one, one, 0.0, one))
        state, end, d_end, d_start = layers.c_0, layers.c_n, grads.c_n, grads.c_0
        names, d_each = ("c_n", "d_c_0"), grads.cs
    else:  # h' = h + (1 - z) (n - h), from -1 to n = 1
        start, gx = (-1.0, 0.0), ((0.0, math.log(2 / tiny), one), (0.0, one, one))
        state, end, d_end, d_start = layers.h_0, layers.h_n, grads.h_n, grads.h_0
        names, d_each = ("h_n", "d_h_0"), grads.out
    layers.gx.copy_(torch.tensor(gx).repeat(T, 1).unsqueeze(0))
    state[0, :, 0] = torch.tensor(start, dtype=dtype)
    d_end.fill_(1.0)
    d_each.fill_(tiny)
    run(cell, (layers, grads), Rows(T, 2))
    truth = expected(cell, shape, (layers, grads), FP64)
    for name, got, sequence, before in ((names[0], end, 0, start[0]), (names[1], d_start, 1, 1.0)):
        want = truth[name][0, sequence].item()
        error = abs(got[0, sequence].item() - want)
        assert error < abs(want - before) / 4, name
