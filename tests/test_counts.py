"""Cost in counts, not seconds: the loop's operator calls and allocations, and the host's calls.

The loop's time on small batches is its calls times 1 to 2 us (``loop.py``), so one call more in a
step is a slower loop, on every machine; likewise Python's part of a launch.
"""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn.kernels import cells, resident
from fusedrnn.kernels.launch import launch_options, made_once
from fusedrnn.kernels.plan import Plan, Tiles
from fusedrnn.kernels.rows import Rows, packed_rows
from fusedrnn.kernels.spec import SPECS
from fusedrnn.launches import Config
from fusedrnn.layout import Ragged, links_of
from fusedrnn.stack import stack_backward, stack_forward
from fusedrnn.steps import Steps


class Counter(TorchDispatchMode):
    """Counts operators below autograd, and those that allocate: that neither write nor view."""

    def __init__(self):
        super().__init__()
        self.calls = self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        writes = func._schema.is_mutable
        views = any(value.alias_info is not None for value in func._schema.returns)
        self.calls += not (views and not writes)
        self.allocations += not writes and not views
        return result


def counts(kind, steps, training, onednn):
    """Calls and allocations of a forward and a backward, or of a forward without gradients."""
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[kind]
    config = Config(cell, "torch", True, 1, False, "ieee", onednn=onednn)
    params = list(getattr(torch.nn, kind)(4, 5).parameters())
    x, h_0 = torch.randn(steps, 3, 4), torch.zeros(1, 3, 5)
    c_0 = torch.zeros(1, 3, 5) if kind == "LSTM" else None
    with torch.no_grad(), Counter() as counter:
        call = x, h_0, c_0, params, (), Ragged(), config
        output, *_, saved = stack_forward(*call, training)
        if training:
            of_states = torch.zeros_like(h_0), c_0, None
            given = x, torch.ones_like(output), *of_states, *call[1:5]
            stack_backward(*given, saved, Ragged(), config, True, 1)
    return counter.calls, counter.allocations


def per_step(kind, training, onednn=False):
    counts(kind, 1, training, onednn)  # what is kept from call to call
    few, many = (counts(kind, steps, training, onednn) for steps in (8, 16))
    return tuple((b - a) / 8 for a, b in zip(few, many, strict=True))


#: Calls of a step: forward without gradients, and forward with backward. oneDNN needs none.
MOST = {
    "LSTM": (8, 15),
    "LSTM by oneDNN": (0, 0),
    "GRU": (5, 10),
    "RNN": (2, 5),
}


@pytest.mark.parametrize("kind", MOST)
def test_calls_and_allocations_of_a_step(kind):
    module, _, by = kind.partition(" by ")
    forward, both = (per_step(module, training, bool(by)) for training in (False, True))
    assert forward[0] <= MOST[kind][0]
    assert both[0] <= MOST[kind][1]
    assert forward[1] == both[1] == 0, "a step allocates"


class Every(TorchDispatchMode):
    """Counts all operators, views too."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_packed_rows_cost_no_call_a_step():
    """What is made of lengths before the first step and behind the last one."""
    counts = []
    for steps in (8, 64):
        sizes = torch.cat((torch.full((steps // 2,), 3), torch.full((steps // 2,), 2)))
        rows = packed_rows(sizes, 2, torch.device("cpu"))
        h, h_0 = torch.ones(rows.total, 5), torch.zeros(3, 5)
        with Every() as every:
            for d in range(2):
                links_of(rows, d, h.device).entering(h, h_0)
                Steps(rows, d)
        counts.append(every.calls)
    assert counts[0] == counts[1]


class Launch:
    """Stands for a kernel: its launch does nothing but end the counting of Python's calls."""

    calls = at_launch = 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        self.at_launch = self.calls

    def count(self, frame, event, arg):
        self.calls += event in ("call", "c_call")

    def counted(self, function, *args):
        self.calls = 0
        before = sys.getprofile()
        sys.setprofile(self.count)
        try:
            return function(*args)
        finally:
            sys.setprofile(before)


#: Calls of Python and of C functions up to the launch: forward, backward. 12 to 25 are the tests'
#: own, which fill what is empty; the host's time on small RNNs is about 0.5 us for each of the
#: others (``python -m bench.host``).
MOST_TO_LAUNCH = {"LSTM": (160, 168), "GRU": (145, 157), "RNN": (145, 157)}


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer's own calls would be counted")
@pytest.mark.parametrize("kind", MOST_TO_LAUNCH)
def test_calls_of_the_host_up_to_the_launch(kind, monkeypatch):
    launch = Launch()
    for name in ("_resident_fwd_kernel", "_resident_bwd_kernel"):
        monkeypatch.setattr(resident, name, launch)
    module, x = getattr(fusedrnn, kind)(8, 16), torch.randn(4, 2, 8)
    weights = list(module.parameters())
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        # The first call is checked, planned and remembered.
        torch.autograd.grad(module(x)[0].sum(), weights)
        output, _ = launch.counted(module, x)
        forward = launch.at_launch
        launch.counted(torch.autograd.grad, output.sum(), weights)
    assert 0 < forward <= MOST_TO_LAUNCH[kind][0]
    assert 0 < launch.at_launch <= MOST_TO_LAUNCH[kind][1]


def test_what_a_kernel_is_compiled_for_is_made_once(monkeypatch):
    """For a plan, sizes and switches; and again for a cell that is registered anew."""
    made = []

    def constants(cell, plan, H, rows):
        made.append((cell, H, rows.switches))
        return {"FORWARD": cells.CELLS[cell].forward, "H": H, **rows.switches}

    arguments = made_once(constants, lambda plan: launch_options(plan.forward))
    tiles = Tiles(16, ((0, 16),), 4, None, "ieee", 0)
    plans = [Plan("resident", tiles, tiles, ()) for _ in range(2)]
    origins = torch.zeros(1, 4, 2, dtype=torch.int8)
    calls = [
        ("lstm", plans[0], 16, Rows(4, 2)),
        ("gru", plans[0], 16, Rows(4, 2)),
        ("lstm", plans[0], 15, Rows(4, 2)),
        ("lstm", plans[0], 16, Rows(4, 2, origins)),
        ("lstm", plans[0], 16, Rows(4, 2, origins, torch.tensor([2, 2, 2, 1]))),
        ("lstm", replace(plans[1], forward=replace(tiles, num_warps=8)), 16, Rows(4, 2)),
    ]
    for call in calls * 2:
        want = constants(*call) | launch_options(call[1].forward)
        made.pop()
        assert arguments(*call) == want
    assert len(made) == len(calls)
    assert arguments("lstm", plans[0], 16, Rows(7, 3)) == arguments(*calls[0])
    assert len(made) == len(calls), "neither T nor B is a constant"

    other = cells.CELLS["lstm"]._replace(forward=cells.CELLS["gru"].forward)
    monkeypatch.setitem(cells.CELLS, "lstm", other)
    assert arguments(*calls[0])["FORWARD"] is other.forward
    monkeypatch.setitem(SPECS, "lstm", replace(SPECS["lstm"], gates=3))
    arguments(*calls[0])
    assert len(made) == len(calls) + 2


@pytest.mark.parametrize("kind", MOST_TO_LAUNCH)
def test_calls_of_the_host_around_torchs_operator(kind):
    """Where auto chooses torch's operator, ours calls no more in Python than torch.nn itself."""
    launch, calls = Launch(), []
    theirs = getattr(torch.nn, kind)(3, 4)
    ours = getattr(fusedrnn, kind)(3, 4)
    x = torch.randn(4, 2, 3)
    for module in (theirs, ours):
        module(x)
        launch.counted(module, x)
        calls.append(launch.calls)
    assert fusedrnn.explain(ours, x).backend == "aten"
    assert calls[1] <= calls[0], calls


class Largest(TorchDispatchMode):
    """The most numbers that an operator made anew."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func._schema.is_mutable:
            views = any(value.alias_info is not None for value in func._schema.returns)
            self.most = max(self.most, 0 if views else result.numel())
        return result


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("kind", "cell"), [("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "rnn_tanh")])
def test_a_wide_batch_first_input_is_not_copied(kind, cell, D):
    """Its products are made in the order in which it lies, and are the narrower ones to turn."""
    steps, batch, wide, H = 30, 4, 200, 5
    theirs = getattr(torch.nn, kind)(wide, H, batch_first=True, bidirectional=D == 2)
    params, config = list(theirs.parameters()), Config(cell, "torch", True, 1, D == 2, "ieee")
    x, h_0 = torch.randn(batch, steps, wide), torch.zeros(D, batch, H)
    c_0 = torch.zeros(D, batch, H) if kind == "LSTM" else None
    output = theirs(x)[0]
    d_output = torch.randn_like(output)
    want = torch.autograd.grad(output, params, d_output)
    call = x.transpose(0, 1), h_0, c_0, params, (), Ragged(), config
    with torch.no_grad(), Largest() as largest:
        got, *_, saved = stack_forward(*call, True)
        ends = torch.zeros_like(h_0), c_0, None
        given = call[0], d_output.transpose(0, 1), *ends, *call[1:5]
        grads = stack_backward(*given, saved, Ragged(), config, False, 1)[-1]
    assert 0 < largest.most < x.numel() // 2
    torch.testing.assert_close(got.transpose(0, 1), output)
    for left, right in zip(grads, want, strict=True):
        torch.testing.assert_close(left, right)
