"""Forward and backward read no value of a tensor, so the host never waits for the device.

Every way to read one raises, in Python and below it. Triton's interpreter, in place of the
device, may read; and tensors that the host has anyway, as a PackedSequence's ``batch_sizes``.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from pairs import leaves, states_for
from test_equivalence import build
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

import fusedrnn
from fusedrnn import arguments, dispatch, layer, stack

T, B = 3, 4
DEVICE = torch.device("cpu")  # it stands for the GPU
FP32, FP64 = torch.float32, torch.float64  # lead to the schedules resident and stepwise
LENGTHS = torch.tensor([2, 0, 3, 1])
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[[0, 1, 2], [2, 0, 2]] = True
BOTH = {"lengths": LENGTHS, "reset": RESET}
#: Methods that read values below the dispatcher, or would on another device.
LOOKS = ("tolist", "numpy", "cpu", "to", "__array__")
#: The operators that read values; bool(), torch.where(condition) and others end there.
OPERATORS = {
    *("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "allclose", "argwhere", "nonzero_numpy"),
}
OVERLOADS = {"where.default", "repeat_interleave.Tensor"}
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class LookedError(AssertionError):
    """The host looked at a value."""


class Host:
    """The tensors that the host has anyway, and what it computes of these alone."""

    def __init__(self, *tensors):
        self.tensors = list(tensors)  # kept, so that no address is used again

    def has(self, tensor):
        address = tensor.untyped_storage().data_ptr()
        return any(known.untyped_storage().data_ptr() == address for known in self.tensors)


class Blind(TorchDispatchMode):
    """Raises where an operator needs a value on the host: for its result, or for its shape."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if given and all(map(self.host.has, given)):
            results = func(*args, **(kwargs or {}))
            self.host.tensors += [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
            return results
        if name in OPERATORS or func.__name__ in OVERLOADS:
            raise LookedError(func.__name__)
        if name in MASKED and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise LookedError(f"{func.__name__} by a mask")
        return func(*args, **(kwargs or {}))


@contextmanager
def blind(*host):
    """Every look raises, but in a launch. Yields the launches that were made.

    host: tensors that may be looked at.
    """
    host = Host(*host)
    launches, execute = [], GridExecutor.__call__
    real = {name: getattr(torch.Tensor, name) for name in LOOKS}

    def blinded(name):
        def look(self, *args, **kwargs):
            if name == "to" and "cpu" not in (*args, *kwargs.values()):
                if DEVICE in args and host.has(self) and not kwargs.get("non_blocking"):
                    raise LookedError("the host waits for a copy of its tensor")
                result = real[name](self, *args, **kwargs)
                return result.clone() if DEVICE in args else result  # which the host does not have
            if host.has(self):
                return real[name](self, *args, **kwargs)
            raise LookedError(name)

        return look

    def launch(*args, **kwargs):
        launches.append(args)
        with pytest.MonkeyPatch.context() as seeing, _disable_current_modes():
            for name, method in real.items():
                seeing.setattr(torch.Tensor, name, method)
            return execute(*args, **kwargs)

    def within(function):
        """A mode ends at our operators; so it is begun again inside."""

        def run(*args):
            with Blind(host):
                return function(*args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "_checked_lengths", lambda lengths, *_: lengths)
        patch.setattr(GridExecutor, "__call__", launch)
        for name in ("forward", "backward"):
            patch.setattr(stack, name, within(getattr(stack, name)))
        for name in LOOKS:
            patch.setattr(torch.Tensor, name, blinded(name))
        with Blind(host):
            yield launches


CASES = {
    "resident": (FP32, "lstm", 1, {}),
    "reset before": (FP32, "gru_reset_before", 2, BOTH),
    "stepwise": (FP64, "lstm", 1, BOTH),
    "recompute": (FP64, "gru", 1, {}),
    "packed recompute": (FP64, "gru", 1, {}),
    "packed": (FP32, "lstm", 1, {}),
    "batch first": (FP32, "lstm", 1, {"lengths": LENGTHS, "reset": RESET.t()}),
    "states": (FP32, "lstm", 1, BOTH),
    "no gradients": (FP32, "lstm", 1, BOTH),
    "autocast": (FP32, "lstm", 1, BOTH),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    """Two layers with dropout between them, from a given hx."""
    dtype, cell, directions, options = CASES[name]
    kwargs = {"dropout": 0.3, "recompute": "recompute" in name, "batch_first": name[:5] == "batch"}
    module, x = build(cell, 2, directions, dtype, **kwargs), torch.randn(T, B, 3, dtype=dtype)
    x = pack_sequence([x[:n, 0] for n in (2, 1, 3, 3)], False) if name[:6] == "packed" else x
    x = x.transpose(0, 1) if name == "batch first" else x
    hx = states_for(module, B)
    sources = [t.requires_grad_() for t in (*leaves(x), *leaves(hx), *module.parameters())]

    def run():
        if name == "states":
            states = module.states(x, hx, gates=True, **options)
            results = [states.output, *states.gates[0][0].values()]
        else:
            results = leaves(module(x, hx, **options))
        if name == "no gradients":
            return results
        arriving = [torch.ones_like(result) for result in results]
        return [*results, *torch.autograd.grad(results, sources, arriving, allow_unused=True)]

    host = [x.batch_sizes] if name[:6] == "packed" else []
    with (
        torch.autocast("cpu", torch.float16, enabled=name == "autocast"),
        torch.set_grad_enabled(name != "no gradients"),
        fusedrnn.use_backend("triton"),
        blind(*host) as launches,
    ):
        results = run()
    assert launches
    assert all(result.isfinite().all() for result in results if result is not None)


def test_a_blocking_copy_is_found():
    with blind(LENGTHS), pytest.raises(LookedError, match="waits"):
        LENGTHS.to(DEVICE)
    with blind(LENGTHS):
        LENGTHS.to(DEVICE, non_blocking=True)


@pytest.mark.parametrize("form", ["packed", "lengths", "reset", "states"])
def test_rows_and_lengths_are_sent_once_for_forward_and_backward(form, monkeypatch):
    """To "meta", from which nothing can be read, in place of a GPU; no kernel is launched."""
    sent, to = [], torch.Tensor.to

    def noting(self, *args, **kwargs):
        result = to(self, *args, **kwargs)
        if (self.device.type, result.device.type) == ("cpu", "meta"):
            sent.append(kwargs.get("non_blocking", False))
        return result

    monkeypatch.setattr(torch.Tensor, "to", noting)
    monkeypatch.setattr(layer, "_launch", lambda *_: None)
    monkeypatch.setattr(dispatch, "choose", lambda facts: "triton")
    module, x = fusedrnn.GRU(3, 4, 2, bidirectional=True, device="meta"), torch.randn(T, B, 3)
    options = {"lengths": {"lengths": LENGTHS.tolist()}, "reset": {"reset": RESET}}.get(form, {})
    x = x if options else pack_sequence([x[:n, 0] for n in (3, 3, 2, 1)])
    x = x.to("meta") if options else x._replace(data=x.data.to("meta"))
    sent.clear()
    output = module.states(x).output if form == "states" else module(x, **options)[0]
    leaves(output)[0].sum().backward()
    assert sent == [True]


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


WHERE = [(arguments.Call, "stack_inputs"), (stack, "rows_of"), (stack, "backward")]


@pytest.mark.parametrize("look", PLANTED)
def test_a_planted_look_is_found(look, monkeypatch):
    where = WHERE[list(PLANTED).index(look) % 3]
    real = getattr(*where)

    def curious(input, *args):
        PLANTED[look](getattr(input, "input", input).detach())
        return real(input, *args)

    monkeypatch.setattr(*where, curious)
    module, x = build("rnn_tanh", dtype=torch.float32), torch.randn(T, B, 3, requires_grad=True)
    with fusedrnn.use_backend("triton"):
        module(x)[0].sum().backward()
        with pytest.raises(LookedError), blind():
            module(x)[0].sum().backward()
