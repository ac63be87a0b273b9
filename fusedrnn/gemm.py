"""The products over all rows of a layer at once, each in the form that is fastest where it runs.

On CUDA one call of cuBLAS is that. On the CPU torch hands products to MKL, whose time depends on
which side is which, and whose sums run through all rows one after the other. Figures are of fp32
and two threads, AMD EPYC with AVX-512, torch 2.13, each product timed once by itself.

Axes: R rows, K columns that are summed over, M and N columns of a result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: A sum over rows is one of so many parts, each of at least so many rows, as long as the parts'
#: results take no more than so many numbers.
_PARTS, _ROWS_OF_A_PART, _ROOM_OF_PARTS = 8, 400, 1 << 20
#: Results of 2 to 15 columns take MKL 2 to 5 times as long as their transposes, from so many rows.
_NARROW, _ROWS_OF_NARROW = range(2, 16), 64
#: Multiplications from which oneDNN's product is worth its start of 20 us.
_LARGE = 1 << 24


def uses_onednn() -> bool:
    """Whether torch has oneDNN, and may use it."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


# A compiler keeps the answer; into torch's own look-up it cannot look.
uses_onednn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, ``[R, N]`` of ``[R, K]`` and ``[N, K]``, also written to ``out``.

    oneDNN takes 1.3 ms for R = 6400, K = 300, N = 64, where MKL takes 1.9; with K = 1024 it errs
    twice as much, for it sums K up in one. So it gets what is wider than its result.
    """
    by_onednn = x.dtype == torch.float32 and not x.is_cuda and x.shape[1] > weight.shape[0]
    if by_onednn and x.shape[0] * weight.numel() >= _LARGE and uses_onednn():
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found if out is None else out.copy_(found)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def add_product(target: Tensor, x: Tensor, weight: Tensor, beta: float) -> None:
    """``target = beta target + x weight``: ``[R, N]``, ``[R, K]``, ``[K, N]``."""
    is_wide_type = target.dtype in (torch.float32, torch.float64)
    if is_wide_type and _is_narrow(target, x.shape[0]):
        _add(target, torch.mm(weight.t(), x.t()).t(), beta)
    else:
        torch.addmm(target, x, weight, beta=beta, out=target)


def outer(left: Tensor, right: Tensor, out: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """``left^T right``: ``[M, N]`` of ``[R, M]`` and ``[R, N]``; a sum over rows, contiguous.

    With ``out``, which is returned, ``beta out`` is added, and it is written there.

    On the CPU in parts: with T = 200, B = 16, H = 8 one sum through all rows is 2.9 times the error
    budget. torch.nn adds step by step. (Parts one after the other into the same result would not
    help: the GEMM begins with what is there.) The shorter side is the first, which takes 80 us
    instead of 400 for 3200 rows of 192 and 4 columns.
    """
    rows, size = left.shape[0], left.shape[1] * right.shape[1]
    parts = min(_PARTS, rows // _ROWS_OF_A_PART, _ROOM_OF_PARTS // max(size, 1))
    if left.is_cuda or (parts < 2 and not _is_narrow(right, rows)):
        if out is None:
            return torch.mm(left.t(), right)
        return torch.addmm(out, left.t(), right, beta=beta, out=out)
    is_wide = left.shape[1] <= right.shape[1]
    first, second = (left, right) if is_wide else (right, left)
    product = torch.mm(first.t(), second) if parts < 2 else _in_parts(first, second, rows // parts)
    product = product if is_wide else product.t()
    if out is None:
        return product.contiguous()
    _add(out, product, beta)
    return out


def _in_parts(first: Tensor, second: Tensor, size: int) -> Tensor:
    """A product for every ``size`` rows, and their sum."""
    rows = first.shape[0]
    parts = rows // size
    end = parts * size
    of_first, of_second = (x[:end].view(parts, size, -1) for x in (first, second))
    total = torch.bmm(of_first.mT, of_second).sum(0)
    return total if end == rows else total.addmm_(first[end:].t(), second[end:])


def _is_narrow(right: Tensor, rows: int) -> bool:
    """Whether a product over so many rows has as few columns as this."""
    return not right.is_cuda and right.shape[1] in _NARROW and rows >= _ROWS_OF_NARROW


def _add(target: Tensor, product: Tensor, beta: float) -> None:
    if beta:
        target.mul_(beta).add_(product) if beta != 1 else target.add_(product)
    else:
        target.copy_(product)
