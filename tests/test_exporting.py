"""Programs for onnxruntime and by AOTInductor give what the module gives, within the budget.

ONNX knows LSTM, GRU and RNN but not our operator, so ``to_torch`` comes first. AOTInductor packages
our operator as it is.
"""

import copy
import subprocess
import sys

import pytest
import torch
from needs import needs
from torch import nn

import fusedrnn
from fusedrnn.testing import assert_budget

# What the newer exporter and inductor use of torch that torch itself has deprecated, and that
# torch.nn's list of weights changes while torch.export looks on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is depr:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.*_flat_weights:UserWarning"),
]
I, H = 3, 4
SHAPES = (5, 7), (11, 3), (10, 7), (1, 1)  # T, B; the first is the one that is exported
CELLS = "LSTM", "GRU", "RNN"


class Model(nn.Module):
    """A head on a stack of two layers and both directions, and the last states."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(2 * H, 2)

    def forward(self, x, lengths=None):
        output, state = self.rnn(x) if lengths is None else self.rnn(x, lengths=lengths)
        return self.head(output), *(state if isinstance(state, tuple) else (state,))


def models(cell, **kwargs):
    """Ours, and torch's by ``to_torch``."""
    rnn = getattr(fusedrnn, cell)(I, H, num_layers=2, bidirectional=True, **kwargs)
    ours = Model(rnn).eval()
    return ours, fusedrnn.to_torch(copy.deepcopy(ours))


def batch(T, B, batch_first=False):
    return torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)


def assert_runs(run, ours, x, **options):
    """Every result within the budget that the module's own error in fp32 sets."""
    with torch.no_grad():
        got, want = run(x), ours(x, **options)
        truth = copy.deepcopy(ours).double()(x.double(), **options)
    for i, tensors in enumerate(zip(got, want, truth, strict=True)):
        assert_budget(f"result {i}", *tensors)


def onnx_runner(path):
    import onnx
    import onnxruntime

    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    operators = [node.op_type for node in onnx.load(path).graph.node]

    def run(x):
        return [torch.from_numpy(result) for result in session.run(None, {given.name: x.numpy()})]

    return run, operators, given.shape


@needs("onnx", "onnxruntime")
# What torch says of its older exporter, what that finds in torch.nn's checks of shapes, and a
# caution about batches: h_0 is of the input's size in the program, as the other batches show.
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning:torch.onnx")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size:UserWarning")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_onnx_with_any_length_and_batch(cell, batch_first, tmp_path):
    """By the older exporter: one ONNX operator a layer, for all T and B."""
    ours, theirs = models(cell, batch_first=batch_first)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        theirs,
        (batch(*SHAPES[0], batch_first),),
        path,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "B", 1: "T"} if batch_first else {0: "T", 1: "B"}},
    )
    run, operators, shape = onnx_runner(path)
    assert operators.count(cell) == 2
    assert set(shape) == {"T", "B", I}
    for T, B in SHAPES:
        assert_runs(run, ours, batch(T, B, batch_first))


@needs("onnx", "onnxruntime", "onnxscript")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_onnx_by_the_newer_exporter(cell, batch_first, tmp_path):
    """With any batch; of the length it fixes that of the example."""
    ours, theirs = models(cell, batch_first=batch_first)
    path = tmp_path / "model.onnx"
    sizes = ({0 if batch_first else 1: "B"},)
    with torch.no_grad():
        x = (batch(*SHAPES[0], batch_first),)
        torch.onnx.export(theirs, x, path, dynamo=True, verbose=False, dynamic_shapes=sizes)
    run, operators, _ = onnx_runner(path)
    assert operators.count(cell) == 2
    T, _ = SHAPES[0]
    for B in (7, 3, 1):
        assert_runs(run, ours, batch(T, B, batch_first))


@needs("onnx", "onnxscript")
def test_onnx_without_to_torch_names_our_operator():
    ours, _ = models("LSTM")
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"fusedrnn\.rnn_forward"):
        torch.onnx.export(ours, (batch(*SHAPES[0]),), dynamo=True, verbose=False)


def package(model, arguments, options, sizes, path):
    with torch.no_grad():
        program = torch.export.export(model, arguments, options, dynamic_shapes=sizes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


LOAD = """
import sys
import torch
run = torch._inductor.aoti_load_package(sys.argv[1])
calls = torch.load(sys.argv[2])
torch.save([run(*given, **options) for given, options in calls], sys.argv[3])
"""


def run_package(path, calls, imports):
    """The results of each call, from a process of its own; or what it says in failing."""
    given, results = path.with_name("given.pt"), path.with_name("results.pt")
    torch.save(calls, given)
    command = [sys.executable, "-c", imports + LOAD, str(path), str(given), str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else torch.load(results)


def check_package(path, ours, calls, imports):
    every = run_package(path, calls, imports)
    assert not isinstance(every, str), every
    for (given, options), results in zip(calls, every, strict=True):
        run = lambda x, results=results: results  # noqa: E731
        assert_runs(run, ours, *given, **options)


DIMS = torch.export.Dim("T", min=1, max=4096), torch.export.Dim("B", min=1, max=1024)


# Most of the time of these is the C++ compiler's.
@pytest.mark.slow
@pytest.mark.parametrize(("cell", "backend"), [("LSTM", "auto"), ("GRU", "torch")])
def test_aotinductor_packages_our_operator(cell, backend, tmp_path):
    """For all T and B, as one operator, which the process that loads it must know."""
    ours, _ = models(cell)
    path = tmp_path / "model.pt2"
    T, B = DIMS
    with fusedrnn.use_backend(backend):
        package(ours, (batch(*SHAPES[0]),), {}, ({0: T, 1: B},), path)
    calls = [((batch(T, B),), {}) for T, B in SHAPES]
    check_package(path, ours, calls, "import fusedrnn")
    assert "Could not find schema for fusedrnn::rnn_forward" in run_package(path, calls, "")


@pytest.mark.slow
def test_aotinductor_with_lengths(tmp_path):
    ours, _ = models("LSTM")
    path = tmp_path / "model.pt2"
    T, B = DIMS

    def call(T, B):
        return (batch(T, B),), {"lengths": torch.randint(1, T + 1, (B,))}

    package(ours, *call(*SHAPES[0]), {"x": {0: T, 1: B}, "lengths": {0: B}}, path)
    check_package(path, ours, [call(*shape) for shape in SHAPES], "import fusedrnn")


@pytest.mark.slow
def test_aotinductor_without_fusedrnn(tmp_path):
    """After ``to_torch``: unrolled, so for one T, and loaded where fusedrnn is not."""
    ours, theirs = models("LSTM")
    path = tmp_path / "model.pt2"
    T, B = SHAPES[0]
    package(theirs, (batch(T, B),), {}, ({1: DIMS[1]},), path)
    calls = [((batch(T, B),), {}) for B in (7, 3, 1)]
    check_package(path, ours, calls, "import sys; sys.modules['fusedrnn'] = None")
