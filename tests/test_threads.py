"""Small products of steps are made in the calling thread, and nothing else is."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import threads

needs_mkl = pytest.mark.skipif(
    threads._switch() is None, reason="torch multiplies by another library than MKL here"
)


@pytest.fixture
def switched(monkeypatch):
    """What MKL was told, as by two threads, with its own answers; nothing was said to it before."""
    real, told = threads._switch(), []
    assert real is not None
    before = real(0)  # torch.set_num_threads tells it, too

    def switch(count: int) -> int:
        told.append(count)
        return real(count)

    monkeypatch.setattr(threads, "_switch", lambda: switch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    yield told
    real(before)


def run(cell: str, T: int, B: int, I: int, H: int, *, trains: bool = True, backend: str = "torch"):
    module = getattr(fusedrnn, cell)(I, H)
    with fusedrnn.use_backend(backend), torch.set_grad_enabled(trains):
        output, _ = module(torch.randn(T, B, I))
    if trains:
        output.sum().backward()


@needs_mkl
@pytest.mark.parametrize("cell", ["GRU", "RNN"])
def test_steps_of_the_loop_are_alone_both_ways(switched, cell):
    run(cell, 5, 16, 4, 8)
    assert switched == [1, 0, 1, 0]


@needs_mkl
def test_the_gradients_of_weights_are_not(switched, monkeypatch):
    from fusedrnn import segments

    real, found = segments.weight_grads, []
    monkeypatch.setattr(
        segments, "weight_grads", lambda *args: found.append(list(switched)) or real(*args)
    )
    run("GRU", 5, 6, 4, 8)
    assert found == [[1, 0, 1, 0]]


@needs_mkl
@pytest.mark.parametrize(
    ("T", "B", "H"),
    [(3, 16, 8), (5, 5, 8), (5, 33, 64), (5, 1, 256)],
    ids=["few steps", "tiny", "many rows", "wide"],
)
def test_where_it_would_not_pay_all_threads_multiply(switched, T, B, H):
    run("GRU", T, B, 4, H)
    assert switched == []


@needs_mkl
def test_torch_s_operator_is_alone_where_its_input_is_no_wider(switched):
    gru = {"trains": False, "backend": "aten"}
    run("GRU", 5, 6, 8, 8, **gru)
    assert switched == [1, 0]
    run("GRU", 5, 6, 9, 8, **gru)
    run("LSTM", 5, 6, 8, 8, **gru)
    assert switched == [1, 0]


@needs_mkl
def test_a_compiled_call_is_alone_too(switched):
    module, x = fusedrnn.GRU(8, 8).eval(), torch.randn(5, 6, 8)
    with torch.no_grad(), fusedrnn.use_backend("aten"):
        exported = torch.export.export(module, (x,)).module()
        del switched[:]
        torch.testing.assert_close(exported(x)[0], module(x)[0], rtol=0, atol=0)
    assert switched == [1, 0, 1, 0]


@needs_mkl
def test_packed_sequences_are_not(switched):
    packed = nn.utils.rnn.pack_sequence([torch.randn(6, 8)] * 8)
    with torch.no_grad(), fusedrnn.use_backend("aten"):
        fusedrnn.GRU(8, 8)(packed)
    assert switched == []


@needs_mkl
def test_a_known_call_is_alone_too(switched):
    module, x = fusedrnn.GRU(8, 8).eval(), torch.randn(5, 6, 8)
    with torch.no_grad(), fusedrnn.use_backend("aten"):
        first = module(x)[0]
        assert switched == [1, 0]
        assert torch.equal(module(x)[0], first)
    assert switched == [1, 0, 1, 0]


@needs_mkl
def test_one_thread_needs_no_switch(switched, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run("GRU", 5, 6, 4, 8)
    assert switched == []


@needs_mkl
def test_what_held_before_holds_again_also_after_an_error(switched):
    real = threads._switch()
    assert real(2) == 0
    try:
        with pytest.raises(KeyboardInterrupt), threads.alone(True):
            raise KeyboardInterrupt
        assert switched == [2, 1, 2]
        there: list[int] = []
        other = threading.Thread(target=lambda: there.append(real(0)))
        other.start()
        other.join()
        assert there == [0], "another thread was switched"
    finally:
        assert real(0) == 2


def test_without_mkl_nothing_is_switched(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert threads._switch.__wrapped__() is None
    monkeypatch.setattr(threads, "_switch", threads._switch.__wrapped__)
    assert threads.alone(True) is threads._AS_IT_IS


@needs_mkl
def test_results_are_torch_s(switched):
    theirs = nn.GRU(4, 8)
    ours = fusedrnn.GRU(4, 8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 16, 4)
    with fusedrnn.use_backend("torch"):
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert switched
