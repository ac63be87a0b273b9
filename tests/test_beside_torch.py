"""README's table of what torch.nn refuses: every row is tried with both, and equals a detour."""

import mmap
from pathlib import Path

import pytest
import torch
from beside_torch import CLAIMS, module_of, refusal, table, written
from torch import nn
from torch.utils._pytree import tree_leaves

import fusedrnn

# Before it refuses, torch complains of operators without rules, and imports torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
NAMES = [claim.what for claim in CLAIMS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
needs_its_torch = pytest.mark.skipif(
    f"torch.nn {torch.__version__.partition('+')[0]} says" not in written(),
    reason="README quotes another torch; make beside writes it anew",
)


def skip_without(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("claim", CLAIMS, ids=NAMES)
def test_it_works_here(claim, device):
    skip_without(device)
    attempt = claim.ours or claim.attempt
    got = tree_leaves(attempt(*module_of(claim, fusedrnn, torch.float32, device)))
    want = tree_leaves(claim.truth(*module_of(claim, nn, torch.float64)))
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left.cpu().double(), right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("claim", CLAIMS, ids=NAMES)
def test_torch_refuses_it(claim, device):
    """On the CPU all but what cuDNN alone refuses."""
    skip_without(device)
    error = refusal(claim, device)
    if device == "cuda" or not claim.cudnn:
        assert error is not None, "torch.nn can do it now: the row must go"
        assert not isinstance(error, (AssertionError, AttributeError)), error
        assert claim.cudnn in str(error)
    else:
        assert error is None


def test_torch_has_the_text_about_second_derivatives():
    """cuDNN's other text lies in the CUDA library, which a CPU build lacks."""
    (claim,) = (claim for claim in CLAIMS if "gradient of a gradient" in claim.what)
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        assert text.find(claim.cudnn.encode()) > 0


@needs_its_torch
@pytest.mark.skipif(torch.cuda.is_available(), reason="the committed table is of the CPU")
def test_the_table_is_of_this_list():
    assert table() == written()
