"""Schedule stepwise against plain torch and autograd, in the interpreter or on a GPU."""

import math
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from schedules import FORMS, expected, make, results, rows_of

from fusedrnn.kernels import stepwise
from fusedrnn.kernels.plan import CHIPS, Problem
from fusedrnn.kernels.plan import stepwise as plan_of
from fusedrnn.kernels.rows import Rows
from fusedrnn.kernels.spec import SPECS
from fusedrnn.kernels.tiles import tanh
from fusedrnn.testing import assert_budget, error_budget

HALF = (torch.float16, torch.bfloat16)


def run(cell, layers, grads, rows):
    """Forward and backward; every tensor filled, by name."""
    D, B, H = layers.h_0.shape
    problem = Problem(cell, H, B, D, layers.h_0.dtype, "ieee", True)
    plan = plan_of(problem, CHIPS["sm_90"])
    stepwise.forward(cell, plan, layers, rows)
    stepwise.backward(cell, plan, layers, grads, rows)
    return results(layers, grads)


def check(cell, form, dtype, device, *, T=3, B=5, D=2, H=5, bias=True):
    rows = rows_of(form, T, B, D, device)
    layers, grads = make(cell, H, D, rows, dtype, device=device, bias=bias)
    got = run(cell, layers, grads, rows)
    truth = expected(cell, layers, grads, rows, torch.float64)
    ref = expected(cell, layers, grads, rows, dtype)
    assert got.keys() == truth.keys()
    for name in truth:
        if dtype == torch.float64:  # the truth has errors as well, which the budget does not count
            budget = error_budget(name, got[name], ref[name], truth[name])
            assert budget.rms < 2e-15, budget
        else:
            assert_budget(name, got[name], ref[name], truth[name])


@pytest.mark.parametrize(
    ("cell", "form"),
    [*((cell, "dense") for cell in SPECS), *product(("lstm", "gru_reset_before"), FORMS[1:])],
)
def test_equals_autograd(cell, form, device):
    check(cell, form, torch.float64, device)


@pytest.mark.parametrize(
    ("cell", "form", "dtype", "bias"),
    [
        ("lstm", "dense", torch.float32, True),
        ("gru_reset_before", "packed", torch.float32, False),
        ("gru", "ragged", torch.float16, True),
    ],
)
def test_several_tiles_of_rows_and_units(cell, form, dtype, bias, device):
    check(cell, form, dtype, device, T=2, B=9, D=1, H=70, bias=bias)


def test_one_step_of_one_unit(device):
    check("lstm", "dense", torch.float32, device, T=1, B=1, D=1, H=1)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_two_runs_agree_and_leave_their_inputs_alone(cell, device):
    rows = rows_of("ragged", 4, 5, 2, device)
    layers, grads = make(cell, 5, 2, rows, torch.float32, device=device)
    inputs = [layers.gx, *layers.w_hh, *layers.b_hh, layers.h_0, grads.out, grads.h_n]
    copies = [tensor.clone() for tensor in inputs]
    first = {name: tensor.clone() for name, tensor in run(cell, layers, grads, rows).items()}
    second = run(cell, layers, grads, rows)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(map(torch.equal, inputs, copies))


def test_no_output_gradient_is_a_gradient_of_zero(device):
    rows = Rows(3, 5)
    layers, grads = make("lstm", 5, 2, rows, torch.float32, device=device)
    run("lstm", layers, grads._replace(out=None, cs=None), rows)
    none = grads.gates.clone(), grads.h_0.clone()
    zero = grads._replace(out=torch.zeros_like(grads.out), cs=torch.zeros_like(grads.cs))
    run("lstm", layers, zero, rows)
    assert torch.equal(none[0], grads.gates)
    assert torch.equal(none[1], grads.h_0)


def test_nothing_saved(device):
    rows = Rows(3, 5)
    layers, _ = make("lstm", 5, 2, rows, torch.float16, device=device)
    plan = plan_of(Problem("lstm", 5, 5, 2, torch.float16, "ieee", False), CHIPS["sm_90"])
    stepwise.forward("lstm", plan, layers, rows)
    whole = layers.out[0].clone(), layers.h_n.clone(), layers.c_n.clone()
    stepwise.forward("lstm", plan, layers._replace(gates=None, cs=None), rows)
    assert all(map(torch.equal, whole, (layers.out[0], layers.h_n, layers.c_n)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_small_steps_are_not_rounded_away(cell, dtype, device):
    """Sixteen additions to 1, each of a quarter of a unit in the last place of 16 bits.

    To h or c in the first sequence, and to its gradient in the second, where the state stays.
    """
    T, tiny, one = 16, torch.finfo(dtype).eps / 4, 20.0  # the sigmoid and tanh of 20 are 1
    if cell == "lstm":  # c' = c + g
        start, gx = (1.0, 0.0), ((one, one, tiny, one), (one, one, 0.0, one))
    else:  # h' = h + (1 - z) (n - h), from -1 to n = 1
        start, gx = (-1.0, 0.0), ((0.0, math.log(2 / tiny), one), (0.0, one, one))
    rows = Rows(T, 2)
    layers, grads = make(cell, 1, 1, rows, dtype, device=device, bias=False)
    layers.gx.copy_(torch.tensor(gx).repeat(T, 1).unsqueeze(0))
    layers.w_hh[0].zero_()
    state, d_state, end, d_end = (
        (layers.c_0, grads.c_n, layers.c_n, grads.c_0)
        if cell == "lstm"
        else (layers.h_0, grads.h_n, layers.h_n, grads.h_0)
    )
    state[0, :, 0] = torch.tensor(start, dtype=dtype)
    d_state.fill_(1.0)
    if cell == "lstm":
        grads.h_n.zero_()
        grads.out.zero_()
        grads.cs.fill_(tiny)
    else:
        grads.out.fill_(tiny)
    run(cell, layers, grads, rows)
    truth = expected(cell, layers, grads, rows, torch.float64)
    names = ("c_n", "d_c_0") if cell == "lstm" else ("h_n", "d_h_0")
    for name, got, sequence, before in (
        (names[0], end, 0, start[0]),
        (names[1], d_end, 1, 1.0),
    ):
        want = truth[name][0, sequence].item()
        error = abs(got[0, sequence].item() - want)
        assert error < abs(want - before) / 4, name


@triton.jit
def tanh_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, tanh(x), mask=offs < n)


def test_tanh_in_fp64(device):
    """All digits near zero, where a quotient of exponentials has none, and far from it."""
    x = torch.cat((torch.logspace(-300, 2.5, 1000), torch.linspace(0.5, 0.7, 300))).double()
    x = torch.cat((x, -x, torch.zeros(1, dtype=x.dtype))).to(device)
    y = torch.empty_like(x)
    tanh_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), 1024)
    assert ((y - x.tanh()).abs() <= 6e-16 * x.tanh().abs()).all()
