"""A new cell takes 45 lines and no change of any schedule: the complete example.

The update gate RNN of Collins et al. 2017 (arXiv 1611.09913):

    g = sigmoid(W_ig x + b_ig + W_hg h + b_hg),  c = tanh(W_ic x + b_ic + W_hc h + b_hc),
    h' = g h + (1 - g) c.
"""

import pytest
import torch.nn.functional as F
import triton
import triton.language as tl
from kernel_cases import Shape, cooperative_plan, differences, resident_plan, rows_of, tensors

from fusedrnn import reference
from fusedrnn.kernels import cooperative, resident, stepwise
from fusedrnn.kernels.cells import CELLS, SIGMOID, TANH, cell_of
from fusedrnn.kernels.plan import Plan, Tiles
from fusedrnn.kernels.spec import SPECS, CellSpec
from fusedrnn.kernels.tiles import squash

# The counts of its tiles, in spec.py: two gates, one state, both gates saved after their
# activations, one product for both, and gradients that are the same for x and for h.

UGRNN = CellSpec(
    gates=2,
    states=1,
    saved=2,
    phases=((0, 1),),
    grads=((0, 1),),
    recurrent=(0, 1),
    specials=(4, 0),
)

# The reference, in reference.py.


def ugrnn_step(gx, h, c, w):
    """g = sigmoid(.), c = tanh(.); h' = g h + (1 - g) c."""
    g, new = (gx + F.linear(h, w.w_hh, w.b_hh)).chunk(2, -1)
    g, new = g.sigmoid(), new.tanh()
    return g * h + (1 - g) * new, None, (g, new)


# The kernel's step and its adjoint, in cells.py.


@triton.jit
def ugrnn_forward(gx, gh, state, SQUASH: tl.constexpr = squash):
    g, c = SQUASH(gh, (SIGMOID, TANH))
    return (c + g * (state[0] - c),), (g, c)


@triton.jit
def ugrnn_adjoint(
    PHASE: tl.constexpr, d_state, du, saved, before, after, carry, SQUASH: tl.constexpr = squash
):
    g, c = saved
    dh = d_state[0]
    dg = dh * (before[0] - c) * g * (1.0 - g)
    dc = dh * (1.0 - g) * (1.0 - c * c)
    return (dg, dc), (dh * g,), ()


# The end of the example.


@pytest.fixture
def ugrnn(monkeypatch):
    monkeypatch.setitem(SPECS, "ugrnn", UGRNN)
    monkeypatch.setitem(CELLS, "ugrnn", cell_of(UGRNN, ugrnn_forward, ugrnn_adjoint))
    monkeypatch.setitem(reference.CELLS, "ugrnn", ugrnn_step)
    return "ugrnn"


PLANS = {
    resident: lambda shape: resident_plan(shape.H),
    cooperative: cooperative_plan,  # one program, which has no partner to wait for
    stepwise: lambda shape: Plan("stepwise", *[Tiles(16, 32, 4, None, "ieee", 0)] * 2),
}


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("rows", ["dense", "ragged", "packed"])
@pytest.mark.parametrize("schedule", PLANS)
def test_a_new_cell_runs_in_every_schedule(ugrnn, schedule, rows, device):
    shape = Shape(4, 5, 12, rows=rows)
    plan, data = PLANS[schedule](shape), tensors(ugrnn, shape, device=device)
    schedule.forward(ugrnn, plan, data.layers, rows_of(shape, device))
    schedule.backward(ugrnn, plan, *data, rows_of(shape, device))
    assert not differences(ugrnn, shape, data)
