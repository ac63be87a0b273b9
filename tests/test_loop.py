"""The loop of one layer on poisoned buffers; its numbers are checked in `test_equivalence.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn import loop
from fusedrnn.kernels.rows import Rows, origins_of, packed_rows
from fusedrnn.kernels.spec import SPECS
from fusedrnn.kernels.tensors import Grads, Layers, Weights

T, B, I, H, CPU = 6, 5, 3, 4, torch.device("cpu")
LENGTHS = torch.tensor([6, 5, 4, 1, 1])
NAN = float("nan")
every_cell = pytest.mark.parametrize("cell", SPECS)


def case_of(cell, D, layout, *, T=T, B=B, bias=True):
    """Returns random tensors of a layer in a layout."""
    G, states = SPECS[cell].gates, SPECS[cell].states

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    rows = Rows(T, B)
    if layout == "packed":
        rows = packed_rows((LENGTHS[:B] > torch.arange(T).unsqueeze(1)).sum(1), D, CPU)
    elif layout == "both":
        rows = Rows(T, B, origins_of(T, B, D, CPU, LENGTHS[:B], torch.rand(T, B) < 0.3))
    weights = [
        Weights(randn(G * H, I), randn(G * H, H), *(randn(G * H) if bias else None for _ in "bb"))
        for _ in range(D)
    ]
    grads = Grads(out=randn(rows.total, D * H), h_n=randn(D, B, H))
    if states == 2:
        grads = grads._replace(c_n=randn(D, B, H), cs=randn(D, rows.total, H))
    return SimpleNamespace(
        cell=cell, D=D, rows=rows, x=randn(rows.total, I), weights=weights,
        h_0=randn(D, B, H), c_0=randn(D, B, H) if states == 2 else None, grads=grads,
    )  # fmt: skip


def run(case) -> dict[str, torch.Tensor]:
    """Runs the loop forward and backward on poisoned buffers; returns what it wrote, by name."""
    spec, D, R, h_0 = SPECS[case.cell], case.D, case.rows.total, case.h_0

    def poisoned(*shape):
        return torch.full(shape, NAN, dtype=h_0.dtype)

    room = poisoned(D, R, loop.workspace_tiles(case.cell) * H)
    for d, w in enumerate(case.weights):
        bias = None if w.b_ih is None else loop.folded_bias(case.cell, w.b_ih, w.b_hh)
        room[d, :, : spec.gates * H] = F.linear(case.x, w.w_ih, bias)
    w_ih, w_hh, b_ih, b_hh, _ = zip(*case.weights, strict=True)
    with_c = case.c_0 is not None
    layers = Layers(
        gx=room, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=None if b_hh[0] is None else b_hh,
        h_0=h_0, c_0=case.c_0, h_n=poisoned(*h_0.shape),
        c_n=poisoned(*h_0.shape) if with_c else None, out=(poisoned(R, D * H),) * D,
        gates=room[..., : spec.saved * H], cs=poisoned(D, R, H) if with_c else None,
    )  # fmt: skip
    loop.forward(case.cell, layers, case.rows)
    kept = case.grads.h_n.clone()
    grads = case.grads._replace(
        gates=poisoned(D, R, spec.grad_tiles * H),
        h_0=poisoned(*h_0.shape),
        c_0=poisoned(*h_0.shape) if with_c else None,
    )
    loop.backward(case.cell, layers, grads, case.rows)
    assert torch.equal(kept, case.grads.h_n)  # the gradients that arrive are left alone
    found = {"out": layers.out[0], "h_n": layers.h_n, "d_h_0": grads.h_0}
    found |= {"d_gates": grads.gates}
    return found | ({"c_n": layers.c_n, "cs": layers.cs, "d_c_0": grads.c_0} if with_c else {})


@pytest.mark.parametrize("layout", ["dense", "both", "packed"])
@every_cell
def test_everything_is_written_and_absent_gradients_are_zeros(cell, layout):
    case = case_of(cell, 2, layout, bias=layout != "packed")
    zeros = torch.zeros_like(case.grads.out)
    case.grads = case.grads._replace(cs=None, out=zeros)
    want = run(case)
    case.grads = case.grads._replace(out=None)
    got = run(case)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not any(t.isnan().any() for t in got.values())


@pytest.mark.parametrize("bad", [float("inf"), NAN])
@every_cell
def test_a_reset_stops_inf_and_nan(cell, bad):
    """A broken h_0 spoils no step after a reset, a broken gradient none before it."""
    case = case_of(cell, 1, "dense")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    case.rows = Rows(T, B, origins_of(T, B, 1, CPU, None, reset))
    good = run(case)
    case.h_0[:] = bad
    got = run(case)
    assert torch.equal(got["out"][2 * B :], good["out"][2 * B :])
    case.h_0[:] = 0
    good = run(case)
    case.grads.out[2 * B :] = bad
    got = run(case)
    assert torch.equal(got["d_gates"][:, : 2 * B], good["d_gates"][:, : 2 * B])
    assert torch.equal(got["d_h_0"], good["d_h_0"])


@every_cell
def test_no_sequences(cell):
    assert run(case_of(cell, 2, "dense", B=0))["out"].shape == (0, 2 * H)


class Counter(TorchDispatchMode):
    """Counts the operators that are no views."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(value.alias_info is not None for value in func._schema.returns)
        self.calls += func._schema.is_mutable or not views
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cell", "most"), [("lstm", 14), ("gru", 10), ("gru_reset_before", 14), ("rnn_tanh", 5)]
)
def test_calls_of_a_step(cell, most):
    """Of small batches the time is that of the calls: forward and backward, with d_out."""
    counts = []
    for steps in (20, 30):
        case = case_of(cell, 1, "dense", T=steps, B=3)
        case.grads = case.grads._replace(cs=None)
        with Counter() as counter:
            run(case)
        counts.append(counter.calls)
    assert (counts[1] - counts[0]) / 10 <= most


def test_packed_rows_cost_no_call_a_step():
    """Tables are made of all steps at once, before the first."""
    counts = []
    for steps in (20, 30):
        with Counter() as counter:
            rows = packed_rows(torch.full((steps,), 3), 1, CPU)
            steps_of = loop._Steps(rows, 0)
            left = steps_of.all_entering(torch.ones(3, H), torch.ones(rows.total, H))
            steps_of.final(torch.ones(3, H), left)
        counts.append(counter.calls)
    assert counts[0] == counts[1]


FORK = """
import multiprocessing
import torch
import fusedrnn

def train():
    with fusedrnn.use_backend("torch"):
        fusedrnn.GRU(16, 16)(torch.randn(60, 16, 16))[0].sum().backward()

torch.set_num_threads(2)
train()
child = multiprocessing.get_context("fork").Process(target=train)
child.start()
child.join()
assert torch.get_num_threads() == 2
"""


def test_a_forked_process_trains():
    """OpenMP's threads do not survive a fork; a second one of them would wait for ever."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    subprocess.run(command, env=environment, check=True, timeout=60)
