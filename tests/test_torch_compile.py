"""``torch.compile``: one node a stack, one compilation for all T and B."""

import pytest
import torch
from pairs import H, I, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SHAPES = (5, 3), (7, 4), (12, 8)  # T, B
MODULES = {
    "lstm-2": lambda: fusedrnn.LSTM(I, H, num_layers=2),
    "gru-both-ways": lambda: fusedrnn.GRU(I, H, bidirectional=True),
    "gru-reset-before": lambda: fusedrnn.GRU(I, H, reset_after=False),
}


def operators(counter):
    """Returns the recurrent operators in the graphs that a backend has counted."""
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    names = [str(node.target) for node in nodes if node.op == "call_function"]
    return [name for name in names if "rnn" in name or "lstm" in name or "gru" in name]


def check(module, arguments, backend="aot_eager", training=True):
    """Equal to eager, forward and backward, for every shape: two graphs, the second for all."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for shape in SHAPES:
        given, options = arguments(*shape)
        if training:
            found = [run(each, *given, **options) for each in (compiled, module)]
        else:
            with torch.no_grad():
                found = [each(*given, **options) for each in (compiled, module)]
        torch.testing.assert_close(*found)
    assert counter.frame_count == 2
    return counter


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", MODULES)
def test_one_compilation_for_all_shapes(name, training):
    def make(T, B):
        options = {"lengths": torch.randint(1, T + 1, (B,)), "reset": torch.rand(T, B) < 0.2}
        return (torch.randn(T, B, I).double(),), options if name != "lstm-2" else {}

    counter = check(MODULES[name]().double(), make, training=training)
    assert operators(counter) == ["fusedrnn.rnn_forward"] * 2  # one in each of the two graphs


@pytest.mark.slow
def test_by_inductor():
    make = lambda T, B: ((torch.randn(T, B, I),), {})  # noqa: E731
    # Caches outlive a change of our operator.
    autograd = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch._inductor.config.patch(fx_graph_cache=False), autograd:
        check(fusedrnn.LSTM(I, H, num_layers=2), make, backend="inductor")


def packed(T, B):
    lengths = [T, *torch.randint(1, T + 1, (B - 1,)).tolist()]
    return pack_padded_sequence(torch.randn(T, B, I), lengths, enforce_sorted=False)


def test_all_forms_of_input():
    """Rows are packed outside of the graph."""
    first = fusedrnn.LSTM(I, H, 2, batch_first=True)
    for module, make in (
        (first, lambda T, B: ((torch.randn(B, T, I), (torch.randn(2, B, H),) * 2), {})),
        (first, lambda T, B: ((torch.randn(T, I),), {})),
        (fusedrnn.GRUCell(I, H), lambda T, B: ((torch.randn(B, I), torch.randn(B, H)), {})),
        (fusedrnn.LSTM(I, H, 2, bidirectional=True), lambda T, B: ((packed(T, B),), {})),
    ):
        torch._dynamo.reset()
        check(module, make)


def test_a_projection_runs():
    """By torch's operator in one node, in training by the reference step by step."""
    module = fusedrnn.LSTM(I, H, proj_size=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, weights = torch.randn(4, 3, I), list(module.parameters())
    found = [torch.autograd.grad(f(x)[0].square().sum(), weights) for f in (compiled, module)]
    torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


class Mixed(torch.nn.Module):
    """A module under autocast, with every state and gate."""

    def __init__(self):
        super().__init__()
        self.rnn = fusedrnn.GRU(I, H, num_layers=2)

    def forward(self, x, hx=None):
        with torch.autocast("cpu", torch.bfloat16):
            states = self.rnn.states(x, hx, gates=True)
        return states.output, states.h, [gate for g in states.gates for gate in g[0].values()]


def test_autocast_and_states():
    with fusedrnn.use_backend("torch"):  # aten has other dtypes under autocast
        check(Mixed(), lambda T, B: ((torch.randn(T, B, I),), {}))


def test_the_choice_of_a_backend_is_followed():
    module, x = fusedrnn.LSTM(I, H), torch.randn(5, 3, I)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for name in ("torch", "auto", "torch"):
        with fusedrnn.use_backend(name), torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 2  # and the first again from the cache


def test_one_compilation_of_the_kernels(device):
    module = fusedrnn.GRU(I, H, reset_after=False).to(device)
    make = lambda T, B: ((torch.randn(T, B, I, device=device),), {})  # noqa: E731
    with fusedrnn.use_backend("triton"):
        counter = check(module, make)
    assert operators(counter) == ["fusedrnn.rnn_forward"] * 2
