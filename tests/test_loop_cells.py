"""The steps of each cell: those that ``test_equivalence.py`` is too small for, and their calls."""

import pytest
import torch
from test_equivalence import build, check, states_for
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn import loop_cells, stack
from fusedrnn.kernels.spec import SPECS
from fusedrnn.layout import rows_of
from fusedrnn.records import Sequences, StackConfig, StackGrads, StackInputs


@pytest.mark.parametrize("cell", SPECS)
def test_steps_as_large_cells_and_long_sequences_have_them(cell, monkeypatch):
    """A large GRU takes two products a step; from many steps on weights are copied."""
    monkeypatch.setattr(loop_cells, "_ONE_PRODUCT", 0)
    monkeypatch.setattr(loop_cells, "_MANY_STEPS", 0)
    check(build(cell, 2, 2), "both", "torch")


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
    """In small batches the calls take most of the time: forward and backward, with d_out.

    Tables of packed rows are made of all steps at once.
    """
    counts, config = [], StackConfig(cell, "torch", True, 1, False, "ieee")
    module = build(cell).requires_grad_(False)
    for steps in (20, 30):
        sequences = Sequences(batch_sizes=torch.full((steps,), 3) if packed else None)
        x = torch.randn(*((3 * steps,) if packed else (steps, 3)), 3).double()
        h_0, c_0 = (*states_for(module, 3), None)[:2]
        inputs = StackInputs(x, h_0, c_0, list(module.parameters()), [])
        inputs = stack.ready(inputs, config)
        with Counter() as counter:
            rows = rows_of(x, 3, 1, sequences)
            outputs = stack.forward(inputs, rows, config, True)
            grads = StackGrads(outputs.output, None, None, None)
            stack.backward(inputs, outputs, grads, rows, config, True, True)
        counts.append(counter.calls)
    assert (counts[1] - counts[0]) / 10 <= most
