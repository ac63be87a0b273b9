"""The workspace and the functions of the protocol; ``test_cooperative.py`` runs it."""

import pytest
import torch
import triton.language as tl
from triton.experimental import gluon

from fusedrnn.kernels import exchange, launch


def test_a_workspace_of_a_call_has_a_counter_and_two_slots_for_each_group():
    like = torch.empty(0, dtype=torch.float16)
    (counters, slots), other = (launch.workspace(like, 2, 3, 8, 64) for _ in range(2))
    assert counters.shape == (2, 3)
    assert counters.dtype == torch.int32
    assert slots.shape == (2, 3, 2, 8, 64)
    assert slots.dtype == torch.float16
    assert not counters.any()
    assert not slots.any()
    assert counters.data_ptr() != other.counters.data_ptr()
    assert slots.data_ptr() != other.slots.data_ptr()


@gluon.jit
def protocol_kernel(counter_ptr, seen_ptr, patience, TARGET: tl.constexpr, OTHER: tl.constexpr):
    exchange.publish(counter_ptr)
    exchange.publish(counter_ptr)
    exchange.wait(counter_ptr, TARGET, patience)
    exchange.wait(counter_ptr, TARGET, patience, counter_ptr + 1, OTHER)
    tl.store(seen_ptr, tl.load(counter_ptr))


def test_publications_count_and_a_wait_for_them_ends(device):
    counters, seen = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    counters, seen = counters.to(device), seen.to(device)
    protocol_kernel[1,](counters, seen, 5, 2, 1)
    assert seen.item() == 2


@pytest.mark.parametrize("targets", [(3, 1), (2, 2)], ids=["its counter", "the other counter"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends a CUDA context")
def test_a_wait_in_vain_ends(targets, monkeypatch):
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    counters = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(Exception, match="waited in vain"):
        protocol_kernel[1,](counters, torch.zeros(1, dtype=torch.int32), 5, *targets)
