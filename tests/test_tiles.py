"""The device functions that every kernel shares."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fusedrnn.kernels import rows, tiles


@triton.jit
def tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tiles.tanh(tl.load(x_ptr + offs)))


def tanh(x):
    y = torch.empty_like(x)
    tanh_kernel[1,](x, y, len(x))
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_errs_by_less_than_two_ulp(dtype, device):
    """Between tiny and saturated, and on both sides of 0.625, where the formula changes."""
    least = -300 if dtype == torch.float64 else -20
    spread = torch.logspace(least, 1.3, 1 << 13, dtype=torch.float64)
    x = torch.cat((spread, torch.linspace(0.55, 4.0, 1 << 13, dtype=torch.float64))).to(dtype)
    x = torch.cat((x, -x))
    exact = np.tanh(x.numpy().astype(np.longdouble))
    ulp = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(np.abs(exact)))
    error = np.abs(tanh(x.to(device)).cpu().numpy() - exact) / ulp
    assert error.max() < 2.0, (error.max(), x[error.argmax()])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")
def test_tanh_of_numbers_at_the_end(device):
    x = torch.tensor([0.0, 50.0, -50.0, 1e38, -1e38, torch.inf, -torch.inf, torch.nan])
    want = torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, torch.nan])
    torch.testing.assert_close(tanh(x.to(device)).cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["SKIPPED", "PREVIOUS", "ZERO", "INITIAL"])
def test_origins_are_those_of_the_rows(name):
    assert getattr(tiles, name).value == getattr(rows, name)
