"""The loop of one layer against the reference, in every layout of its rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import loop, loop_cells
from fusedrnn.kernels.rows import Rows, origins_of, packed_rows
from fusedrnn.kernels.spec import SPECS
from fusedrnn.kernels.tensors import Grads, Layers, Weights
from fusedrnn.layout import Sequences
from fusedrnn.reference import differentiable_stack
from fusedrnn.testing import assert_budget

T, B, I, H, CPU = 6, 5, 3, 4, torch.device("cpu")
LENGTHS = torch.tensor([6, 5, 4, 1, 1])
NAN = float("nan")
LAYOUTS = ("dense", "lengths", "reset", "both", "packed")


def case_of(cell, D, layout, *, T=T, B=B, bias=True, dtype=torch.float64, scale=1.0):
    """Returns random tensors of a layer in a layout."""
    G, states = SPECS[cell].gates, SPECS[cell].states

    def randn(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    lengths = LENGTHS[:B].clamp(max=T)
    reset = torch.rand(T, B) < 0.3 if layout in ("reset", "both") else None
    sizes = (lengths > torch.arange(T).unsqueeze(1)).sum(1)
    rows, sequences = Rows(T, B), Sequences()
    if layout == "packed":
        rows, sequences = packed_rows(sizes, D, CPU), Sequences(batch_sizes=sizes)
    elif layout != "dense":
        lengths = None if layout == "reset" else lengths
        rows = Rows(T, B, origins_of(T, B, D, CPU, lengths, reset))
        sequences = Sequences(lengths, reset)
    lead = (rows.total,) if layout == "packed" else (T, B)
    weights = [
        Weights(randn(G * H, I), randn(G * H, H), *(randn(G * H) if bias else None for _ in "bb"))
        for _ in range(D)
    ]
    grads = Grads(out=randn(rows.total, D * H), h_n=randn(D, B, H))
    if states == 2:
        grads = grads._replace(c_n=randn(D, B, H), cs=randn(D, rows.total, H))
    return SimpleNamespace(
        cell=cell, D=D, rows=rows, sequences=sequences, x=randn(*lead, I), weights=weights,
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
        room[d, :, : spec.gates * H] = F.linear(case.x.reshape(-1, I), w.w_ih, bias)
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


def oracle(case, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Returns the same of the reference, whose gradient of b_ih is the sum of dgates."""

    def leaf(tensor):
        return None if tensor is None else tensor.to(dtype).clone().requires_grad_()

    weights = [Weights(*map(leaf, w)) for w in case.weights]
    h_0, c_0 = leaf(case.h_0), leaf(case.c_0)
    out, h_n, c_n, cs = differentiable_stack(
        case.cell, case.x.to(dtype), h_0, c_0, [weights], (), case.sequences
    )
    found = {"out": out.reshape(case.rows.total, -1), "h_n": h_n}
    found |= {} if c_0 is None else {"c_n": c_n, "cs": cs}
    arriving = {"out": case.grads.out, "h_n": case.grads.h_n}
    arriving |= {"c_n": case.grads.c_n, "cs": case.grads.cs}
    total = sum((found[n] * g.to(dtype)).sum() for n, g in arriving.items() if g is not None)
    leaves = {"d_h_0": h_0, "d_c_0": c_0}
    leaves |= {f"d_b_ih {d}": w.b_ih for d, w in enumerate(weights)}
    leaves = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    found |= dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    return {name: tensor.detach() for name, tensor in found.items()}


def with_bias_grads(case, got):
    """Adds the sums of dgates, which the reference gives as gradients of b_ih."""
    columns = SPECS[case.cell].gates * H
    sums = got["d_gates"][..., :columns].sum(1)
    return got | {f"d_b_ih {d}": sums[d] for d in range(case.D)}


def check(case):
    got = with_bias_grads(case, run(case))
    for name, want in oracle(case).items():
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12, msg=name)
    assert not any(t.isnan().any() for t in got.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", SPECS)
def test_agrees_with_the_reference(cell, D, layout):
    check(case_of(cell, D, layout))


@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 3), (4, 1), (20, 2)])
def test_few_and_many_steps(cell, steps, batch):
    check(case_of(cell, 2, "dense", T=steps, B=batch))


@pytest.mark.parametrize("layout", ["packed", "both"])
@pytest.mark.parametrize("cell", SPECS)
def test_without_biases_and_without_gradients_of_the_steps(cell, layout):
    case = case_of(cell, 2, layout, bias=False)
    case.grads = case.grads._replace(cs=None, out=torch.zeros_like(case.grads.out))
    want = run(case)
    case.grads = case.grads._replace(out=None)
    got = run(case)
    assert all(torch.equal(got[name], want[name]) for name in want)
    case.grads = case.grads._replace(out=torch.zeros_like(want["out"]))
    check(case)


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_gru_with_two_products_a_step(layout, monkeypatch):
    """Beyond the H up to which one product of all tiles is faster."""
    monkeypatch.setattr(loop_cells, "_ONE_PRODUCT", 0)
    check(case_of("gru", 2, layout))


@pytest.mark.parametrize("bad", [float("inf"), NAN])
@pytest.mark.parametrize("cell", SPECS)
def test_a_reset_stops_inf_and_nan(cell, bad):
    """A broken h_0 spoils no step after a reset, a broken gradient none before it."""
    case = case_of(cell, 1, "reset")
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


@pytest.mark.parametrize("cell", SPECS)
def test_no_sequences(cell):
    assert run(case_of(cell, 2, "dense", B=0))["out"].shape == (0, 2 * H)


def test_sequences_without_any_step_keep_their_state():
    case = case_of("lstm", 2, "packed")
    case.rows = packed_rows(case.rows.sizes, 2, CPU, None, B + 2)
    more = torch.randn(2, 2, H, dtype=torch.float64)
    case.h_0, case.c_0 = (torch.cat([state, more], 1) for state in (case.h_0, case.c_0))
    ends = (torch.cat([g, more], 1) for g in (case.grads.h_n, case.grads.c_n))
    case.grads = case.grads._replace(**dict(zip(("h_n", "c_n"), ends, strict=True)))
    got = run(case)
    for name in ("h_n", "c_n", "d_h_0", "d_c_0"):
        assert torch.equal(got[name][:, B:], more), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", SPECS)
def test_other_dtypes_err_no_more_than_autograd(cell, dtype):
    case = case_of(cell, 2, "packed", dtype=dtype, scale=0.5)
    got, ref, truth = with_bias_grads(case, run(case)), oracle(case, dtype), oracle(case)
    for name, want in truth.items():
        assert got[name].dtype == dtype
        assert_budget(name, got[name], ref[name], want)


def test_small_signals_keep_their_relative_precision():
    """A tanh that is made of a sigmoid would lose it."""
    case = case_of("lstm", 1, "dense", dtype=torch.float32, bias=False)
    for tensor in (case.x, case.h_0, case.c_0):
        tensor *= 1e-5
    got, ref, truth = run(case), oracle(case, torch.float32), oracle(case)
    for name in ("out", "cs"):
        assert_budget(name, got[name], ref[name], truth[name])


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


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_gradient_of_h_0_of_one_sequence_is_as_exact_as_torchs(kind):
    """MKL adds a product with a vector term by term to what is there: dh z must come last."""
    theirs, ours = (getattr(library, kind)(256, 256) for library in (torch.nn, fusedrnn))
    truth = getattr(torch.nn, kind)(256, 256).double()
    for module in (theirs, truth):
        module.load_state_dict(ours.state_dict())
    x, h_0, cotangent = torch.randn(64, 1, 256), torch.randn(1, 1, 256), torch.randn(64, 1, 256)
    found = []
    for module in (truth, theirs, ours):
        dtype = module.weight_hh_l0.dtype
        h = h_0.to(dtype).requires_grad_()
        with fusedrnn.use_backend("torch"):
            output = module(x.to(dtype), (h, torch.zeros_like(h)) if kind == "LSTM" else h)[0]
        found += torch.autograd.grad(output, h, cotangent.to(dtype))
    of_theirs, of_ours = ((grad - found[0]).square().mean().sqrt() for grad in found[1:])
    assert of_ours < 2 * of_theirs
