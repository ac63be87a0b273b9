"""Forward and backward read no value of a tensor, so the host never waits for the device.

Tensors of the device are fake ones, of which nothing can be read; real ones are the host's, as a
PackedSequence's ``batch_sizes``. No kernel is launched.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from pairs import leaves, states_for
from test_equivalence import build
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

import fusedrnn
from fusedrnn import arguments, functional, ops, stack

T, B = 3, 4
DEVICE = torch.device("cpu")  # it stands for the GPU
FP32, FP64 = torch.float32, torch.float64  # lead to the schedules resident and stepwise
SIZES = torch.tensor([4, 3, 1])


class WaitedError(AssertionError):
    """The host waits for the device."""


class Apart(TorchDispatchMode):
    """Computes on the host what has real tensors alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def on_device():
    """Makes new tensors the device's; yields the launches that are made."""
    launches, to, fake = [], Tensor.to, FakeTensorMode(allow_non_fake_inputs=True)

    def copied(self, *args, **kwargs):
        if isinstance(self, FakeTensor):
            if "cpu" in (*args, *kwargs.values()):
                raise WaitedError("the host waits for a copy")
        elif DEVICE in args:
            if not kwargs.get("non_blocking"):
                raise WaitedError("the host waits for a copy of its tensor")
            return fake.from_tensor(self)
        return to(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, fake, Apart():
        patch.setattr(arguments, "_checked_lengths", lambda lengths, *_: lengths)
        patch.setattr(ops, "_needs_dispatcher", lambda tensor: False)
        patch.setattr(GridExecutor, "__call__", lambda *given, **_: launches.append(given))
        patch.setattr(Tensor, "data_ptr", lambda self: 0)
        patch.setattr(Tensor, "to", copied)
        patch.setattr(Tensor, "cpu", lambda self: self.to("cpu"))
        yield launches


CASES = {
    "resident": (FP32, "lstm", ()),
    "reset before": (FP32, "gru_reset_before", ("lengths", "reset")),
    "stepwise": (FP64, "lstm", ("lengths", "reset")),
    "recompute": (FP64, "gru", ()),
    "packed recompute": (FP64, "gru", ()),
    "packed": (FP32, "lstm", ()),
    "batch first": (FP32, "lstm", ("lengths", "reset")),
    "states": (FP32, "lstm", ("lengths", "reset")),
    "no gradients": (FP32, "lstm", ("lengths", "reset")),
    "autocast": (FP32, "lstm", ("lengths", "reset")),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    """Two layers with dropout between them, from a given hx."""
    dtype, cell, given = CASES[name]
    grid = (B, T) if name == "batch first" else (T, B)
    with (
        torch.autocast("cpu", torch.float16, enabled=name == "autocast"),
        torch.set_grad_enabled(name != "no gradients"),
        fusedrnn.use_backend("triton"),
        on_device() as launches,
    ):
        kwargs = {"dropout": 0.3, "recompute": "recompute" in name, "batch_first": grid[0] == B}
        module, x = build(cell, 2, 2, dtype, **kwargs), torch.randn(*grid, 3, dtype=dtype)
        if name.startswith("packed"):
            x = PackedSequence(x.flatten(0, 1)[:8], SIZES, *[torch.arange(B)] * 2)
        options = {"lengths": torch.ones(B).long(), "reset": torch.ones(grid).bool()}
        options = {key: options[key] for key in given}
        run = partial(module.states, gates=True) if name == "states" else module
        results = leaves(tuple(run(x, states_for(module, B), **options))[:3])
        if name != "no gradients":
            loss = sum(result.sum() for result in results)
            torch.autograd.grad(loss, [*module.parameters()])
    assert launches


@pytest.mark.parametrize("blocks", [False, True])
def test_a_blocking_copy_is_found(blocks):
    with on_device():
        if not blocks:
            assert isinstance(SIZES.to(DEVICE, non_blocking=True), FakeTensor)
            return
        with pytest.raises(WaitedError, match="waits for a copy of its"):
            SIZES.to(DEVICE)


PLANTED = {
    "item": lambda t: t.sum().item(),
    "truth": lambda t: bool(t.any()),
    "list": lambda t: t.tolist(),
    "copy": lambda t: t.cpu(),
    "array": lambda t: t.numpy(),
    "nonzero": lambda t: torch.nonzero(t),
    "where": lambda t: torch.where(t > 0),
    "mask": lambda t: t[t > 0],
    "repeat": lambda t: torch.repeat_interleave(t.flatten().long().abs()),
}
WHERE = [(functional, "dropout_masks"), (stack, "layout_of"), (stack, "backward")]


@pytest.mark.parametrize("look", PLANTED)
def test_a_planted_look_is_found(look, monkeypatch):
    where = WHERE[list(PLANTED).index(look) % 3]
    real, looks = getattr(*where), []

    def curious(input, *args):
        looks.append(look)
        PLANTED[look](getattr(input, "input", input).detach())
        return real(input, *args)

    monkeypatch.setattr(*where, curious)
    waits = pytest.raises((WaitedError, RuntimeError))
    with fusedrnn.use_backend("triton"), on_device(), waits:
        build("rnn_tanh", dtype=FP32)(torch.randn(T, B, 3))[0].sum().backward()
    assert looks
