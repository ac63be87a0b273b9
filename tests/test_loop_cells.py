"""The steps of each cell: beside the reference and its gradients, and how many calls they take."""

import pytest
import torch
from test_equivalence import build, states_for
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn import loop_cells, reference, stack
from fusedrnn.kernels.spec import SPECS
from fusedrnn.kernels.tensors import Weights
from fusedrnn.layout import rows_of
from fusedrnn.loop import folded_bias, workspace_tiles
from fusedrnn.records import Sequences, StackConfig, StackGrads, StackInputs


@pytest.mark.parametrize("most", [0, 64], ids=["large", "small"])
@pytest.mark.parametrize("cell", SPECS)
def test_a_step_and_its_gradients(cell, most, monkeypatch):
    """A large GRU takes two products a step; from many steps on weights are copied."""
    monkeypatch.setattr(loop_cells, "_ONE_PRODUCT", most)
    monkeypatch.setattr(loop_cells, "_MANY_STEPS", most)
    n, H, spec, forward, backward = 3, 5, SPECS[cell], *loop_cells.CELLS[cell]
    columns = spec.gates * H, H, H
    gx, h_0, c_0 = (torch.randn(n, k, dtype=torch.float64, requires_grad=True) for k in columns)
    w_hh, b_hh = torch.randn(columns[0], H).double(), torch.randn(columns[0]).double()
    h, c, _ = reference.CELLS[cell](gx, h_0, c_0, Weights(gx, w_hh, None, b_hh))
    results, sources = ((h,), (gx, h_0)) if c is None else ((h, c), (gx, h_0, c_0))
    gates, dgates = (
        torch.full((n, k * H), torch.nan).double() for k in (workspace_tiles(cell), spec.grad_tiles)
    )
    gates[:, : columns[0]] = gx.detach() + folded_bias(cell, torch.zeros_like(b_hh), b_hh)
    new, scratch = [torch.empty_like(s.detach()) for s in results], [torch.empty(n, H).double()]
    entered, shared = [s.detach() for s in sources[1:]], (scratch, lambda rows: [rows])
    states = [[s] for s in new]
    forward(loop_cells.Direction(gates, w_hh, b_hh, *shared, states[0], states[-1]))(0, *entered)
    torch.testing.assert_close(new, [s.detach() for s in results])
    d_new = [torch.randn(n, H).double() for _ in new]
    want = torch.autograd.grad(results, sources, [d.clone() for d in d_new])
    saved = dgates, new[-1], lambda: entered[-1]
    carried = [d_new[0]], [d_new[-1]]
    backward(loop_cells.Direction(gates, w_hh, None, *shared, *carried, *saved))(0)
    torch.testing.assert_close([dgates[:, : columns[0]], *d_new], list(want))


class Counter(TorchDispatchMode):
    """Counts the operators that are no views."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(value.alias_info is not None for value in func._schema.returns)
        self.calls += func._schema.is_mutable or not views
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("cell", "most"), [("lstm", 14), ("gru", 10), ("gru_reset_before", 13), ("rnn_tanh", 5)]
)
def test_calls_of_a_step(cell, most, packed):
    """Of small batches the time is that of the calls: forward and backward, with d_out.

    Tables of packed rows are made of all steps at once.
    """
    counts, config = [], StackConfig(cell, "torch", True, 1, False, "ieee")
    module = build(cell).requires_grad_(False)
    for steps in (20, 30):
        sequences = Sequences(batch_sizes=torch.full((steps,), 3) if packed else None)
        x = torch.randn(*((3 * steps,) if packed else (steps, 3)), 3).double()
        h_0, c_0 = (*states_for(module, 3), None)[:2]
        inputs = StackInputs(x, h_0, c_0, list(module.parameters()), [])
        with Counter() as counter:
            rows = rows_of(x, 3, 1, sequences)
            outputs = stack.forward(inputs, rows, config, True)
            grads = StackGrads(outputs.output, None, None, None)
            stack.backward(inputs, outputs, grads, rows, config, True, True)
        counts.append(counter.calls)
    assert (counts[1] - counts[0]) / 10 <= most
