"""Dropout between layers is torch's: its generator, its masks, on every backend.

On `auto` the CPU runs torch's operator; the loop and the kernels draw their masks themselves.
"""

import pytest
import torch
from pairs import LENGTHS, NAMES, RESET, assert_close, batch, build, gradients, leaves, packed
from torch import Tensor, nn

import fusedrnn

BACKENDS = ("auto", "torch", "triton")
FORMS = {
    "batch first": ({}, {"batch_first": True}),
    "lengths and reset": ({"lengths": LENGTHS, "reset": RESET}, {}),
    "packed": ({}, {}),
}


def train(module: nn.Module, x, **options) -> list[Tensor]:
    """Returns results and all gradients of one step of training."""
    results = leaves(module(x, **options))
    return results + gradients(results, list(module.parameters()))


@pytest.mark.parametrize(
    ("backend", "name", "p"),
    [*((b, name, 0.4) for b in BACKENDS[:2] for name in NAMES), ("triton", "GRU", 0.4),
     ("torch", "LSTM", 1.0)],
)  # fmt: skip
def test_a_restored_generator_gives_torchs_masks(backend, name, p):
    """By seed and by state: twice the same bit for bit, and nn.LSTM's numbers with that seed."""
    theirs, ours = build(name, num_layers=3, bidirectional=backend != "triton", dropout=p)
    x = batch()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    want, following = train(theirs, x), torch.rand(3)
    with fusedrnn.use_backend(backend):
        torch.manual_seed(11)
        first = train(ours, x)
        assert torch.equal(torch.rand(3), following)
        torch.set_rng_state(state)
        second, other = train(ours, x), train(ours, x)
    assert all(map(torch.equal, first, second))
    assert_close(first, want)
    assert p == 1 or not torch.allclose(other[0], want[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_draws_alike_on_every_backend(form):
    """Nothing raises under ``torch.use_deterministic_algorithms``, and the bits repeat."""
    given, options = FORMS[form]
    x = packed() if form == "packed" else batch()
    x = x.transpose(0, 1) if "batch_first" in options else x
    _, ours = build("LSTM", num_layers=2, dropout=0.4, **options)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for backend in ("torch", *BACKENDS):
            torch.manual_seed(3)
            with fusedrnn.use_backend(backend):
                found.append([*train(ours, x, **given), torch.rand(3)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found[2], found[1])
    assert_close(found[3], found[1])
    assert all(map(torch.equal, found[0], found[2]))
