"""Behaviour of a CUDA device: graphs, streams, its generator; runs have the same bits.

`make gpu` runs these by ``-m gpu``; elsewhere they are skipped. Equal means bit for bit.
"""

from contextlib import contextmanager

import pytest
import torch
from kernel_cases import Shape, differences, rows_of, tensors
from pairs import leaves, states_for
from test_equivalence import build

import fusedrnn
from fusedrnn import layer
from fusedrnn.arguments import as_hx
from fusedrnn.kernels.plan import SCHEDULES, NoPlan, Problem, chip_of, plan_stack
from fusedrnn.kernels.spec import SPECS

T, B, I = 70, 6, 3
#: Each schedule by a size and dtype that bring it about; the loop takes any.
ROUTES = {
    "resident_nvidia": (16, torch.float16, "triton"),
    "resident": (16, torch.float32, "triton"),
    "cooperative": (512, torch.float16, "triton"),
    "stepwise": (16, torch.float64, "triton"),
    "loop": (16, torch.float32, "torch"),
}


@pytest.fixture(autouse=True)
def _on_cuda(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")


def make(route, device, cell="lstm", layers=2, **kwargs):
    H, dtype, backend = ROUTES[route]
    if backend == "triton":
        problem = Problem(cell, H, B, 1, dtype, "ieee", True, layers)
        found = {plan.schedule for plan in plan_stack(problem, chip_of(device))}
        if found != {route}:
            pytest.skip(f"on this chip the plan is {', '.join(found)}")
    return build(cell, layers, 1, dtype, I, H, **kwargs).to(device)


def given(module, device, option="dense"):
    """x, hx and options, all on the device."""
    dtype = next(module.parameters()).dtype
    x = torch.randn(T, B, I, device=device).to(dtype)
    hx = states_for(module, B)
    lengths = torch.tensor([70, 0, 33, 1, 64, 2], device=device)
    reset = torch.rand(T, B, device=device) < 0.3
    options = {"lengths": lengths, "reset": reset}
    return x, hx, {name: value for name, value in options.items() if option in (name, "both")}


def train(module, x, hx, options):
    """Results and all gradients."""
    x = x.detach().requires_grad_()
    states = [h.detach().requires_grad_() for h in leaves(hx)]
    results = leaves(module(x, as_hx(states), **options))
    sources = [x, *states, *module.parameters()]
    arriving = [torch.ones_like(result) for result in results]
    return [*results, *torch.autograd.grad(results, sources, arriving)]


@contextmanager
def on_route(route):
    with fusedrnn.use_backend(ROUTES[route][2]), fusedrnn.use_precision("ieee"):
        yield


@pytest.mark.parametrize("route", [r for r in ROUTES if r != "loop"])  # lengths are on the device
@pytest.mark.parametrize("option", ["dense", "lengths", "reset", "both"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_users_graph_of_a_training_step(route, option, recompute, device):
    """A wait for the device, too, would end the capture."""
    module = make(route, device, recompute=recompute)
    x, hx, options = given(module, device, option)
    with on_route(route):
        run = lambda: train(module, x, hx, options)  # noqa: E731
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels compile, cuBLAS makes its handles
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            results = run()
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            with torch.no_grad():
                for p in module.parameters():  # as an optimizer does between two replays
                    p.mul_(0.9)
            graph.replay()
            assert all(map(torch.equal, results, run()))


@pytest.mark.parametrize("route", ["resident", "loop"])
def test_a_restored_generator_gives_the_same_masks(route, device):
    module = make(route, device, dropout=0.5)
    x, _, _ = given(module, device)
    with on_route(route), torch.no_grad():
        torch.manual_seed(11)
        state = torch.cuda.get_rng_state(device)
        first, other = module(x)[0], module(x)[0]
        assert not torch.equal(first, other)
        torch.cuda.set_rng_state(state, device)
        torch.rand(3)  # the CPU's generator has no part in it
        assert torch.equal(module(x)[0], first)
        assert torch.equal(module(x)[0], other)


@pytest.mark.parametrize("route", ROUTES)
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
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("rows", ["dense", "ragged", "packed"])
@pytest.mark.parametrize(("schedule", "H"), [("resident_nvidia", 64), ("cooperative", 192)])
@pytest.mark.parametrize("cell", SPECS)
def test_kernels_in_gluon_equal_the_reference(cell, schedule, H, rows, device):
    """In fp16; elsewhere they run in the interpreter, and those that exchange h in processes."""
    shape, is_ragged = Shape(5, 17, H, rows=rows), rows != "dense"
    problem = Problem(cell, H, 17, 1, torch.float16, "ieee", True, ragged=is_ragged)
    try:
        plan = SCHEDULES[schedule](problem, chip_of(device))
    except NoPlan as reason:
        pytest.skip(str(reason))
    data, layout = tensors(cell, shape, torch.float16, device), rows_of(shape, device)
    layer._schedule(plan.schedule).forward(cell, plan, data.layers, layout)
    layer._schedule(plan.schedule).backward(cell, plan, *data, layout)
    assert not differences(cell, shape, data)


def test_cooperative_launches_on_two_streams(device):
    """Each needs most of the device; neither may keep SMs that the other waits for."""
    module = make("cooperative", device)
    x, hx, _ = given(module, device)
    with on_route("cooperative"), torch.no_grad():
        want = module(x, hx)[0]
        streams, found = [torch.cuda.Stream() for _ in range(2)], []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        for n in range(1000):
            with torch.cuda.stream(streams[n % 2]):
                found = [*found[-1:], module(x, hx)[0]]
        torch.cuda.synchronize()
        assert all(torch.equal(output, want) for output in found)
