"""The products over all rows: right in every form, and as exact as torch.nn's sums."""

from __future__ import annotations

import pytest
import torch

from fusedrnn import gemm

#: Rows, and columns of input and result. Rows below and above what makes parts, with some that fit
#: into none; narrow, long and wide sides.
SHAPES = [
    (0, 4, 3), (1, 5, 4), (63, 4, 12), (64, 4, 12), (64, 12, 4), (799, 16, 8), (807, 1, 48),
    (807, 48, 1), (3205, 64, 4), (3205, 4, 64), (1601, 0, 3), (6400, 300, 64),
]  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def rows_of(rows, columns, dtype, strided=False):
    """``[rows, columns]``, strided as tiles of a wider buffer are."""
    wide = torch.randn(rows, 2 * columns + 1, dtype=torch.float64).to(dtype)
    return wide[:, 1 : columns + 1] if strided else wide[:, :columns].contiguous()


def close(got, want, terms):
    """Within the rounding of the result, and of a sum of so many normal numbers: n of them make
    sqrt(n), each rounded alike, and roundings add up as the numbers do."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=4 * eps * (terms + 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_every_product_is_the_one_it_says(shape, dtype, strided):
    rows, inner, outer = shape
    x, weight = rows_of(rows, inner, dtype, strided), rows_of(outer, inner, dtype, strided)
    grads, bias = rows_of(rows, outer, dtype, strided), torch.randn(outer, dtype=dtype)
    of = x.double(), weight.double(), grads.double()
    for b in (None, bias):
        want = of[0] @ of[1].T + (0 if b is None else b.double())
        close(gemm.linear(x, weight, b), want, inner)
        into = rows_of(rows, outer, dtype, True)
        gemm.linear(x, weight, b, into)
        close(into, want, inner)
    for beta in (0.0, 1.0, 0.5):
        target = torch.randn(rows, inner, dtype=dtype)
        want = beta * target.double() + of[2] @ of[1]
        gemm.add_product(target, grads, weight, beta)
        close(target, want, outer + 1)
    found = gemm.outer(grads, x)
    close(found, of[2].T @ of[0], rows + 1)
    assert found.is_contiguous()
    for beta in (0.0, 1.0):
        target = torch.randn(outer, inner, dtype=dtype)
        want = beta * target.double() + of[2].T @ of[0]
        assert gemm.outer(grads, x, target, beta) is target
        close(target, want, rows + 1)


@pytest.mark.parametrize("shape", [(64, 4, 12), (3205, 4, 12), (799, 16, 8)], ids=str)
def test_nothing_of_a_target_is_kept_that_is_to_be_overwritten(shape):
    rows, inner, _ = shape
    weight, grads = (rows_of(*of, torch.float32) for of in (shape[2:0:-1], shape[::2]))
    target = torch.full((rows, inner), float("nan"))
    gemm.add_product(target, grads, weight, 0.0)
    assert not target.isnan().any()


def test_long_sums_are_of_parts():
    """Of positive terms, whose sum grows with their number, and the error of adding to it too."""
    torch.manual_seed(0)
    x, grads = torch.rand(16000, 64), torch.rand(16000, 32)
    want, whole, found = grads.double().T @ x.double(), grads.T @ x, gemm.outer(grads, x)
    assert (found - want).square().mean() < (whole - want).square().mean() / 2


def test_onednn_multiplies_what_is_wide_and_large_unless_it_is_off(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    taken = []

    def spy(x, *rest):
        taken.append(tuple(x.shape))
        return product_of(x, *rest)

    product_of = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)

    def linear(rows, inner, outer, dtype=torch.float32):
        gemm.linear(rows_of(rows, inner, dtype), rows_of(outer, inner, dtype), None)

    linear(6400, 300, 64)
    assert taken.pop() == (6400, 300)
    linear(64, 300, 64)  # small
    linear(6400, 128, 512)  # its result is wider
    linear(6400, 300, 64, torch.float64)
    torch._C._set_mkldnn_enabled(False)  # `flags` sets more, and warns of it
    try:
        linear(6400, 300, 64)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert taken == []
