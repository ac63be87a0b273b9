"""Another model, without W_hh: the minGRU of Feng et al. (arXiv 2410.01201) as a parallel scan.

    z, n = sigmoid(x W_z^T + b_z), x W_n^T + b_n
    h[t] = (1 - z[t]) h[t-1] + z[t] n[t]

It is linear in h, so steps can be combined before h is known: T steps take log T rounds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_H = 32, 32


@triton.jit
def after(a, b, a_later, b_later):
    return a * a_later, b * a_later + b_later  # y -> a y + b, twice


@triton.jit
def _scan_kernel(a_ptr, b_ptr, y_ptr, T, H, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Writes y[t] = a[t] y[t-1] + b[t] for one sequence and BLOCK_H units, from zero."""
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    y = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, T, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        inside = (rows < T)[:, None] & (cols < H)[None, :]
        offsets = (tl.program_id(0) * T + rows)[:, None] * H + cols[None, :]
        a = tl.load(a_ptr + offsets, mask=inside, other=1.0)
        b = tl.load(b_ptr + offsets, mask=inside, other=0.0)
        a, b = tl.associative_scan((a, b), 0, after)  # each row: all maps up to it
        made = a * y[None, :] + b
        tl.store(y_ptr + offsets, made, mask=inside)
        y = tl.sum(tl.where(rows[:, None] == first + BLOCK_T - 1, made, 0.0), 0)


def scan(a: Tensor, b: Tensor) -> Tensor:
    """Runs y[t] = a[t] y[t-1] + b[t] from zero over dimension 1 of fp32 tensors ``[B, T, H]``."""
    B, T, H = a.shape
    y = torch.empty_like(b)
    grid = B, triton.cdiv(H, BLOCK_H)
    _scan_kernel[grid](a.contiguous(), b.contiguous(), y, T, H, BLOCK_T, BLOCK_H)
    return y


class LinearRecurrence(torch.autograd.Function):
    """``scan`` with its gradient, which is a scan backwards in time."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        y = scan(a, b)
        ctx.save_for_backward(a, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, y = ctx.saved_tensors
        zero = torch.zeros_like(a[:, :1])
        later = torch.cat((a[:, 1:], zero), 1)  # what y[t] is multiplied by in y[t+1]
        db = scan(later.flip(1), dy.flip(1)).flip(1)
        return db * torch.cat((zero, y[:, :-1]), 1), db


def min_gru(x: Tensor, w_z: Tensor, b_z: Tensor, w_n: Tensor, b_n: Tensor) -> Tensor:
    """Returns h ``[B, T, H]`` of a minGRU for fp32 ``x`` ``[B, T, I]`` and weights ``[H, I]``."""
    z = torch.nn.functional.linear(x, w_z, b_z).sigmoid()
    return LinearRecurrence.apply(1 - z, z * torch.nn.functional.linear(x, w_n, b_n))
