"""Ring 0: the reference, which every kernel is held against, against torch in fp64."""

import pytest
import torch
from models import CELLS, Op, make_inputs, torch_module

from fusedrnn import transforms
from fusedrnn.launches import Config
from fusedrnn.layout import Ragged
from fusedrnn.testing import CASES, Case, run_module


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("cell", CELLS)
def test_reference_equals_torch_in_fp64(cell, case):
    module = torch_module(cell, case.I, case.H).double()
    x, hx, cotangents = make_inputs(cell, case, dtype=torch.float64)
    want = run_module(module, x, hx, cotangents)
    got = run_module(Op(module, cell, "torch"), x, hx, cotangents)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("layers", "directions"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_stacks_equal_torch_in_fp64(cell, layers, directions, bias):
    case = Case(5, 3, 4, 6)
    module = torch_module(
        cell, 4, 6, num_layers=layers, bidirectional=directions == 2, bias=bias
    ).double()
    x, hx, cotangents = make_inputs(
        cell, case, layers=layers, directions=directions, dtype=torch.float64
    )
    want = run_module(module, x, hx, cotangents)
    got = run_module(Op(module, cell, "torch"), x, hx, cotangents)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-12, rtol=1e-12, msg=name)


def stack_function(cell, has_bias, layers, directions, masks=()):
    states = 2 if cell == "lstm" else 1

    def function(x, *rest):
        config = Config(cell, "torch", has_bias, layers, directions == 2, "ieee")
        output, final, _ = transforms.rnn_stack(
            x, rest[:states], rest[states:], masks, Ragged(), config
        )
        return output, *final

    return function


@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_and_gradgradcheck(cell, layers, directions):
    case = Case(3, 2, 2, 3)
    module = torch_module(cell, 2, 3, num_layers=layers, bidirectional=directions == 2).double()
    x, hx, _ = make_inputs(cell, case, layers=layers, directions=directions, dtype=torch.float64)
    masks = [torch.rand(3, 2, directions * 3, dtype=torch.float64) for _ in range(layers - 1)]
    hx = hx if isinstance(hx, tuple) else (hx,)
    inputs = [t.requires_grad_() for t in (x, *hx)] + list(module.parameters())
    function = stack_function(cell, True, layers, directions, masks)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("which", ["output", "h_n", "c_n"])
def test_gradient_of_one_result_alone(which):
    """A loss on y, h_n or c_n only: the others' gradients arrive as None and count as zero."""
    module = torch_module("lstm", 3, 4, num_layers=2, bidirectional=True).double()
    x, hx, _ = make_inputs("lstm", Case(4, 2, 3, 4), layers=2, directions=2, dtype=torch.float64)
    x.requires_grad_()

    def gradients(m):
        output, (h_n, c_n) = m(x, hx)
        loss = {"output": output, "h_n": h_n, "c_n": c_n}[which].sin().sum()
        return torch.autograd.grad(loss, [x, *module.parameters()])

    for got, want in zip(gradients(Op(module, "lstm", "torch")), gradients(module), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_operator_is_registered_correctly():
    """Schema, fake kernels, autograd and dynamic shapes, by torch's own checker."""
    module = torch_module("gru", 3, 4, num_layers=2).double()
    x, hx, _ = make_inputs("gru", Case(4, 2, 3, 4), layers=2, dtype=torch.float64)
    args = (x.requires_grad_(), hx, None, list(module.parameters()), [])
    torch.library.opcheck(
        torch.ops.fusedrnn.rnn_forward.default,
        (*args, *Ragged(), *Config("gru", "torch", True, 2, False, "ieee"), True),
    )


def test_nothing_is_saved_without_gradients():
    module = torch_module("lstm", 3, 4)
    x, hx, _ = make_inputs("lstm", Case(4, 2, 3, 4))
    config = (*Ragged(), *Config("lstm", "torch", True, 1, False, "ieee"))
    for save, elements in ((True, 4 * 2 * 4 * (4 + 1)), (False, 0)):
        *_, gates, cs, hidden = torch.ops.fusedrnn.rnn_forward(
            x, *hx, list(module.parameters()), [], *config, save
        )
        assert gates.numel() + cs.numel() + hidden.numel() == elements


def test_partial_gradients():
    """Only x, or only the weights, require grad: only those get one."""
    module = torch_module("gru", 3, 4)
    x, hx, _ = make_inputs("gru", Case(4, 2, 3, 4))
    output, _ = Op(module, "gru", "torch")(x, hx)
    output.sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in module.parameters())
    module.requires_grad_(False)
    x.requires_grad_()
    Op(module, "gru", "torch")(x, hx)[0].sum().backward()
    want = torch.autograd.grad(module(x, hx)[0].sum(), x)[0]
    torch.testing.assert_close(x.grad, want)
