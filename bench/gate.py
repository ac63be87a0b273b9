"""The equality gate: no provider's speed is printed before its numbers are right.

Same weights, inputs, initial states and cotangents; every output, final state and gradient (of
the input, the initial states and all parameters) within the error budget of
``fusedrnn.testing``: truth is ``torch.nn`` in fp64, the yardstick ``torch.nn`` in the tested dtype,
and in fp32 on CUDA in the precision of who is judged: who multiplies in ieee is not given tf32's
errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fusedrnn.testing import Budget, error_budget, run_module

from .cases import Workload
from .models import Input
from .providers import PROVIDERS, TORCH, build

#: What a call returns, as ``run_module`` names it.
OUTPUTS = ("output", "h_n", "c_n")


class Verdict(NamedTuple):
    """``share`` is the largest error as a part of what the budget allows: above 1 is red.

    ``error`` is the largest absolute one of output and final states, against torch.nn in fp64.
    """

    ok: bool
    share: float
    budgets: tuple[Budget, ...]
    error: float = 0.0

    @property
    def failures(self) -> list[str]:
        return [str(budget) for budget in self.budgets if not budget.ok]


@contextmanager
def torch_rnns_in(precision: str) -> Iterator[None]:
    """Sets torch's switch for RNNs, which cuDNN alone reads, and puts it back.

    Args:
        precision: of ``Provider.precision``. cuDNN has no tf32x3, and ieee is as exact; fp16 has as
            many bits as tf32. A dtype's own name changes nothing.
    """
    switch = {"ieee": "ieee", "tf32x3": "ieee", "tf32": "tf32", "fp16": "tf32"}.get(precision)
    rnns: Any = torch.backends.cudnn.rnn
    before = rnns.fp32_precision
    rnns.fp32_precision = before if switch is None else switch
    try:
        yield
    finally:
        rnns.fp32_precision = before


class Flat(nn.Module):
    """Lets an RNN take the data of a packed sequence as a plain tensor, and return it so."""

    def __init__(self, rnn: nn.Module, layout: PackedSequence):
        super().__init__()
        self.rnn, self.layout = rnn, layout

    def forward(self, data: Tensor, hx):
        output, final = self.rnn(self.layout._replace(data=data), hx)
        return output.data, final


class Gate:
    """Holds the truth and torch's own result for one workload and cell, and judges providers."""

    def __init__(self, workload: Workload, cell: str, weights: dict[str, Tensor], input: Input):
        """``weights`` is a state_dict of the RNN; ``input`` is batch-first or packed."""
        self.workload, self.cell, self.weights, self.input = workload, cell, weights, input
        data = input.data
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator)
            return drawn.to(device=data.device, dtype=data.dtype)

        directions = 2 if workload.bidirectional else 1
        batch = int(input.batch_sizes[0]) if isinstance(input, PackedSequence) else len(input)
        states = 2 if cell == "lstm" else 1
        shape = (workload.layers * directions, batch, workload.H)
        self.hx = tuple(normal(*shape) for _ in range(states))
        self.cotangents = (
            normal(*data.shape[:-1], directions * workload.H),
            *(normal(*shape) for _ in range(states)),
        )
        self.truth = self._run(TORCH, torch.float64)
        self.references: dict[str, dict[str, Tensor]] = {}

    def judge(self, provider: str, *, inference: bool = False) -> Verdict:
        """Runs a provider and compares all it returns.

        Args:
            provider: a name of ``PROVIDERS``.
            inference: in ``eval()`` and without gradients: outputs and final states alone.

        Raises:
            NotImplementedError: the provider refuses the workload.
        """
        backward = PROVIDERS[provider].backward and not inference
        got = self._run(provider, self.input.data.dtype, backward)
        kind = self.input.data.dtype, self.input.data.device, self.cell
        reference = self._reference(PROVIDERS[provider].precision(*kind))
        eps = PROVIDERS[provider].eps(*kind)
        return verdict(got, reference, self.truth, self.truth if backward else got, eps)

    def _reference(self, precision: str) -> dict[str, Tensor]:
        """torch.nn in the tested dtype, and of fp32 in that precision or the nearest it has."""
        if precision not in self.references:
            with torch_rnns_in(precision):
                self.references[precision] = self._run(TORCH, self.input.data.dtype)
        return self.references[precision]

    def _run(self, provider: str, dtype: torch.dtype, backward: bool = True) -> dict[str, Tensor]:
        # Dropout draws other numbers in fp64, and other ones again on a GPU: the gate has none.
        rnn = build(provider, self.cell, self.workload, dropout=0.0)
        rnn.load_state_dict(self.weights)
        rnn = rnn.to(device=self.input.data.device, dtype=dtype).train(backward)
        module = Flat(rnn, self.input) if isinstance(self.input, PackedSequence) else rnn
        hx = tuple(state.to(dtype) for state in self.hx)
        with PROVIDERS[provider].context(), torch.set_grad_enabled(backward):
            return run_module(
                module,
                self.input.data.to(dtype),
                hx if len(hx) == 2 else hx[0],
                [cotangent.to(dtype) for cotangent in self.cotangents] if backward else None,
            )


def outcome(
    module: nn.Module, input: Any, leaves: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """What a call without initial states gives: all that ``run_module`` does, of any input.

    Args:
        module: an RNN.
        input: of whatever kind it takes; a packed output is padded.
        leaves: what is differentiated, by name.
        **options: of the call.

    Returns:
        Output, final states and the gradients of ``leaves``, and output and final states of a call
        without gradients in ``eval()``, which may run by another way.
    """
    named = _outputs(module.train(), input, options)
    loss = torch.stack([tensor.sin().sum() for tensor in named.values()]).sum()
    grads = torch.autograd.grad(loss, [*leaves.values()])
    with torch.no_grad():
        inferred = _outputs(module.eval(), input, options)
    named |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    named |= {f"{name} in eval()": tensor for name, tensor in inferred.items()}
    return {name: tensor.detach() for name, tensor in named.items()}


def _outputs(module: nn.Module, input: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    output, final = module(input, **options)
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output)
    states = (final,) if isinstance(final, Tensor) else final
    return dict(zip(OUTPUTS, (output, *states), strict=False))


def verdict(
    got: dict[str, Tensor],
    reference: dict[str, Tensor],
    truth: dict[str, Tensor],
    names: Iterable[str],
    eps: float | None = None,
) -> Verdict:
    """Compares tensors by name, each within its error budget."""
    budgets = tuple(error_budget(n, got[n], reference[n], truth[n], eps=eps) for n in names)
    error = max((b.max_err for b in budgets if b.name in OUTPUTS), default=0.0)
    return Verdict(all(b.ok for b in budgets), max(map(_share, budgets)), budgets, error)


def _share(budget: Budget) -> float:
    parts = ((budget.max_err, budget.allowed), (budget.rms, budget.rms_allowed))
    return max(_ratio(error, allowed) for error, allowed in parts)


def _ratio(error: float, allowed: float) -> float:
    if allowed:
        return error / allowed
    return float("inf") if error else 0.0
