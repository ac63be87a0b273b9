"""Parameters that another process shares, that are swapped for others, and that are normalised."""

from __future__ import annotations

import copy

import pytest
import torch
from test_weights import B, T, assert_close, backends, batch, build, loss_of, raw, train
from torch.nn.utils import parametrizations

import fusedrnn


def other_process(module, x, output, grads):
    """Reads the weights, runs forward and backward, and takes a step with them."""
    with fusedrnn.use_backend("torch"):
        results = module(x)
        loss_of(results).backward()
    output.copy_(results[0].detach())
    with torch.no_grad():
        for grad, p in zip(grads, module.parameters(), strict=True):
            grad.copy_(p.grad)
            p.sub_(0.1 * p.grad)


def test_a_second_process_reads_and_writes_the_weights():
    """``share_memory``, as Hogwild trains: what each does the other sees, and no copy is made."""
    theirs, ours = build("torch", "LSTM")
    ours.share_memory()
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)  # after it was shared
    theirs.load_state_dict(ours.state_dict())
    x = batch()
    output = torch.zeros(T, B, 10, dtype=torch.float64).share_memory_()
    grads = [torch.zeros_like(p).share_memory_() for p in ours.parameters()]
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=other_process, args=(ours, x, output, grads))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    results = theirs(x)
    loss_of(results).backward()
    assert_close([output, *grads], [results[0], *(p.grad for p in theirs.parameters())])
    with torch.no_grad():
        for p in theirs.parameters():
            p.sub_(0.1 * p.grad)
    assert_close(ours.parameters(), theirs.parameters())
    with fusedrnn.use_backend("torch"):
        assert_close([ours(x)[0]], [theirs(x)[0]])


@backends
def test_swapped_tensors(backend):
    """``torch.utils.swap_tensors``: each Parameter stays the object and has the other's weights."""
    theirs, ours = build(backend)
    with fusedrnn.use_backend(backend):
        before = train(ours, 1)  # whatever may be kept is kept by now
        for p in ours.parameters():
            p.grad = None
        objects = list(ours.parameters())
        new = [torch.nn.Parameter(torch.randn_like(p)) for p in objects]
        values = [p.detach().clone() for p in new]
        for p, other in zip(objects, new, strict=True):
            torch.utils.swap_tensors(p, other)
        assert all(p is q for p, q in zip(ours.parameters(), objects, strict=True))
        assert_close(ours.parameters(), values, 0)
        theirs.load_state_dict(ours.state_dict())
        want = train(copy.deepcopy(theirs), 2)
        got = train(ours, 2)
    assert_close(got, want, 1e-10)
    assert not torch.equal(before[0], got[0])


@backends
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_spectral_norm_trains_as_torchs(backend, name):
    """Power iteration and all, beside torch.nn's module that is called with the same weights."""
    theirs, ours = build(backend, name)
    # nn.LSTM itself does not see a parametrization: its weights are handed to it at each call.
    twin = copy.deepcopy(ours)
    found = []
    for module in (twin, ours):
        torch.manual_seed(1)  # of the power iteration
        parametrizations.spectral_norm(module, "weight_hh_l0")
        is_truth = module is twin
        optimizer, seen = torch.optim.SGD(raw(module), lr=0.1), []
        for step in range(3):
            optimizer.zero_grad()
            if is_truth:
                weights = {n: getattr(module, n) for n in module._flat_weights_names}
                loss = loss_of(torch.func.functional_call(theirs, weights, (batch(step),)))
            else:
                with fusedrnn.use_backend(backend):
                    loss = loss_of(module(batch(step)))
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        state = module.state_dict()
        found.append([*seen, *(state[n] for n in sorted(state))])
    want, got = found
    assert_close(got, want, 1e-10)
    assert len({loss.item() for loss in got[:3]}) == 3
    # The power iteration of three steps is nearly there: what runs has norm one.
    with torch.no_grad():
        assert torch.linalg.matrix_norm(ours.weight_hh_l0, 2) == pytest.approx(1, rel=0.2)
