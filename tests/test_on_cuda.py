"""Behaviour of a CUDA device: graphs, streams, waits, its generator, autocast, two runs alike.

`make gpu` runs these by ``-m gpu``; elsewhere they are skipped. The CPU's part of them is in
`test_no_sync.py`, `test_dropout.py` and `test_autocast.py`. Equal means bit for bit: the same
kernels run on the same numbers.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from pairs import leaves
from test_equivalence import build, states_for
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn.arguments import as_hx
from fusedrnn.kernels.plan import Problem, chip_of, plan_stack
from fusedrnn.testing import assert_budget

T, B, I = 70, 6, 3
#: Each schedule by a size and dtype that bring it about; the loop takes any.
ROUTES = {
    "resident": (16, torch.float32, "triton"),
    "cooperative": (512, torch.float16, "triton"),
    "stepwise": (16, torch.float64, "triton"),
    "loop": (16, torch.float32, "torch"),
}
OPTIONS = ("dense", "lengths", "reset", "both")

routes = pytest.mark.parametrize("route", ROUTES)
#: The loop reads lengths on the host.
kernels = pytest.mark.parametrize("route", [r for r in ROUTES if r != "loop"])


@pytest.fixture(autouse=True)
def _on_cuda(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")


def make(route, device, cell="lstm", layers=2, **kwargs):
    H, dtype, backend = ROUTES[route]
    if backend == "triton":
        problem = Problem(cell, H, B, 1, dtype, "ieee", True, layers)
        assert {plan.schedule for plan in plan_stack(problem, chip_of(device))} == {route}
    return build(cell, layers, 1, dtype, I, H, **kwargs).to(device)


def given(module, device, option="dense"):
    """x, hx and options, all on the device."""
    dtype = next(module.parameters()).dtype
    x = torch.randn(T, B, I, device=device).to(dtype)
    hx = as_hx(states_for(module, B, dtype))
    lengths = torch.tensor([70, 0, 33, 1, 64, 2], device=device)
    reset = torch.rand(T, B, device=device) < 0.3
    options = {"lengths": lengths} if option in ("lengths", "both") else {}
    options |= {"reset": reset} if option in ("reset", "both") else {}
    return x, hx, options


def train(module, x, hx, options):
    """Results and all gradients."""
    x = x.detach().requires_grad_()
    states = [h.detach().requires_grad_() for h in leaves(hx)]
    results = leaves(module(x, as_hx(states), **options))
    sources = [x, *states, *module.parameters()]
    arriving = [torch.ones_like(result) for result in results]
    return [*results, *torch.autograd.grad(results, sources, arriving)]


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@contextmanager
def on_route(route):
    with fusedrnn.use_backend(ROUTES[route][2]), fusedrnn.use_precision("ieee"):
        yield


def warmed_up(run):
    """The results of a run, after others on a side stream, as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels compile, cuBLAS makes its handles
            results = run()
    torch.cuda.current_stream().wait_stream(stream)
    return results


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@kernels
@pytest.mark.parametrize("option", OPTIONS)
def test_a_users_graph_of_forward(route, option, device):
    """Captured once, replayed on other inputs: equal to eager calls."""
    module = make(route, device, "gru")
    x, hx, options = given(module, device, option)
    with on_route(route), torch.no_grad():
        run = lambda: leaves(module(x, hx, **options))  # noqa: E731
        warmed_up(run)
        graph, results = captured(run)
        for _ in range(2):
            for static in (x, *leaves(hx)):
                static.copy_(torch.randn_like(static))
            for static in options.values():
                static.copy_(static.roll(1, -1))
            graph.replay()
            assert_same(results, run())


@kernels
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_users_graph_of_a_training_step(route, option, recompute, device):
    module = make(route, device, recompute=recompute)
    x, hx, options = given(module, device, option)
    with on_route(route):
        run = lambda: train(module, x, hx, options)  # noqa: E731
        warmed_up(run)
        graph, results = captured(run)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            with torch.no_grad():
                for p in module.parameters():  # as an optimizer does between two replays
                    p.mul_(0.9)
            graph.replay()
            assert_same(results, run())


@kernels
@pytest.mark.parametrize("option", [*OPTIONS, "packed"])
def test_nothing_waits_for_the_device(route, option, device):
    module = make(route, device, dropout=0.3)
    x, hx, options = given(module, device, "dense" if option == "packed" else option)
    if option == "packed":
        x = pack_padded_sequence(x, [70, 70, 33, 32, 2, 1])

    def run():
        results = [r for r in leaves(module(x, hx, **options)) if r.is_floating_point()]
        results = [r for r in results if r.requires_grad]
        sum(r.sum() for r in results).backward()

    with on_route(route):
        warmed_up(run)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed(device):
    """Else the test above could not fail."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchron"):
            torch.ones(1, device=device).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def masked(module, x):
    with torch.no_grad():
        return module(x)[0].clone()


@pytest.mark.parametrize("route", ["resident", "loop"])
def test_a_restored_generator_gives_the_same_masks(route, device):
    module = make(route, device, dropout=0.5)
    x, _, _ = given(module, device)
    with on_route(route):
        torch.manual_seed(11)
        state = torch.cuda.get_rng_state(device)
        first, other = masked(module, x), masked(module, x)
        torch.manual_seed(11)
        assert torch.equal(masked(module, x), first)
        torch.cuda.set_rng_state(state, device)
        assert torch.equal(masked(module, x), first)
        assert torch.equal(masked(module, x), other)
        assert not torch.equal(first, other)
        # The CPU's generator has no part in it.
        torch.cuda.set_rng_state(state, device)
        torch.rand(3)
        assert torch.equal(masked(module, x), first)


def test_the_masks_of_both_backends_are_those_of_torchs_dropout(device):
    """Philox's seed and offset are advanced alike, so what is drawn afterwards is alike too."""
    found = []
    for route in ("resident", "loop"):
        torch.manual_seed(0)
        module = make(route, device, dropout=0.5)
        x = torch.ones(T, B, I, device=device)
        with on_route(route):
            torch.manual_seed(11)
            found.append((masked(module, x), torch.rand(3, device=device)))
    (left, after), (right, after_too) = found
    assert torch.equal(after, after_too)
    torch.testing.assert_close(left, right)  # another mask would be another output altogether


@pytest.mark.parametrize("route", ["resident", "loop"])
def test_a_replay_draws_new_masks(route, device):
    """In a graph the generator's offset advances with each replay, and a seed starts it again."""
    module = make(route, device, dropout=0.5)
    x, _, _ = given(module, device)
    with on_route(route), torch.no_grad():
        run = lambda: module(x)[0]  # noqa: E731
        warmed_up(run)
        graph, output = captured(run)
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            for _ in range(2):
                graph.replay()
                found.append(output.clone())
        assert not torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])


@routes
@pytest.mark.parametrize("option", OPTIONS)
def test_two_runs_have_the_same_bits(route, option, device):
    module = make(route, device)
    x, hx, options = given(module, device, option)
    with on_route(route):
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (train(module, x, hx, options) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
    assert_same(first, second)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_autocast(cell, backend, half, device):
    """Bit for bit the module in that dtype; gradients arrive in fp32."""
    module = make("resident", device, cell)
    low = copy.deepcopy(module).to(half)
    x, hx, _ = given(module, device)
    low_hx = as_hx([h.to(half) for h in leaves(hx)])
    with fusedrnn.use_backend(backend):
        want = train(low, x.to(half), low_hx, {})
        with torch.autocast("cuda", half):
            got = train(module, x, hx, {})
    count = 1 + len(leaves(hx))
    assert all(t.dtype == half for t in got[:count])
    assert all(t.dtype == torch.float32 for t in got[count:])
    assert_same(got, [*want[:count], *(t.float() for t in want[count:])])


def test_gradient_scaling(device):
    """Steps under fp16 and a scaler: an overflow is skipped, the others take the scale out."""
    module = make("resident", device)
    x, hx, _ = given(module, device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [p.detach().clone() for p in module.parameters()]
    for step in range(40):
        optimizer.zero_grad()
        with fusedrnn.use_backend("triton"), torch.autocast("cuda", torch.float16):
            loss = module(x, hx)[0].float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert_same([p.detach() for p in module.parameters()], before)
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in module.parameters())
    assert not any(map(torch.equal, before, module.parameters()))


@routes
def test_a_side_stream(route, device):
    """Work of a stream waits for that stream alone, and backward runs where forward ran."""
    module = make(route, device)
    x, hx, options = given(module, device)
    with on_route(route):
        want = train(module, x, hx, options)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(50_000_000)  # tens of ms, in which x is not there yet
            late.copy_(x)
            got = train(module, late, hx, options)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@routes
def test_a_device_that_is_not_the_current_one(route, device):
    module = make(route, torch.device("cuda:0"))
    x, hx, options = given(module, torch.device("cuda:0"))
    other = copy.deepcopy(module).to("cuda:1")
    there = as_hx([h.to("cuda:1") for h in leaves(hx)])
    with on_route(route), torch.cuda.device(0):
        want = train(module, x, hx, options)
        got = train(other, x.to("cuda:1"), there, options)
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in got)
    truth = train(
        copy.deepcopy(module).double(), x.double(), as_hx([h.double() for h in leaves(hx)]), {}
    )
    for i, (g, w, t) in enumerate(zip(got, want, truth, strict=True)):
        assert_budget(f"result {i}", g.cpu(), w.cpu(), t.cpu())
