"""Derivatives of second order through modules as they are used: training steps, carried states.

Of a single call they are in `test_kernels.py` and `test_lengths.py`. The truth is torch.nn's, in
fp64.
"""

from __future__ import annotations

import pytest
import test_modules_inputs as inputs
import torch
from test_modules_inputs import leaves, states_for
from test_weights import B, assert_close, backends, batch, build, loss_of, raw, routes
from torch import nn

import fusedrnn


def adapted(module, x, hx, steps=2):
    """Weights after SGD steps on one task, as differentiable functions of the weights before."""
    weights = dict(module.named_parameters())
    for _ in range(steps):
        loss = loss_of(torch.func.functional_call(module, weights, (x, hx)))
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
    return weights


@routes
def test_gradients_through_training_steps(backend, name):
    """Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400), of second order."""
    theirs, ours = build(backend, name)
    hx, found = states_for(ours, B), []
    for module in (theirs, ours):
        given = [h.clone().requires_grad_() for h in leaves(hx)]
        state = tuple(given) if len(given) == 2 else given[0]
        with fusedrnn.use_backend(backend):
            weights = adapted(module, batch(1), state)
            loss = loss_of(torch.func.functional_call(module, weights, (batch(2),)))
        found.append(torch.autograd.grad(loss, [*module.parameters(), *given]))
    assert_close(found[1], found[0], 1e-10)


def carried(module, x):
    """The state of one call enters the next, with the same weights."""
    _, hx = module(x)
    return module(x.flip(0), hx)


def encoded(module, x):
    """The first state is a function of the input."""
    h = nn.functional.pad(x.mean(0), (0, 2)).expand(
        module.num_layers * 2**module.bidirectional, B, 5
    )
    return module(x, (h, h.sin()) if isinstance(module, (nn.LSTM, fusedrnn.LSTM)) else h)


def tied(module, x):
    """One parameter is two arguments of one call."""
    module.bias_hh_l0 = module.bias_ih_l0
    return module(x)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("compose", [carried, encoded, tied])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@backends
def test_derivatives_where_one_argument_depends_on_another(backend, name, compose, create_graph):
    """What reaches a weight through hx or the input is counted once, at every order."""
    found = []
    for module in inputs.build(name):
        x = batch().requires_grad_()
        with fusedrnn.use_backend(backend):
            loss = loss_of(compose(module, x))
            sources = [x, *raw(module)]
            grads = torch.autograd.grad(loss, sources, create_graph=create_graph)
        if create_graph:
            penalty = sum(g.square().sum() for g in grads)
            grads = [*grads, *torch.autograd.grad(penalty, sources)]
        found.append(grads)
    assert_close(found[1], found[0], 1e-10)
