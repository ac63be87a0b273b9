"""More of ``torch.compile`` and ``torch.export``: each feature once, small, by inductor.

`test_torch_compile.py` has every shape and cell by aot_eager. What is equal here is equal to eager
within the budget, since inductor fuses what is around our operator.
"""

from __future__ import annotations

import copy
import io
import time

import pytest
import torch
from test_transforms import assert_alike
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn

# What inductor itself imports.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")

T, B, I, H = 5, 3, 3, 4
MODULES = {
    "lstm-2": lambda: fusedrnn.LSTM(I, H, num_layers=2),
    "gru-both-ways": lambda: fusedrnn.GRU(I, H, bidirectional=True),
    "rnn-relu": lambda: fusedrnn.RNN(I, H, nonlinearity="relu"),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results_of(results):
    return [t for t in tree_leaves(results) if t is not None and t.is_floating_point()]


def with_gradients(run, module, x, **options):
    """Results and all gradients, of a loss that counts every result."""
    results = results_of(run(x, **options))
    loss = sum(t.sin().sum() for t in results)
    return [*results, *torch.autograd.grad(loss, list(module.parameters()))]


def assert_equals_eager(module, x, **options):
    compiled = torch.compile(module, fullgraph=True)
    assert_alike(
        with_gradients(compiled, module, x, **options), with_gradients(module, module, x, **options)
    )


@pytest.mark.parametrize("name", MODULES)
def test_every_class_of_module(name):
    assert_equals_eager(MODULES[name]().double(), torch.randn(T, B, I).double())


def test_resets():
    reset = torch.rand(T, B) < 0.3
    assert reset.any()
    assert_equals_eager(
        MODULES["gru-both-ways"]().double(), torch.randn(T, B, I).double(), reset=reset
    )


def test_packed_outside_of_the_graph_and_backward():
    module = MODULES["lstm-2"]().double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    packed = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    assert_equals_eager(module, packed)


@pytest.mark.parametrize("name", ["lstm-2", "rnn-relu"])
@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_inference(name, no_gradients):
    module, x = MODULES[name]().eval().double(), torch.randn(T, B, I, dtype=torch.float64)
    with no_gradients():
        compiled = torch.compile(module, fullgraph=True)
        assert_alike(compiled(x), module(x))
        assert_alike(compiled(x), module(x))


def test_dropout():
    """Inductor draws by a generator of its own, from torch's seed: one seed, the same masks."""
    module = fusedrnn.LSTM(I, 32, num_layers=2, dropout=0.5).double()
    with torch.no_grad():  # where a mask shows: the second layer passes on the first one's output
        for name, p in module.named_parameters():
            p.fill_(0.1 if "weight" in name else 0.0)
    compiled = torch.compile(module, fullgraph=True)
    x, found = torch.ones(T, B, I, dtype=torch.float64), []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(with_gradients(compiled, module, x))
    other = with_gradients(compiled, module, x)
    assert all(map(torch.equal, *found))
    assert not torch.allclose(other[0], found[0][0])
    # With the masks of one call its gradients are a difference quotient's.
    weight, step = module.weight_ih_l1, 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step)
        torch.manual_seed(3)
        losses.append(sum(t.sin().sum() for t in results_of(compiled(x))).item())
        with torch.no_grad():
            weight.sub_(sign * step)
    index = 3 + [name for name, _ in module.named_parameters()].index("weight_ih_l1")
    slope = (losses[0] - losses[1]) / (2 * step)
    assert found[0][index].sum().item() == pytest.approx(slope, rel=1e-5)
    # A mask of p = 0.5 halves or doubles nothing in eval().
    assert_alike(torch.compile(module.eval(), fullgraph=True)(x), module(x))


@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([5, 0, 2])}], ids=["", "lengths"])
@pytest.mark.parametrize("layers", [1, 6])
def test_the_graph_of_backward_has_one_node_a_stack(layers, options):
    """As the graph of forward; nothing is unrolled over T, layers or directions."""
    module = fusedrnn.LSTM(I, H, num_layers=layers, bidirectional=True)
    graphs = []

    def record(graph, _):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    x = torch.randn(50, B, I, requires_grad=True)
    compiled(x, **options)[0].sum().backward()
    counts = [
        [str(node.target) for node in graph.nodes if "fusedrnn" in str(node.target)]
        for graph in graphs
    ]
    assert counts == [["fusedrnn.rnn_forward.default"], ["fusedrnn.rnn_backward.default"]]
    calls = [node for node in graphs[1].nodes if node.op.startswith("call")]
    assert len(calls) < 20 + 10 * layers, [
        str(call.target) for call in calls
    ]  # gradients, one by one


def test_an_exported_program_with_lengths_and_states_goes_through_a_file():
    module = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True).eval().double()
    steps, batch = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("B", min=2, max=1024)

    def given(T, B):
        x, h, c = torch.randn(T, B, I), torch.randn(4, B, H), torch.randn(4, B, H)
        lengths = torch.randint(0, T + 1, (B,))
        return (x.double(), (h.double(), c.double())), {"lengths": lengths}

    sizes = {"input": {0: steps, 1: batch}, "hx": ({1: batch}, {1: batch}), "lengths": {0: batch}}
    arguments, options = given(T, B)
    program = torch.export.export(module, arguments, options, dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((5, 3), (2, 7), (11, 2)):
        arguments, options = given(*shape)
        assert_alike(loaded(*arguments, **options), module(*arguments, **options))


def test_the_time_to_compile_six_layers_is_that_of_one():
    """In seconds: what a compiler sees does not grow with layers, directions or T.

    The first compilation loads inductor and its compiler's headers, so it is not the one timed.
    """
    spent = []
    for layers in (1, 1, 6):
        torch._dynamo.reset()
        # Of another size each time, so that no cache on disk has it.
        module = fusedrnn.LSTM(I, H + len(spent), num_layers=layers, bidirectional=True)
        x = torch.randn(200, 2, I)
        start = time.perf_counter()
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
        compiled(x)[0].sum().backward()
        spent.append(time.perf_counter() - start)
    _, one, six = spent
    assert six < 10, spent
    assert six < 4 * one + 2, spent
