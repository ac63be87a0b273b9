"""The loop of one layer: NaN and inf behind a reset, calls of a step, forks.

Its numbers are checked in `test_equivalence.py`.
"""

import pytest
import torch
from processes import python
from test_equivalence import MODULES, build, states_for
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import stack
from fusedrnn.arguments import as_hx
from fusedrnn.layout import rows_of
from fusedrnn.records import Sequences
from fusedrnn.stack import StackConfig, StackGrads, StackInputs


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("cell", MODULES)
def test_a_reset_stops_inf_and_nan(cell, bad):
    """A broken h_0 spoils no step after a reset, a broken gradient none before it."""
    module, reset = build(cell), torch.zeros(6, 5, dtype=torch.bool)
    reset[2] = True
    x, hx = torch.randn(6, 5, 3).double().requires_grad_(), states_for(module, 5)
    sources, arriving = (x, *(state.requires_grad_() for state in hx)), torch.ones(6, 5, 5).double()
    broken = torch.where(reset.cumsum(0).bool().unsqueeze(2), bad, arriving)
    with fusedrnn.use_backend("torch"):
        output, _ = module(x, as_hx(hx), reset=reset)
        other, _ = module(x, as_hx([torch.full_like(state, bad) for state in hx]), reset=reset)
    assert torch.equal(other[2:], output[2:])
    want = torch.autograd.grad(output, sources, arriving, retain_graph=True)
    got = torch.autograd.grad(output, sources, broken)
    assert torch.equal(got[0][:2], want[0][:2])
    assert all(map(torch.equal, got[1:], want[1:]))


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


FORK = """
import multiprocessing
import torch
import fusedrnn

def train():
    with fusedrnn.use_backend("torch"):
        fusedrnn.GRU(16, 16)(torch.randn(60, 16, 16))[0].sum().backward()

torch.set_num_threads(2)
train()
child = multiprocessing.get_context("fork").Process(target=train, daemon=True)
child.start()
child.join(30)
assert child.exitcode == 0
assert torch.get_num_threads() == 2
"""


def test_a_forked_process_trains():
    """OpenMP's threads do not survive a fork; a second one of them would wait for ever."""
    done = python("-W", "ignore", "-c", FORK, OMP_NUM_THREADS=None)
    assert done.returncode == 0, done.stderr
