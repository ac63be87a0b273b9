"""The equality gate: a provider is timed only if its results are right.

All providers get the same weights, input, initial states and cotangents. Every output, final state
and gradient must be within the error budget of ``fusedrnn.testing``, against torch.nn in fp64.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fusedrnn.testing import error_budget, run_module

from .measure import BenchmarkCase
from .providers import PROVIDERS, TORCH


class _Padded(nn.Module):
    """Gives every provider a padded input and output, so that all results can be compared."""

    def __init__(self, rnn: Any, case: BenchmarkCase, provider: str):
        super().__init__()
        self.rnn, self.case, self.provider = rnn, case, provider

    def forward(self, x: Tensor, hx: Any) -> Any:
        if PROVIDERS[self.provider].step:
            stream: Any = self.rnn.stream(batch_size=len(x), hx=hx)
            return torch.stack([stream(x_t) for x_t in x.unbind(1)], 1), ()
        input, options = self.case.inputs(self.provider, x)
        output, final = self.rnn(input, hx, **options)
        if isinstance(output, PackedSequence):
            output, _ = pad_packed_sequence(output, batch_first=True)
        return output, final


class Gate:
    """The results of torch.nn for a case, in fp64 and in the tested dtype."""

    def __init__(self, case: BenchmarkCase):
        self.case, workload = case.shortened(), case.workload
        generator, directions = torch.Generator().manual_seed(1), 1 + workload.bidirectional
        batch, steps = self.case.x.shape[:2]
        states = [(workload.layers * directions, batch, workload.H)] * (1 + (case.cell == "lstm"))
        shapes = [*states, (batch, steps, directions * workload.H), *states]
        tensors = [torch.randn(shape, generator=generator).to(case.x) for shape in shapes]
        self.hx, self.cotangents = tensors[: len(states)], tensors[len(states) :]
        self.truth = self._run(TORCH, torch.float64)
        self.reference = self._run(TORCH, self.case.x.dtype)
        self.eps = 2**-11 if self.case.precision() == "tf32" else None  # 10 bits of fraction

    def judge(self, provider: str, backward: bool = True) -> dict[str, Any]:
        """Compares all that a provider returns; the note names the tensors that are wrong.

        Without ``backward`` outputs and final states are compared, in evaluation mode.
        """
        got = self._run(provider, self.case.x.dtype, backward and not PROVIDERS[provider].step)
        reference, truth, eps = self.reference, self.truth, self.eps
        budgets = [error_budget(n, got[n], reference[n], truth[n], eps=eps) for n in got]
        shares = [(b.max_err, b.allowed) for b in budgets]
        shares += [(b.rms, b.rms_allowed) for b in budgets]
        wrong = [str(b) for b in budgets if not b.ok]
        return {
            "gate": "red" if wrong else "ok",
            "share": max(error / (allowed or 1e-300) for error, allowed in shares),
            "error": max(b.max_err for b in budgets if b.name in ("output", "h_n", "c_n")),
            "note": "; ".join(wrong),
        }

    def _run(self, provider: str, dtype: torch.dtype, backward: bool = True) -> dict[str, Tensor]:
        # Dropout draws other numbers in fp64 and on a GPU, so the gate has none.
        rnn = self.case.rnn(provider, dtype, dropout=0.0).train(backward)
        hx, cotangents = ([t.to(dtype) for t in ts] for ts in (self.hx, self.cotangents))
        with PROVIDERS[provider].context(), torch.set_grad_enabled(backward):
            return run_module(
                _Padded(rnn, self.case, provider),
                self.case.x.to(dtype),
                hx[0] if len(hx) == 1 else (hx[0], hx[1]),
                cotangents if backward else None,
            )
