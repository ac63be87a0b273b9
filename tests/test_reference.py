"""The reference against torch.nn in fp64; `test_ops.py` has its second derivatives."""

import pytest
import torch
from test_equivalence import LAYOUTS, MODULES, T, build, everything, oracle, states_for

from fusedrnn.records import Sequences, StackConfig
from fusedrnn.reference import differentiable_stack


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


@pytest.mark.parametrize("form", ["dense", "both"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("cell", MODULES)
def test_equals_torch_in_fp64(cell, bias, form):
    module, options = build(cell, 3, 2, bias=bias), LAYOUTS[form]

    def run(module, x, hx):
        return reference_of(module, cell)(dict(module.named_parameters()), x, hx, **options)

    given = module, torch.randn(T, 5, 3), states_for(module, 5), torch.float64
    found = (everything(each, *given) for each in (run, oracle(form)))
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-12)
