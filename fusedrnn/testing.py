"""The error budget, and a way to run an RNN for comparison; for tests and bench.

A fixed tolerance is a guess: ``atol=0.1`` accepts an LSTM without ``b_hh``. The budget instead
allows four times the error that torch itself makes in the same dtype against the same fp64 truth.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

FACTOR = 4.0  # the allowed error, in units of torch's own maximal error against fp64
FLOOR_EPS = 8.0  # the least error that is allowed, in units of eps * rms(truth)
RMS_FP32, RMS_FP64 = 5e-6, 1e-12  # the largest relative RMS errors


class Budget(NamedTuple):
    """The verdict on one tensor. Errors are absolute, against the fp64 truth; rms is relative."""

    name: str
    ok: bool
    max_err: float
    allowed: float
    rms: float
    rms_allowed: float
    ref_err: float
    where: str

    def __str__(self) -> str:
        verdict = "within" if self.ok else "OVER"
        return (
            f"{self.name}: {verdict} budget, max error {self.max_err:.3g} of {self.allowed:.3g} "
            f"(torch's own {self.ref_err:.3g}), relative rms {self.rms:.3g} of "
            f"{self.rms_allowed:.3g}, worst at {self.where}"
        )


def error_budget(
    name: str, got: Tensor, ref: Tensor, truth: Tensor, *, eps: float | None = None
) -> Budget:
    """Compares ``got`` with torch's result from the same numbers in the same dtype.

    The budget is ``max|got - truth| <= 4 max|ref - truth| + 8 eps rms(truth)``, and a relative RMS
    error of 5e-6 in fp32, 1e-12 in fp64, and four times torch's plus eps in coarser arithmetic.
    ``truth`` is the fp64 result; ``eps`` the unit roundoff if it is coarser than the dtype's, as in
    tf32 (2**-11).

    Raises:
        ValueError: the shapes differ.
    """
    if not got.shape == ref.shape == truth.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (got, ref, truth))
        raise ValueError(f"{name}: got, ref and truth have shapes {shapes}; they must be equal")
    if got.numel() == 0:
        return Budget(name, True, 0.0, 0.0, 0.0, 0.0, 0.0, "no element")
    eps = torch.finfo(ref.dtype).eps if eps is None else eps
    got, ref, truth = (tensor.detach().double().cpu() for tensor in (got, ref, truth))
    error, ref_error = (got - truth).abs(), (ref - truth).abs()
    scale, rms, ref_rms = (x.square().mean().sqrt().item() for x in (truth, error, ref_error))
    size = max(scale, torch.finfo(torch.float64).tiny)  # a truth of zeros allows no error
    max_err, ref_err, rms = error.max().item(), ref_error.max().item(), rms / size
    allowed = FACTOR * ref_err + FLOOR_EPS * eps * scale
    rms_allowed = FACTOR * ref_rms / size + eps
    if eps <= torch.finfo(torch.float32).eps:
        rms_allowed = RMS_FP32 if eps > torch.finfo(torch.float64).eps else RMS_FP64
    ok = bool(error.isfinite().all()) and max_err <= allowed and rms <= rms_allowed
    worst = int(error.nan_to_num(nan=float("inf")).argmax())
    index = tuple(map(int, torch.unravel_index(torch.tensor(worst), error.shape)))
    where = f"{index}: {got.flatten()[worst].item():.9g} for {truth.flatten()[worst].item():.9g}"
    return Budget(name, ok, max_err, allowed, rms, rms_allowed, ref_err, where)


def assert_budget(*tensors: Any, **options: Any) -> None:
    """Raises ``AssertionError`` if ``error_budget`` of these arguments is exceeded."""
    budget = error_budget(*tensors, **options)
    if not budget.ok:
        raise AssertionError(str(budget))


def run_module(
    module: torch.nn.Module, input: Tensor, hx: Any = None, cotangents: Any = None
) -> dict[str, Tensor]:
    """Runs an RNN module and, given cotangents, its backward; returns every tensor by name.

    ``cotangents`` are the gradients of output, h_n and, for an LSTM, c_n. The names are ``output,
    h_n, c_n`` and ``d_input, d_h_0, d_c_0, d_<parameter>``; all tensors are detached.
    """
    is_leaf = cotangents is not None
    own = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(is_leaf), (input, hx))
    results = tree_leaves(module(*own))
    named = dict(zip(("output", "h_n", "c_n"), results, strict=False))
    if cotangents is not None:
        given = [tensor for tensor in tree_leaves(own) if tensor is not None]
        params = dict(module.named_parameters())
        grads = torch.autograd.grad(results, (*given, *params.values()), tuple(cotangents))
        names = "d_input", "d_h_0", "d_c_0"
        named |= zip((*names[: len(given)], *(f"d_{n}" for n in params)), grads, strict=True)
    return {name: tensor.detach() for name, tensor in named.items()}
