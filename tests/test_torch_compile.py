"""``torch.compile`` and ``torch.export``: one node a stack, one compilation for all T and B."""

import io
import time
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.chips import CHIPS

pytestmark = [
    # What inductor itself imports, and what torch's operator says of its own way.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

SHAPES = (5, 3), (7, 4), (9, 6), (12, 8)  # T, B
I, H = 3, 4
MODULES = {
    "lstm-2": lambda: fusedrnn.LSTM(I, H, num_layers=2),
    "gru-both-ways": lambda: fusedrnn.GRU(I, H, bidirectional=True),
    "rnn": lambda: fusedrnn.RNN(I, H),
    "lstm-projected": lambda: fusedrnn.LSTM(I, H, proj_size=2),
    "gru-reset-before": lambda: fusedrnn.GRU(I, H, reset_after=False),
}
OPTIONS = {
    "plain": lambda T, B: {},
    "lengths": lambda T, B: {"lengths": torch.randint(1, T + 1, (B,))},
    "reset": lambda T, B: {"reset": torch.rand(T, B) < 0.2},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Nodes:
    """A backend of torch.compile that counts graphs and notes what they call."""

    def __init__(self, backend):
        self.counter = CompileCounterWithBackend(backend)

    @property
    def operators(self):
        nodes = [node for graph in self.counter.graphs for node in graph.graph.nodes]
        names = [str(node.target) for node in nodes if node.op == "call_function"]
        return [name for name in names if "rnn" in name or "lstm" in name or "gru" in name]


def check(module, arguments, backend="aot_eager", training=True):
    """Equal to eager, forward and backward, for every shape: two graphs, the second for all."""
    nodes = Nodes(backend)
    compiled = torch.compile(module, fullgraph=True, backend=nodes.counter)
    for shape in SHAPES:
        given, options = arguments(*shape)
        with torch.set_grad_enabled(training):
            got = tree_leaves(compiled(*given, **options))
            want = tree_leaves(module(*given, **options))
        torch.testing.assert_close(got, want)
        if training:
            weights = list(module.parameters())
            grads = [
                torch.autograd.grad(sum(t.square().sum() for t in results), weights)
                for results in ([t for t in r if t.requires_grad] for r in (got, want))
            ]
            torch.testing.assert_close(*grads)
    assert nodes.counter.frame_count == 2
    return nodes


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", MODULES)
def test_one_compilation_for_all_shapes(name, option, training):
    module = MODULES[name]().double()
    make = lambda T, B: ((torch.randn(T, B, I).double(),), OPTIONS[option](T, B))  # noqa: E731
    nodes = check(module, make, training=training)
    assert nodes.operators == ["fusedrnn.rnn_forward"] * 2  # one in each of the two graphs


@pytest.mark.parametrize("option", ["plain", "lengths"])
def test_by_inductor(option):
    make = lambda T, B: ((torch.randn(T, B, I),), OPTIONS[option](T, B))  # noqa: E731
    check(fusedrnn.LSTM(I, H, num_layers=2), make, backend="inductor")


def test_all_forms_of_input():
    state = lambda B: (torch.randn(2, B, H), torch.randn(2, B, H))  # noqa: E731
    lstm = fusedrnn.LSTM(I, H, num_layers=2)
    check(lstm, lambda T, B: ((torch.randn(T, B, I), state(B)), {}))
    torch._dynamo.reset()
    first = fusedrnn.LSTM(I, H, batch_first=True)
    check(first, lambda T, B: ((torch.randn(B, T, I),), {}))
    torch._dynamo.reset()
    check(lstm, lambda T, B: ((torch.randn(T, I),), {}))
    torch._dynamo.reset()
    check(fusedrnn.GRUCell(I, H), lambda T, B: ((torch.randn(B, I),), {}))


def test_packed_outside_of_the_graph():
    module = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True)
    nodes = Nodes("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=nodes.counter)
    for T, B in SHAPES:
        lengths = [T, *torch.randint(1, T + 1, (B - 1,)).tolist()]
        packed = pack_padded_sequence(torch.randn(T, B, I), lengths, enforce_sorted=False)
        (got, got_states), (want, want_states) = compiled(packed), module(packed)
        assert type(got) is type(want)
        for left, right in zip((*got, *got_states), (*want, *want_states), strict=True):
            torch.testing.assert_close(left, right)
    assert nodes.counter.frame_count == 2
    assert nodes.operators == ["fusedrnn.rnn_forward"] * 2


def test_autocast_and_states():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.GRU(I, H, num_layers=2)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.rnn(x)

    class Every(Mixed):
        def forward(self, x):
            states = self.rnn.states(x, gates=True)
            return states.output, states.h, [gate for g in states.gates for gate in g[0].values()]

    for module in Mixed(), Every():
        torch._dynamo.reset()
        with fusedrnn.use_backend("torch"):  # aten has other dtypes under autocast
            check(module, lambda T, B: ((torch.randn(T, B, I),), {}))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_and_its_generator(p):
    """By aot_eager, which calls torch's generator as eager does: the same masks from one seed."""
    module = fusedrnn.LSTM(I, H, num_layers=3, dropout=p)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(5, 3, I), []
    with fusedrnn.use_backend("torch"):
        for run in (module, compiled, compiled):
            torch.manual_seed(7)
            output, _ = run(x)
            results.append((output, *torch.autograd.grad(output.sum(), list(module.parameters()))))
    torch.testing.assert_close(results[1], results[0])
    assert torch.equal(results[1][0], results[2][0])


def test_the_choice_of_a_backend_is_followed():
    module, x = fusedrnn.LSTM(I, H), torch.randn(5, 3, I)
    nodes = Nodes("eager")
    compiled = torch.compile(module, fullgraph=True, backend=nodes.counter)
    for name in ("torch", "auto", "torch"):
        with fusedrnn.use_backend(name), torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))
    assert nodes.counter.frame_count == 2  # and the first again from the cache


def test_six_layers_compile_in_seconds():
    """torch's operator would be unrolled over T: its graph grows with T, ours has one node."""
    module = fusedrnn.LSTM(I, H, num_layers=6, bidirectional=True)
    nodes, x = Nodes("inductor"), torch.randn(200, 2, I)
    start = time.perf_counter()
    output, _ = torch.compile(module, fullgraph=True, backend=nodes.counter)(x)
    output.sum().backward()
    assert time.perf_counter() - start < 60  # about 2 on a free core
    assert nodes.operators == ["fusedrnn.rnn_forward"]


@pytest.mark.parametrize("grad", [True, False], ids=["with-grad", "without-grad"])
@pytest.mark.parametrize("name", MODULES)
def test_export_with_dynamic_sizes(name, grad):
    """Saved, loaded, and run with another T and B."""
    module = MODULES[name]().eval()
    T, B = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("B", min=2, max=1024)
    with torch.set_grad_enabled(grad):
        x = torch.randn(5, 6, I)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: T, 1: B},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    called = [str(n.target) for n in loaded.graph.nodes if "fusedrnn" in str(n.target)]
    assert called == ["fusedrnn.rnn_forward.default"]
    for shape in SHAPES:
        x = torch.randn(*shape, I)
        torch.testing.assert_close(loaded.module()(x), module(x))


#: The second is beyond a limit of the planner, where the tiles of the resident kernels change.
FEW, MANY = (7, 3), (2, 8 * CHIPS["sm_90"].sms + 9)


@pytest.mark.parametrize(
    ("name", "strict", "shapes"),
    [*((name, False, [FEW]) for name in MODULES), ("rnn", True, [FEW, MANY])],
)
def test_export_of_the_kernels_with_dynamic_sizes(name, strict, shapes, device):
    """The choice is made with a T and B that have no values; the operator plans with those it gets.

    In the program no size is compared with anything: both may still be what was said of them.
    """
    module = MODULES[name]().eval().to(device)
    T, B = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("B", min=2, max=2048)
    make = lambda *shape: torch.randn(*shape, I, device=device)  # noqa: E731
    with fusedrnn.use_backend("triton"):
        sizes = ({0: T, 1: B},)
        program = torch.export.export(module, (make(5, 6),), dynamic_shapes=sizes, strict=strict)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer)
        assert {(r.lower, r.upper) for r in loaded.range_constraints.values()} == {
            (2, 4096),
            (2, 2048),
        }
        (node,) = [node for node in loaded.graph.nodes if "fusedrnn" in str(node.target)]
        assert "triton" in node.args
        for shape in shapes:
            x = make(*shape)
            assert_equal(loaded.module()(x), module(x))


@pytest.mark.parametrize(
    ("name", "training"),
    [("lstm-2", True), ("gru-reset-before", True), ("gru-both-ways", False), ("rnn", False)],
)
def test_one_compilation_of_the_kernels(name, training, device):
    module = MODULES[name]().to(device)

    def make(T, B):
        return (torch.randn(T, B, I, device=device),), {}

    with fusedrnn.use_backend("triton"):
        nodes = check(module, make, training=training)
    assert nodes.operators == ["fusedrnn.rnn_forward"] * 2


@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_a_compilers_choice_depends_on_no_size_of_the_input(requested, monkeypatch):
    """On a GPU too, where ``auto`` compares what the model says of a problem."""
    asked = []

    def plan_stack(problem, chip):
        asked.append(problem)
        return planning.plan_stack(problem, chip)

    monkeypatch.setattr(dispatch, "plan_stack", plan_stack)
    monkeypatch.setattr(dispatch, "chip_of", lambda device: CHIPS["sm_90"])
    request = dispatch.Request("lstm", torch.device("cuda"), torch.float16, 5, 3, 64, 512)
    with fusedrnn.use_backend(requested):
        chosen = {
            dispatch.choose(request._replace(steps=T, batch=B, compiled=True))
            for T, B in product((1, 10_000), (1, 16, 64, 4096))
        }
        assert len(asked) == 8
        assert len(set(asked)) == len(chosen) == 1
        dispatch.choose(request)
    assert asked[-1].batch == 3  # without a compiler it does


def assert_equal(got, want):
    for left, right in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert torch.equal(left, right)


def test_export_with_states_and_lengths():
    module = fusedrnn.GRU(I, H).eval()
    T, B = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("B", min=2, max=1024)

    def given(T, B):
        lengths = torch.randint(1, T + 1, (B,))
        return (torch.randn(T, B, I), torch.randn(1, B, H)), {"lengths": lengths}

    sizes = {"input": {0: T, 1: B}, "hx": {1: B}, "lengths": {0: B}}
    arguments, options = given(5, 6)
    program = torch.export.export(module, arguments, options, dynamic_shapes=sizes)
    for shape in SHAPES:
        arguments, options = given(*shape)
        got = program.module()(*arguments, **options)
        torch.testing.assert_close(got, module(*arguments, **options))


def test_what_a_compiler_gets():
    request = fusedrnn.explain(fusedrnn.GRU(I, H), torch.randn(5, 3, I)).request
    assert dispatch.choose(request) == "aten"
    assert dispatch.choose(request._replace(compiled=True)) == "torch"
    assert dispatch.choose(request._replace(compiled=True, needs_grad=False)) == "aten"
    assert dispatch.choose(request._replace(transformed=True)) == "torch"
