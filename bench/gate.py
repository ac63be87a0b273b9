"""The equality gate: a provider is timed only if its results are right.

All providers get the same weights, input, initial states and cotangents. Every output, final state
and gradient must be within the error budget of ``fusedrnn.testing``, against torch.nn in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fusedrnn.testing import Budget, error_budget, run_module

from .measure import BenchmarkCase
from .providers import PROVIDERS, TORCH

#: Unit roundoff where fp32 is multiplied with 10 bits of fraction.
EPS = {"tf32": 2**-11}


class Verdict(NamedTuple):
    """The comparison of all tensors of a provider.

    ``share`` is the largest error divided by what is allowed. ``error`` is the largest absolute
    error of output and final states.
    """

    ok: bool
    share: float
    budgets: tuple[Budget, ...]
    error: float

    @property
    def failures(self) -> list[str]:
        return [str(budget) for budget in self.budgets if not budget.ok]


@contextmanager
def cudnn_in(precision: str) -> Iterator[None]:
    """Makes torch.nn multiply fp32 in a precision, on CUDA; cuDNN has ieee and tf32."""
    rnns: Any = torch.backends.cudnn.rnn
    before = rnns.fp32_precision
    if precision:
        rnns.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        rnns.fp32_precision = before


class _Padded(nn.Module):
    """Gives every provider a padded input and output, so that all results can be compared."""

    def __init__(self, rnn: nn.Module, case: BenchmarkCase, provider: str):
        super().__init__()
        self.rnn, self.case, self.provider = rnn, case, provider

    def forward(self, x: Tensor, hx: Any) -> Any:
        if PROVIDERS[self.provider].step:
            stream = self.rnn.stream(batch_size=len(x), hx=hx)
            return torch.stack([stream(x_t) for x_t in x.unbind(1)], 1), ()
        input, options = self.case.given(self.provider, x)
        output, final = self.rnn(input, hx, **options)
        if isinstance(output, PackedSequence):
            output, _ = pad_packed_sequence(output, batch_first=True)
        return output, final


class Gate:
    """The results of torch.nn for a case, in fp64 and in the tested dtype."""

    def __init__(self, case: BenchmarkCase):
        self.case = case.shortened()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.x)

        workload = case.workload
        directions = 1 + workload.bidirectional
        batch, steps = self.case.x.shape[:2]
        states = [(workload.layers * directions, batch, workload.H)] * (1 + (case.cell == "lstm"))
        self.hx = tuple(normal(*shape) for shape in states)
        output = (batch, steps, directions * workload.H)
        self.cotangents = [normal(*shape) for shape in (output, *states)]
        self.truth = self._run(TORCH, torch.float64)
        self.references: dict[str, dict[str, Tensor]] = {}

    def judge(self, provider: str, precision: str = "", backward: bool = True) -> Verdict:
        """Compares all that a provider returns.

        Args:
            provider: a name of ``PROVIDERS``.
            precision: how it multiplies fp32 on CUDA; ``""`` for other dtypes and on the CPU.
            backward: False compares outputs and final states in evaluation mode.

        Raises:
            NotImplementedError: the provider does not support the case.
        """
        dtype = self.case.x.dtype
        got = self._run(provider, dtype, backward and not PROVIDERS[provider].step)
        if precision not in self.references:
            with cudnn_in(precision):
                self.references[precision] = self._run(TORCH, dtype)
        reference, eps = self.references[precision], EPS.get(precision)
        budgets = tuple(
            error_budget(name, got[name], reference[name], self.truth[name], eps=eps)
            for name in got
        )
        error = max(b.max_err for b in budgets if b.name in ("output", "h_n", "c_n"))
        return Verdict(all(b.ok for b in budgets), max(map(_share, budgets)), budgets, error)

    def _run(self, provider: str, dtype: torch.dtype, backward: bool = True) -> dict[str, Tensor]:
        # Dropout draws other numbers in fp64 and on a GPU, so the gate has none.
        rnn = self.case.rnn(provider, dtype, dropout=0.0).train(backward)
        module = _Padded(rnn, self.case, provider)
        hx = tuple(state.to(dtype) for state in self.hx)
        cotangents = [tensor.to(dtype) for tensor in self.cotangents] if backward else None
        with PROVIDERS[provider].context(), torch.set_grad_enabled(backward):
            given = hx if len(hx) == 2 else hx[0]
            return run_module(module, self.case.x.to(dtype), given, cotangents)


def _share(budget: Budget) -> float:
    pairs = ((budget.max_err, budget.allowed), (budget.rms, budget.rms_allowed))
    return max(error / (allowed or 1e-300) for error, allowed in pairs)
