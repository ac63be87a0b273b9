"""The reference against torch.nn in fp64; `test_ops.py` has its second derivatives."""

import pytest
import torch
from models import CELLS, make_inputs, torch_module

from fusedrnn.records import Sequences, StackConfig
from fusedrnn.reference import differentiable_stack
from fusedrnn.testing import run_module


def reference_of(module, cell):
    """Returns ``call(params, x, hx)`` of the reference in the place of a module."""
    config = StackConfig(
        cell, "torch", module.bias, module.num_layers, module.bidirectional, "ieee"
    )

    def call(p, x, hx=None, lengths=None, reset=None):
        rows, H = config.num_layers * config.directions, module.hidden_size
        sizes = (module.proj_size or H, H)[: config.spec.states]
        zeros = [x.new_zeros(rows, x.shape[1], size) for size in sizes]
        states = zeros if hx is None else [hx] if isinstance(hx, torch.Tensor) else hx
        given = *(*states, None)[:2], config.group(list(p.values())), (), Sequences(lengths, reset)
        output, h_n, c_n, _ = differentiable_stack(cell, x, *given)
        return output, h_n if c_n is None else (h_n, c_n)

    return call


class Reference(torch.nn.Module):
    """The reference on the weights of a torch module."""

    def __init__(self, module, cell):
        super().__init__()
        self.named_parameters, self.call = module.named_parameters, reference_of(module, cell)

    def forward(self, input, hx):
        return self.call(dict(self.named_parameters()), input, hx)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("T", "B", "layers", "directions"), [(1, 1, 1, 1), (5, 3, 3, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_torch_in_fp64(cell, T, B, layers, directions, bias):
    options = {"num_layers": layers, "bidirectional": directions == 2, "bias": bias}
    module = torch_module(cell, 4, 6, **options).double()
    given = make_inputs(cell, T, B, 4, 6, layers, directions, torch.float64)
    found = (run_module(m, *given) for m in (Reference(module, cell), module))
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-12)
