"""``torch.export`` and AOTInductor: programs for any T and B that contain our operator."""

import copy
import io

import pytest
import test_torch_compile
import torch
from pairs import H, I
from processes import python
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn.testing import assert_budget

# torch.export uses them although torch has deprecated them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is depr:FutureWarning"),
]
MODULES = test_torch_compile.MODULES | {
    "rnn": lambda: fusedrnn.RNN(I, H),
    "lstm-projected": lambda: fusedrnn.LSTM(I, H, proj_size=2),
}
SHAPES = (5, 7), (11, 3), (10, 7)  # T, B; the first one is exported
T, B = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("B", min=2, max=2048)
SIZES = {"input": {0: T, 1: B}, "hx": {1: B}, "lengths": {0: B}}


def saved_and_loaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize(
    ("name", "names"), [*((name, ["input"]) for name in MODULES), ("gru-both-ways", SIZES)]
)
def test_dynamic_sizes(name, names):
    """Saved, loaded, and run with other T and B."""

    def given(T, B):
        lengths = torch.randint(1, T + 1, (B,))
        own = {"input": torch.randn(T, B, I), "hx": torch.randn(2, B, H), "lengths": lengths}
        return {name: own[name] for name in names}

    module, sizes = MODULES[name](), {name: SIZES[name] for name in names}
    # A projection trains by the reference, which is unrolled over T.
    with torch.set_grad_enabled(name != "lstm-projected"):
        program = torch.export.export(module, (), given(*SHAPES[0]), dynamic_shapes=sizes)
    loaded = saved_and_loaded(program)
    called = [str(n.target) for n in loaded.graph.nodes if "fusedrnn" in str(n.target)]
    assert called == ["fusedrnn.rnn_forward.default"]
    for shape in SHAPES:
        options = given(*shape)
        torch.testing.assert_close(loaded.module()(**options), module(**options))


def test_the_kernels_with_dynamic_sizes(device):
    """The choice is made with a T and B that have no values; no size becomes a guard."""
    module, x = fusedrnn.RNN(I, H).eval().to(device), torch.randn(5, 6, I, device=device)
    with fusedrnn.use_backend("triton"):
        loaded = saved_and_loaded(torch.export.export(module, (x,), dynamic_shapes=({0: T, 1: B},)))
        ranges = {(r.lower, r.upper) for r in loaded.range_constraints.values()}
        assert ranges == {(2, 4096), (2, 2048)}
        (node,) = [node for node in loaded.graph.nodes if "fusedrnn" in str(node.target)]
        assert "triton" in node.args
        x = torch.randn(7, 3, I, device=device)
        pairs = zip(tree_leaves(loaded.module()(x)), tree_leaves(module(x)), strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)


LOAD = """
import sys
import torch
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(x) for x in torch.load(sys.argv[2])], sys.argv[3])
"""


# The C++ compiler takes most of the time.
@pytest.mark.slow
def test_aotinductor_packages_our_operator(tmp_path):
    """For all T and B, as one operator, which the loading process must have imported."""
    model = fusedrnn.GRU(I, H, num_layers=2, bidirectional=True).eval()
    path, given, results = (tmp_path / name for name in ("model.pt2", "given.pt", "results.pt"))
    with fusedrnn.use_backend("torch"), torch.no_grad():
        x, sizes = torch.randn(*SHAPES[0], I), ({0: T, 1: B},)
        program = torch.export.export(model, (x,), dynamic_shapes=sizes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    calls = [torch.randn(*shape, I) for shape in SHAPES]
    torch.save(calls, given)
    for imports, error in (("import fusedrnn", ""), ("", "find schema for fusedrnn::rnn_forward")):
        done = python("-c", imports + LOAD, path, given, results)
        assert error in done.stderr
        assert bool(done.returncode) == bool(error)
    for x, got in zip(calls, torch.load(results), strict=True):
        want, truth = model(x), copy.deepcopy(model).double()(x.double())
        for i, tensors in enumerate(zip(got, want, truth, strict=True)):
            assert_budget(f"result {i}", *tensors)
