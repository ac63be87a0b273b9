"""The workspace and the two functions of the protocol; ``test_cooperative.py`` runs it."""

import pytest
import torch
import triton
import triton.language as tl

from fusedrnn.kernels import exchange


def test_a_workspace_has_a_counter_for_each_group_and_slots_where_needed():
    like = torch.empty(0, dtype=torch.float16)
    plain = exchange.workspace("lstm", like, 2, 3, 40, 64)
    assert plain.counters.shape == (2, 3)
    assert plain.counters.dtype == torch.int32
    assert not plain.counters.any()
    assert plain.slots is None
    other = exchange.workspace("gru_reset_before", like, 2, 3, 40, 64)
    assert other.slots.shape == (2, 1, 40, 64)
    assert other.slots.dtype == torch.float16


def test_calls_share_no_workspace():
    like = torch.empty(0)
    one, two = (exchange.workspace("lstm", like, 1, 1, 2, 8) for _ in range(2))
    assert one.counters.data_ptr() != two.counters.data_ptr()


@triton.jit
def protocol_kernel(counter_ptr, seen_ptr, patience, TARGET: tl.constexpr):
    exchange.publish(counter_ptr)
    exchange.publish(counter_ptr)
    exchange.wait(counter_ptr, TARGET, patience)
    tl.store(seen_ptr, tl.load(counter_ptr))


def test_a_publication_counts_and_a_wait_for_it_ends(device):
    counter, seen = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
    protocol_kernel[1,](counter, seen, 5, 2)
    assert seen.item() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends a CUDA context")
def test_a_wait_in_vain_ends(monkeypatch):
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    counter, seen = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    with pytest.raises(Exception, match="waited in vain"):
        protocol_kernel[1,](counter, seen, 5, 3)
