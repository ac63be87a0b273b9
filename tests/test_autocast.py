"""Autocast, gradient scaling, the default dtype, and inputs of every layout in memory.

Under autocast the loop and the kernels compute as cuDNN does: input, hx and weights in autocast's
dtype, which the results have. On `auto` the CPU runs torch's own operator.
"""

from __future__ import annotations

import copy

import pytest
import test_modules_inputs as inputs
import torch
from test_modules_inputs import build, leaves, states_for
from torch import Tensor, nn

import fusedrnn
from fusedrnn.kernels import resident
from fusedrnn.testing import assert_budget

BACKENDS = ("auto", "torch", "triton")
FULL, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
T, B = 3, 4
#: The loop takes both dtypes; Triton's interpreter multiplies no bf16.
ROUTES = [("torch", BF16), ("torch", HALF), ("triton", HALF)]

routes = pytest.mark.parametrize(("backend", "half"), ROUTES)


def as_hx(states):
    return tuple(states) if len(states) == 2 else states[0]


def gradients(results, sources) -> list[Tensor]:
    """From cotangents that are the same for every dtype."""
    generator = torch.Generator().manual_seed(4)
    arriving = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return list(torch.autograd.grad(results, sources, arriving))


def assert_equal(got, want) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


# Autocast.


@routes
@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, given) for name in ("LSTM", "GRU", "RNN") for given in ("full", "half")),
        ("LSTM", "mixed"),
        ("GRU", "none"),
    ],
)
def test_any_mixture_of_dtypes_is_computed_in_autocasts(backend, half, name, given):
    """Bit for bit the module in that dtype; gradients arrive in the dtype of what they are of."""
    _, ours = build(name, FULL, num_layers=1 + (backend == "torch"))
    low = copy.deepcopy(ours).to(half)
    kinds = {"full": (FULL, FULL), "half": (half, half), "mixed": (FULL, half), "none": ()}[given]
    states = [s.to(k) for s, k in zip(leaves(states_for(ours, B)), kinds, strict=False)]
    for x in (torch.randn(T, B, 3), torch.randn(T, B, 3).to(half)):
        found = []
        for module, kind in ((low, half), (ours, None)):
            given = [t.detach().to(kind or t.dtype).requires_grad_() for t in (x, *states)]
            sources = [*given, *module.parameters()]
            with (
                fusedrnn.use_backend(backend),
                torch.autocast("cpu", half, enabled=kind is None),
            ):
                results = leaves(module(given[0], as_hx(given[1:]) if states else None))
            found.append((results, gradients(results, sources), sources))
        (want, want_grads, _), (got, grads, sources) = found
        assert_equal(got, want)
        assert all(result.dtype == half for result in got)
        for grad, w, source in zip(grads, want_grads, sources, strict=True):
            assert grad.dtype == source.dtype
            assert torch.equal(grad, w.to(source.dtype))
        assert all(p.dtype == FULL for p in sources[-len(list(ours.parameters())) :])


@pytest.mark.parametrize("name", ["GRU", "RNN"])
@pytest.mark.parametrize("half", [BF16, HALF])
def test_auto_gives_torchs_bits_under_autocast(name, half):
    """nn.LSTM needs a CPU whose oneDNN knows the dtype; `test_modules_inputs.py` has that case."""
    theirs, ours = build(name, FULL, num_layers=2)
    for kind in (FULL, half):
        found = []
        for module in (theirs, ours):
            with torch.autocast("cpu", half):
                results = leaves(module(torch.ones(T, B, 3), torch.ones(2, B, 5, dtype=kind)))
            found.append([*results, *gradients(results, list(module.parameters()))])
        assert_equal(found[1], found[0])
        assert all(grad.dtype == FULL for grad in found[1][2:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_autocast_switched_off_inside(backend, name):
    _, ours = build(name, FULL)
    x, parameters = torch.randn(T, B, 3), list(ours.parameters())
    with fusedrnn.use_backend(backend):
        want = ours(x)[0]
        want_grads = gradients([want], parameters)
        with torch.autocast("cpu", HALF):
            with torch.autocast("cpu", enabled=False):
                got = ours(x)[0]
                with torch.autocast("cpu", HALF):
                    inner = ours(x)[0] if backend != "auto" else None
            if inner is not None:
                assert inner.dtype == HALF
                assert torch.equal(ours(x)[0], inner)
    assert_equal([got, *gradients([got], parameters)], [want, *want_grads])


@routes
def test_backward_inside_of_autocast_is_the_same(backend, half):
    _, ours = build("LSTM", FULL, bidirectional=True)
    x, parameters, found = torch.randn(T, B, 3), list(ours.parameters()), []
    for inside in (False, True):
        with fusedrnn.use_backend(backend), torch.autocast("cpu", half):
            results = leaves(ours(x))
            if inside:
                found.append(gradients(results, parameters))
        if not inside:
            found.append(gradients(results, parameters))
    assert_equal(*found)
    assert all(grad.dtype == FULL for grad in found[0])


@routes
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(backend, half, name):
    cell = getattr(fusedrnn, name)(3, 5)
    low = copy.deepcopy(cell).to(half)
    x, states = torch.randn(B, 3), [torch.randn(B, 5) for _ in range(1 + (name == "LSTMCell"))]
    with fusedrnn.use_backend(backend):
        want = leaves(low(x.to(half), as_hx([s.to(half) for s in states])))
        with torch.autocast("cpu", half):
            got = leaves(cell(x, as_hx(states)))
    assert_equal(got, want)
    assert all(grad.dtype == FULL for grad in gradients(got, list(cell.parameters())))


# Scaled gradients.


def steps_with(module, scaler, backend, x, cast=False, overflow=()) -> list[Tensor]:
    """Parameters and scales of three steps; in those of ``overflow`` a gradient is infinite."""
    optimizer, seen = torch.optim.SGD(module.parameters(), lr=0.05), []
    for step in range(3):
        optimizer.zero_grad()
        with fusedrnn.use_backend(backend), torch.autocast("cpu", HALF, enabled=cast):
            output, _ = module(x)
        loss = output.float().square().mean() if cast else output.square().mean()
        scaler.scale(loss * torch.inf if step in overflow else loss).backward()
        scaler.unscale_(optimizer)
        seen.append(nn.utils.clip_grad_norm_(module.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update()
        seen += [
            torch.tensor(scaler.get_scale()),
            *(p.detach().clone() for p in module.parameters()),
        ]
    return seen


@pytest.mark.parametrize(
    ("backend", "overflow"),
    [*((b, steps) for b in BACKENDS[:2] for steps in ((), (1, 2))), ("triton", (1,))],
)
def test_training_with_a_grad_scaler_is_torchs(backend, overflow):
    """A step with an infinite gradient is left out, and the scale halved."""
    theirs, ours = build("LSTM")
    x = torch.randn(2, B, 3, dtype=torch.float64)
    want, got = (
        steps_with(module, torch.amp.GradScaler("cpu", init_scale=2.0**10), b, x, False, overflow)
        for module, b in ((theirs, "auto"), (ours, backend))
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_scaled_step_in_fp16_follows_fp32(backend):
    """Gradients too small for fp16 arrive, as they would not without the scale."""
    _, ours = build("GRU", FULL)
    x = torch.randn(T, B, 3)

    def trained(scale):
        module = copy.deepcopy(ours)
        with fusedrnn.use_backend(backend), torch.autocast("cpu", HALF):
            output, _ = module(x)
        (output.float().square().sum() * 1e-7 * scale).backward()
        return [p.grad / scale for p in module.parameters()]

    exact = copy.deepcopy(ours).double()
    (exact(x.double())[0].square().sum() * 1e-7).backward()
    errors = []
    for grads in (trained(1.0), trained(2.0**20)):
        pairs = zip(grads, (p.grad for p in exact.parameters()), strict=True)
        errors.append(max(((g - w).norm() / w.norm()).item() for g, w in pairs))
    assert errors[1] < 32 * torch.finfo(HALF).eps < errors[0]


@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")  # inf in numpy
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_whole_steps_under_autocast_with_a_scaler(backend):
    _, ours = build("GRU", FULL)
    before = copy.deepcopy(list(ours.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1)
    steps_with(ours, scaler, backend, torch.randn(T, B, 3), cast=True)
    assert scaler.get_scale() < 2.0**30  # fp16 overflowed, and the scaler noticed
    assert all(p.isfinite().all() for p in ours.parameters())
    scaler = torch.amp.GradScaler("cpu")
    steps_with(ours, scaler, backend, torch.randn(T, B, 3), cast=True)
    assert not any(map(torch.equal, ours.parameters(), before))


# The default dtype, and modules of another.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_default_dtype_of_double(backend, name):
    torch.set_default_dtype(torch.float64)
    try:
        theirs, ours = getattr(nn, name)(3, 5), getattr(fusedrnn, name)(3, 5)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, B, 3)
        with fusedrnn.use_backend(backend):
            inputs.assert_same("aten" if backend == "auto" else backend, theirs, ours, x)
            assert all(r.dtype == torch.float64 for r in leaves(ours(x)))
    finally:
        torch.set_default_dtype(FULL)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_half_precision_modules(backend, name):
    theirs, ours = build(name, FULL)
    theirs.half()
    ours.half().load_state_dict(theirs.state_dict())
    assert all(p.dtype == HALF for p in ours.parameters())
    numbers = torch.randn(T, B, 3).half()
    truth, found = copy.deepcopy(theirs).double(), []
    for module, dtype in ((ours, HALF), (theirs, HALF), (truth, torch.float64)):
        x = numbers.to(dtype).requires_grad_()
        with fusedrnn.use_backend(backend):
            results = leaves(module(x))
        found.append([*results, *gradients(results, [x, *module.parameters()])])
    assert all(result.dtype == HALF for result in found[0])
    for i, tensors in enumerate(zip(*found, strict=True)):
        assert_budget(f"tensor {i}", *tensors)


# Layouts in memory.


def spread(x):
    room = torch.full((2 * T, B + 2, 6), torch.nan, dtype=x.dtype)
    view = room[1::2, 1:-1, ::2]
    view.copy_(x)
    return view


#: What makes the same numbers lie otherwise; what is expanded has the first sequence's.
LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "spread": spread,
    "flipped": lambda x: x.flip(0).contiguous().flip(0),
    "one sequence": lambda x: x[:, :1].expand_as(x),
    "one step": lambda x: x[:1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize(
    ("backend", "lay"),
    [
        *((backend, lay) for backend in BACKENDS[:2] for lay in LAYOUTS),
        *(("triton", lay) for lay in ("features first", "spread", "one step")),
    ],
)
def test_inputs_and_states_of_every_layout(backend, lay, batch_first):
    """Results and their strides, and gradients: those of what was expanded are summed."""
    kwargs = {} if backend == "triton" else {"num_layers": 2, "bidirectional": True}
    theirs, ours = build("LSTM", batch_first=batch_first, **kwargs)
    source, states = torch.randn(T, B, 3, dtype=torch.float64), leaves(states_for(ours, B))
    found = []
    for module, b in ((theirs, "auto"), (ours, backend)):
        sources = [t.detach().clone().requires_grad_() for t in (source, *states)]
        x = LAYOUTS[lay](sources[0]) if lay != "spread" else spread(sources[0].detach())
        hx = tuple(s.transpose(0, 1).contiguous().transpose(0, 1) for s in sources[1:])
        with fusedrnn.use_backend(b):
            results = leaves(module(x.transpose(0, 1) if batch_first else x, hx))
        loss = results[0].sum() + results[1].square().sum() + results[2].sum()
        wanted = [*(sources[1:] if lay == "spread" else sources), *module.parameters()]
        found.append((results, torch.autograd.grad(loss, wanted)))
    for got, want in zip(found[1], found[0], strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert [r.stride() for r in found[1][0]] == [r.stride() for r in found[0][0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
def test_results_lie_as_torchs(backend, batch_first):
    """Output, states and the gradient of a leaf, with and without a batch."""
    kwargs = {} if backend == "triton" else {"num_layers": 2, "bidirectional": True}
    theirs, ours = build("GRU", batch_first=batch_first, **kwargs)
    for shape in ((T, B, 3), (T, 3)):
        found = []
        for module, b in ((theirs, "auto"), (ours, backend)):
            x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            with fusedrnn.use_backend(b):
                output, h_n = module(x)
            output.sum().backward()
            grads = [x.grad, *(p.grad for p in module.parameters())]
            found.append([(t.stride(), t.is_contiguous()) for t in (output, h_n, *grads)])
        assert found[1] == found[0]


@pytest.mark.parametrize("lay", ["batch first", "one sequence", "every other step"])
def test_the_kernel_reads_the_input_where_it_lies(lay, monkeypatch):
    """It projects itself and takes any stride of T and B: nothing is copied."""
    _, ours = build("LSTM", FULL, batch_first=lay == "batch first")
    x = {
        "batch first": torch.randn(B, T, 3),
        "one sequence": torch.randn(T, 1, 3).expand(T, B, 3),
        "every other step": torch.randn(2 * T, B, 3)[::2],
    }[lay].requires_grad_()
    seen, real = [], resident.resident_fwd

    def watch(cell, plan, given, *rest):
        seen.append((plan.i_blocks, given.data_ptr(), given.shape))
        return real(cell, plan, given, *rest)

    monkeypatch.setattr(resident, "resident_fwd", watch)
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        got = leaves(ours(x))
        grads = gradients(got, [x, *ours.parameters()])
        (i_blocks, where, shape), *others = seen
        same = leaves(ours(x.contiguous() if lay != "batch first" else x.clone()))
    assert i_blocks
    assert not others
    assert (where, shape) == (x.data_ptr(), (T, B, 3))
    assert_equal(got, same)
    ref = build_like(ours, FULL)
    truth = build_like(ours, torch.float64)
    wants = []
    for module, dtype in ((ref, FULL), (truth, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        results = leaves(module(leaf))
        wants.append([*results, *gradients(results, [leaf, *module.parameters()])])
    for i, tensors in enumerate(zip([*got, *grads], *wants, strict=True)):
        assert_budget(f"tensor {i}", *tensors)


def build_like(ours, dtype):
    """torch's module with our weights."""
    theirs = nn.LSTM(3, 5, batch_first=ours.batch_first, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs
