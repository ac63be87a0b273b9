"""The reference against torch.nn in fp64; `test_ops.py` has its second derivatives."""

import pytest
import torch
from models import CELLS, make_inputs, torch_module

from fusedrnn.records import StackConfig
from fusedrnn.reference import differentiable_stack
from fusedrnn.testing import run_module


class Reference(torch.nn.Module):
    """The reference on the weights of a torch module."""

    def __init__(self, module, cell):
        super().__init__()
        self.__dict__["module"] = module
        self.config = StackConfig(
            cell, "torch", module.bias, module.num_layers, module.bidirectional, "ieee"
        )

    def named_parameters(self, *args, **kwargs):
        return self.module.named_parameters(*args, **kwargs)

    def forward(self, input, hx):
        h_0, c_0 = (hx, None) if isinstance(hx, torch.Tensor) else hx
        weights = self.config.group(list(self.module.parameters()))
        output, h_n, c_n, _ = differentiable_stack(self.config.cell, input, h_0, c_0, weights, ())
        return output, h_n if c_n is None else (h_n, c_n)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("T", "B", "layers", "directions"), [(1, 1, 1, 1), (5, 3, 3, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_torch_in_fp64(cell, T, B, layers, directions, bias):
    options = {"num_layers": layers, "bidirectional": directions == 2, "bias": bias}
    module = torch_module(cell, 4, 6, **options).double()
    given = make_inputs(cell, T, B, 4, 6, layers, directions, torch.float64)
    found = (run_module(m, *given) for m in (Reference(module, cell), module))
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-12)
