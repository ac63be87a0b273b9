"""Forward and backward read no value of a tensor, so the host never waits for the device.

Tensors on "meta" take the place of the GPU's: nothing can be read from them, and no kernel is
launched. Tensors on the CPU are the host's, as a PackedSequence's ``batch_sizes``.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from pairs import leaves, states_for
from test_equivalence import build
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from triton.runtime.interpreter import GridExecutor

from fusedrnn import dispatch, functional, stack
from fusedrnn.arguments import as_hx

T, B = 3, 4
FP32, FP64 = torch.float32, torch.float64  # lead to the schedules resident and stepwise
LENGTHS, RESET = torch.tensor([2, 0, 3, 1]), torch.rand(T, B) < 0.3


@contextmanager
def on_device():
    """Yields the kernels that are launched, and of each tensor that is sent if it is waited for."""
    launches, sent, to = [], [], Tensor.to

    def noting(self, *args, **kwargs):
        result = to(self, *args, **kwargs)
        if (self.device.type, result.device.type) == ("cpu", "meta"):
            sent.append(not kwargs.get("non_blocking", False))
        return result

    with pytest.MonkeyPatch.context() as patch, dispatch.use_backend("triton"):
        patch.setattr(dispatch, "_is_gpu", lambda device: True)
        patch.setattr(GridExecutor, "__call__", lambda *given, **_: launches.append(given))
        patch.setattr(Tensor, "to", noting)
        yield launches, sent


#: The tensors that are sent, each once for forward and backward.
CASES = {
    "resident": (FP32, "lstm", 0),
    "stepwise": (FP64, "gru_reset_before", 0),
    "recompute": (FP64, "gru", 0),
    "packed recompute": (FP64, "gru", 1),
    "packed": (FP32, "lstm", 1),
    "packed states": (FP32, "lstm", 1),
    "lengths": (FP32, "lstm", 1),
    "lengths on the device": (FP32, "lstm", 0),
    "lengths reset": (FP64, "lstm", 2),
    "reset batch first": (FP32, "lstm", 1),
    "states lengths reset": (FP32, "lstm", 2),
    "no gradients lengths reset": (FP32, "lstm", 2),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    """Two layers with dropout between them, from a given hx."""
    dtype, cell, count = CASES[name]
    options = {"recompute": "recompute" in name, "batch_first": "batch first" in name}
    module = build(cell, 2, 2, dtype, dropout=0.3, **options).to("meta")
    hx = [s.to("meta").requires_grad_() for s in leaves(states_for(module, B))]
    x, given = torch.randn(T, B, 3, dtype=dtype, device="meta"), {}
    if "packed" in name:
        packed = pack_sequence([torch.randn(n, 3) for n in (3, 3, 2, 1)])
        x = packed._replace(data=packed.data.to("meta", dtype))
    if "lengths" in name:
        given["lengths"] = LENGTHS.to("meta") if "device" in name else LENGTHS
    if "reset" in name:
        given["reset"] = RESET.t() if module.batch_first else RESET
    x = x.transpose(0, 1) if module.batch_first else x
    run = partial(module.states, gates=True) if "states" in name else module
    with on_device() as (launches, sent), torch.set_grad_enabled("no gradients" not in name):
        results = leaves(tuple(run(x, as_hx(hx), **given))[:3])
        if "no gradients" not in name:
            loss = sum(result.sum() for result in results)
            torch.autograd.grad(loss, [*hx, *module.parameters()])
    assert launches
    assert sent == [False] * count


@pytest.mark.parametrize(
    ("module", "name", "look"),
    [
        (functional, "rnn_stack", lambda t: t.cpu()),
        (stack, "forward", lambda t: t.sum().item()),
        (stack, "backward", torch.nonzero),
    ],
)
def test_a_planted_look_is_found(module, name, look, monkeypatch):
    real = getattr(module, name)

    def curious(input, *args, **options):
        look(getattr(input, "input", input).detach())
        return real(input, *args, **options)

    rnn, x = build("rnn_tanh", dtype=FP32).to("meta"), torch.randn(T, B, 3, device="meta")
    with on_device():
        rnn(x)[0].sum().backward()  # from now on its plan is known
        monkeypatch.setattr(module, name, curious)
        with pytest.raises(RuntimeError, match="meta"):
            rnn(x)[0].sum().backward()
