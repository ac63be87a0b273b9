"""The loop of one layer: NaN and inf behind a reset, and forks.

Its numbers are checked in `test_equivalence.py`, its steps in `test_loop_cells.py`.
"""

import pytest
import torch
from processes import python
from test_equivalence import MODULES, build, states_for

import fusedrnn
from fusedrnn.arguments import as_hx


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
