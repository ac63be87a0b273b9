"""Backward by the loop, a segment at a time: the same gradients whatever the segments are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import loop, segments, stack

T, B, I, H = 13, 5, 11, 4
LENGTHS = torch.tensor([13, 2, 7, 7, 4])


def gradients(module, input, wanted, **options):
    """Of a sum with weights that differ, of what is wanted, by the loop."""
    generator = torch.Generator().manual_seed(3)
    module.zero_grad()
    given = input() if callable(input) else input
    with fusedrnn.use_backend("torch"):
        torch.manual_seed(5)  # of dropout
        output, hx = module(given, **options)
    output = getattr(output, "data", output)
    states = hx if isinstance(hx, tuple) else (hx,)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (output, *states))
    return torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_same(module, input, wanted, monkeypatch, **options):
    """In segments of two or three steps as in one."""
    whole = gradients(module, input, wanted, **options)
    taken = []
    take = segments._Gradients.take

    def counting(self, segment):
        taken.append(segment.part.total)
        take(self, segment)

    monkeypatch.setattr(loop, "_rows_of_segment", lambda *_: 12)
    monkeypatch.setattr(segments._Gradients, "take", counting)
    parts = gradients(module, input, wanted, **options)
    assert len(taken) >= 3 * module.num_layers
    assert max(taken) <= 12
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for weight, grad in zip(module.parameters(), parts, strict=False):
        assert grad.shape != weight.shape or grad.is_contiguous()


@pytest.mark.parametrize("kind", ["dense", "batch_first", "lengths", "packed", "reset"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {}),
        ("GRU", {"bidirectional": True}),
        ("GRU", {"reset_after": False, "num_layers": 2, "dropout": 0.4}),
        ("RNN", {"num_layers": 2, "bidirectional": True, "bias": False}),
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_segments(name, options, kind, monkeypatch):
    torch.manual_seed(0)
    module = getattr(fusedrnn, name)(I, H, **options, batch_first=kind == "batch_first").double()
    input = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    wanted, given, more = [*module.parameters(), input], input, {}
    if kind == "batch_first":
        wanted[-1] = given = torch.randn(B, T, I, dtype=torch.float64, requires_grad=True)
    elif kind == "lengths":
        more["lengths"] = LENGTHS
    elif kind == "reset":
        more["reset"] = torch.rand(T, B) < 0.3
    elif kind == "packed":
        given = partial(pack_padded_sequence, input, LENGTHS, enforce_sorted=False)
    assert_same(module, given, wanted, monkeypatch, **more)


@pytest.mark.parametrize("of", ["weights", "input"])
def test_what_nobody_asks_for_is_not_made(of, monkeypatch):
    module = fusedrnn.GRU(I, H, num_layers=2).double()
    input = torch.randn(T, B, I, dtype=torch.float64)
    if of == "weights":
        wanted = list(module.parameters())
    else:
        module.requires_grad_(False)
        wanted = [input.requires_grad_()]
    refused = "add_product" if of == "weights" else "weight_grads"
    calls, real = [], getattr(segments, refused)
    monkeypatch.setattr(segments, refused, lambda *args: calls.append(1) or real(*args))
    assert_same(module, input, wanted, monkeypatch, lengths=LENGTHS)
    # dx of the upper layer is the gradient that reaches the lower one: once as a whole, and thrice.
    assert len(calls) == (4 if of == "weights" else 0)


def test_tokens_whose_product_is_made_already(monkeypatch):
    module = fusedrnn.TokenGRU(20, I, H, bidirectional=True).double()
    tokens = torch.randint(20, (T, B))
    assert_same(module, tokens, list(module.parameters()), monkeypatch)


def test_no_step_at_all():
    module = fusedrnn.GRU(I, H)
    input = torch.randn(T, B, I, requires_grad=True)
    h_0 = torch.randn(1, B, H)
    with fusedrnn.use_backend("torch"):
        _, h_n = module(input, h_0, lengths=torch.zeros(B, dtype=torch.long))
    grads = torch.autograd.grad(h_n.sum(), [*module.parameters(), input])
    assert all((grad == 0).all() for grad in grads)


class Largest(TorchDispatchMode):
    """Numbers in the largest new result."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            known = {x.untyped_storage().data_ptr() for x in given}
            if result.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_gradients_of_gates_are_never_there_of_all_steps(name, monkeypatch):
    steps, H = 6000, 64
    module, largest = getattr(fusedrnn, name)(2, H), Largest()
    input = torch.randn(steps, 2, 2, requires_grad=True)
    backward = stack.backward_by_segment

    def watched(*args):
        with largest:
            return backward(*args)

    monkeypatch.setattr(stack, "backward_by_segment", watched)
    with fusedrnn.use_backend("torch"):
        output, _ = module(input)
    output.sum().backward()
    assert largest.numbers == loop.SEGMENT  # of 4 * 6000 * 2 * 64, three times as many
