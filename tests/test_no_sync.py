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
from fusedrnn import arguments, functional, stack

T, B = 3, 4
LENGTHS = torch.tensor([2, 0, 3, 1])
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[[0, 1, 2], [2, 0, 2]] = True
#: The schedules, each by a dtype that leads to it.
ROUTES = {"resident": torch.float32, "stepwise": torch.float64}
CALLS = {"plain": {}, "lengths and reset": {"lengths": LENGTHS, "reset": RESET}}
LOOKS = (
    *("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"),
    *("allclose", "unique"),
)
#: The operators below them; torch.where(condition), a mask as an index and others end there too.
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
    launches, execute, move = [], GridExecutor.__call__, torch.Tensor.to
    real = {name: getattr(torch.Tensor, name) for name in LOOKS if hasattr(torch.Tensor, name)}

    def blinded(name):
        def look(self, *args, **kwargs):
            if name in real and host.has(self):
                return real[name](self, *args, **kwargs)
            raise LookedError

        return look

    look = blinded("to")

    def to(self, *args, **kwargs):
        return look(self) if "cpu" in (*args, *kwargs.values()) else move(self, *args, **kwargs)

    def launch(*args, **kwargs):
        launches.append(args)
        with pytest.MonkeyPatch.context() as seeing, _disable_current_modes():
            for name, method in {**real, "to": move}.items():
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
        for name in real:
            patch.setattr(torch.Tensor, name, blinded(name))
        patch.setattr(torch.Tensor, "to", to)
        with Blind(host):
            yield launches


def run_blind(run, *host):
    """Runs a function that returns results and gradients, on the kernels."""
    with fusedrnn.use_backend("triton"), blind(*host) as launches:
        results = run()
    assert launches
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("call", ["plain", "lengths and reset"])
@pytest.mark.parametrize(
    ("route", "cell", "directions", "recompute"),
    [
        ("resident", "lstm", 1, False),
        ("stepwise", "lstm", 1, False),
        ("stepwise", "gru", 1, True),
        ("resident", "gru_reset_before", 2, False),
    ],
)
def test_forward_and_backward(route, cell, directions, recompute, call):
    """Two layers with dropout between them, from a given hx."""
    dtype = ROUTES[route]
    module = build(cell, 2, directions, dtype, dropout=0.3, recompute=recompute)
    x = torch.randn(T, B, 3, dtype=dtype, requires_grad=True)
    hx = states_for(module, B)
    sources = [x, *(state.requires_grad_() for state in leaves(hx)), *module.parameters()]

    def run():
        results = leaves(module(x, hx, **CALLS[call]))
        arriving = [torch.ones_like(result) for result in results]
        return [*results, *torch.autograd.grad(results, sources, arriving)]

    run_blind(run)


@pytest.mark.parametrize(
    ("route", "cell", "recompute"),
    [("resident", "lstm", False), ("stepwise", "gru", True)],
)
def test_packed_input(route, cell, recompute):
    """Its batch sizes are the host's own; nothing else is read."""
    dtype = ROUTES[route]
    module = build(cell, 2, 1, dtype, recompute=recompute)
    sequences = [torch.randn(n, 3, dtype=dtype) for n in (2, 1, 3, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    hx = states_for(module, B)

    def run():
        output, states = module(packed, hx)
        results = [output.data, *leaves(states)]
        sources = list(module.parameters())
        return [*results, *torch.autograd.grad([r.sum() for r in results], sources)]

    run_blind(run, packed.batch_sizes)


@pytest.mark.parametrize("form", ["states", "batch first", "no gradients", "autocast"])
def test_other_ways_to_call(form):
    dtype = ROUTES["resident"]
    module = build("lstm", 1, 1, dtype, batch_first=form == "batch first")
    x, options = torch.randn(T, B, 3, dtype=dtype), dict(CALLS["lengths and reset"])
    if form == "batch first":
        x, options["reset"] = x.transpose(0, 1), options["reset"].t()

    def run():
        if form == "states":
            states = module.states(x, gates=True, **options)
            output = states.output + sum(states.gates[0][0].values()).sum(-1, keepdim=True)
        else:
            output = module(x, **options)[0]
        if form == "no gradients":
            return [output]
        return [output, *torch.autograd.grad(output, [*module.parameters()], output)]

    cast = torch.autocast("cpu", torch.float16, enabled=form == "autocast")
    with cast, torch.set_grad_enabled(form != "no gradients"):
        run_blind(run)


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


WHERE = {
    "before": (functional, "dropout_masks"),
    "forward": (stack, "layout_of"),
    "backward": (stack, "backward"),
}


@pytest.mark.parametrize("look", PLANTED)
def test_a_planted_look_is_found(look, monkeypatch):
    where = list(WHERE)[len(look) % len(WHERE)]
    real = getattr(*WHERE[where])

    def curious(input, *args):
        PLANTED[look](getattr(input, "input", input).detach())
        return real(input, *args)

    monkeypatch.setattr(*WHERE[where], curious)
    module, x = build("rnn_tanh", dtype=torch.float32), torch.randn(T, B, 3, requires_grad=True)
    with fusedrnn.use_backend("triton"):
        module(x)[0].sum().backward()
        with pytest.raises(LookedError), blind():
            module(x)[0].sum().backward()
