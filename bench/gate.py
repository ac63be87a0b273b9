"""The equality gate: no provider's speed is printed before its numbers are right.

Same weights, inputs, initial states and cotangents; every output, final state and gradient (of
the input, the initial states and all parameters) within the error budget of
``fusedrnn.testing``: truth is ``torch.nn`` in fp64, the yardstick ``torch.nn`` in the tested dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.dispatch import precision
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
        self.reference = self._run(TORCH, data.dtype)

    def judge(self, provider: str) -> Verdict:
        """Runs a provider and compares all it returns.

        Raises:
            NotImplementedError: the provider refuses the workload.
        """
        got = self._run(provider, self.input.data.dtype)
        tf32 = self.input.data.is_cuda and got["output"].dtype == torch.float32
        eps = 2**-11 if tf32 and precision() == "tf32" else PROVIDERS[provider].eps
        budgets = tuple(
            error_budget(name, got[name], self.reference[name], self.truth[name], eps=eps)
            for name in (self.truth if PROVIDERS[provider].backward else got)
        )
        error = max(b.max_err for b in budgets if b.name in OUTPUTS)
        return Verdict(all(b.ok for b in budgets), max(map(_share, budgets)), budgets, error)

    def _run(self, provider: str, dtype: torch.dtype) -> dict[str, Tensor]:
        # Dropout draws other numbers in fp64, and other ones again on a GPU: the gate has none.
        rnn = build(provider, self.cell, self.workload, dropout=0.0)
        rnn.load_state_dict(self.weights)
        rnn = rnn.to(device=self.input.data.device, dtype=dtype)
        module = Flat(rnn, self.input) if isinstance(self.input, PackedSequence) else rnn
        hx = tuple(state.to(dtype) for state in self.hx)
        with PROVIDERS[provider].context():
            return run_module(
                module,
                self.input.data.to(dtype),
                hx if len(hx) == 2 else hx[0],
                [cotangent.to(dtype) for cotangent in self.cotangents]
                if PROVIDERS[provider].backward
                else None,
            )


def _share(budget: Budget) -> float:
    parts = ((budget.max_err, budget.allowed), (budget.rms, budget.rms_allowed))
    return max(_ratio(error, allowed) for error, allowed in parts)


def _ratio(error: float, allowed: float) -> float:
    if allowed:
        return error / allowed
    return float("inf") if error else 0.0
