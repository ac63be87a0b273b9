"""Without a GPU the kernels run under Triton's interpreter, which must be chosen before import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    """`-m gpu` selects what has something to say on a device: the tests that take the fixture."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    """The GPU if there is one, else the CPU, where triton interprets."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_poisoned_allocations(monkeypatch):
    """Every uninitialised float tensor of ours starts as NaN, so a cell left unwritten shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor.fill_(float("nan")) if tensor.device.type in ("cpu", "cuda") else tensor

    from fusedrnn import launches, ops, recompute, stack

    class Poisoned:
        """The torch namespace of one module, with empty_like poisoned."""

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty_like(*args, **kwargs):
            return poison(empty_like(*args, **kwargs))

    for module in (launches, ops, recompute, stack):
        monkeypatch.setattr(module, "torch", Poisoned())
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *a, **k: poison(new_empty(self, *a, **k)),
    )


@pytest.fixture(params=["3.9", "3.6"])
def triton_dir(request):
    """The newest Triton and the oldest supported one (torch 2.11's), which `make test` installs."""
    variable = "FUSEDRNN_TRITON_" + request.param.replace(".", "")
    if variable not in os.environ:
        pytest.skip(f"{variable} names no folder with Triton {request.param}; `make test` does")
    return os.environ[variable]
