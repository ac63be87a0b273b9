"""The records of a call and of its stack, and what follows from their fields."""

import pytest
import torch
from test_dispatch import facts
from test_stack import config_of, inputs_of

from fusedrnn.records import Layers


def test_facts_that_follow_from_others():
    assert facts().columns == (16, 16)
    assert facts(proj_size=4).columns == (4, 16)
    assert facts(cell="gru").columns == (16,)
    assert facts().cast is None
    assert facts(autocast=torch.bfloat16, dtype=torch.float16).cast == torch.float16
    dropping = Layers(num_layers=2, dropout=0.5, training=True)
    assert facts()._replace(layers=dropping).drops_out
    for change in ({"num_layers": 1}, {"dropout": 0.0}, {"training": False}):
        assert not facts()._replace(layers=dropping._replace(**change)).drops_out


def test_recompute_needs_a_backward_and_something_saved():
    asked = facts(layers={"recompute": True})
    assert not asked.recompute
    assert asked._replace(needs_grad=True).recompute
    assert asked._replace(transformed=True).recompute
    assert not asked._replace(needs_grad=True, cell="rnn_tanh").recompute


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_inputs_are_cast_all_alike_and_only_where_they_differ(cell):
    inputs = inputs_of(config_of(cell))
    assert inputs.cast(None) is inputs
    half = inputs.cast(torch.float16)
    tensors = [half.input, half.h_0, *half.params, *([half.c_0] if cell == "lstm" else [])]
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert half.dropout_masks is inputs.dropout_masks
    assert half.cast(torch.float16).h_0 is half.h_0
