"""Fixtures of all tests; without a GPU the kernels run in Triton's interpreter."""

import os
import sys

import pytest
import torch

# Triton reads the variable when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import gluon_interpreter

    gluon_interpreter.install()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The modules that allocate tensors which kernels or loops fill.
ALLOCATING = ("grads", "layer", "layout", "loop", "loop_cells", "ops", "stack")


def pytest_collection_modifyitems(items):
    """Marks tests that use the fixture ``device`` with ``gpu``."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    """The GPU if there is one, else the CPU, where Triton interprets.

    It has an index, as the device of a tensor has. torch.nn and fusedrnn multiply fp32 as fp32.
    """
    if DEVICE == "cpu":
        yield torch.device("cpu")
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def exact_products(monkeypatch):
    """Makes the interpreter multiply fp32 as fp32, with no operand rounded to TF32."""
    monkeypatch.setattr("gluon_interpreter.round_to_tf32", lambda x: x)


@pytest.fixture
def fresh_dynamo():
    """Compiles anew, and leaves nothing compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Begins each test from one seed, without decisions of another or data of the user's."""
    from fusedrnn.kernels import problem

    torch.manual_seed(0)
    problem.forget()
    monkeypatch.setattr(problem, "_FAILED", {})
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)


def poisoning(make):
    """Returns a function that fills the float tensors of another with NaN."""

    def run(*args, **kwargs):
        tensor = make(*args, **kwargs)
        has_values = isinstance(tensor, torch.Tensor) and tensor.device.type in ("cpu", "cuda")
        return tensor.fill_(torch.nan) if has_values and tensor.is_floating_point() else tensor

    return run


class PoisonedTorch:
    """The namespace ``torch``, in which every uninitialised float tensor holds NaN."""

    def __getattr__(self, name):
        found = getattr(torch, name)
        return poisoning(found) if name in ("empty", "empty_like") else found


@pytest.fixture(autouse=True)
def _nan_poisoned_allocations(monkeypatch):
    """Makes every element that a kernel or loop forgets to write a NaN in the result."""
    import fusedrnn  # noqa: F401

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
    for name in ALLOCATING:
        module = sys.modules.get(f"fusedrnn.{name}")
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", PoisonedTorch())
