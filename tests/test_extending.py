"""A cell the package does not have runs in the schedule as it is: no schedule is touched.

The cell is picked to need all that the contract of ``cells.py`` offers: it normalises over the
whole row of H, which lies in two blocks, and multiplies h by a mask of its own before the
recurrent product, as recurrent dropout does:

    a = gx + W_hh (m * h) + b_hh,   h' = tanh((a - mean(a)) / sqrt(var(a) + 1e-5)).
"""

import pytest
import torch
import triton
import triton.language as tl

from fusedrnn.kernels import cells, resident, spec
from fusedrnn.kernels.common import pick, tanh
from fusedrnn.kernels.plan import Plan, Tiles, blocks_of
from fusedrnn.kernels.rows import Rows
from fusedrnn.testing import assert_budget

SPEC = spec.CellSpec(1, 1, 1, ((0,),), ((0,),), (0,), rowwise=True)


@triton.jit
def row_mean(tiles, H: tl.constexpr):
    total = tl.sum(tiles[0], 1)
    for j in tl.static_range(1, len(tiles)):
        total = total + tl.sum(tiles[j], 1)
    return (total / H)[:, None]


@triton.jit
def row_scale(tiles, mean, H: tl.constexpr):
    # The columns beyond H hold zeros: mean of squares, and not of deviations.
    square = tl.sum(tiles[0] * tiles[0], 1)
    for j in tl.static_range(1, len(tiles)):
        square = square + tl.sum(tiles[j] * tiles[j], 1)
    return 1.0 / tl.sqrt((square / H)[:, None] - mean * mean + 1e-5)


@triton.jit
def masked(ctx, tiles):
    aux_ptr, _, offs_b, mask_b, H, cols = ctx
    out = ()
    for j in tl.static_range(len(tiles)):
        ptrs = aux_ptr + offs_b[:, None] * H + cols[j][None, :]
        mask = tl.load(ptrs, mask=mask_b[:, None] & (cols[j] < H)[None, :], other=0.0)
        out = out + (tiles[j] * mask,)
    return out


@triton.jit
def normed_operand(PHASE: tl.constexpr, ctx, gx, gh, state):
    return masked(ctx, pick(state, 0))


@triton.jit
def normed_forward(ctx, gx, gh, state):
    a = ()
    for j in tl.static_range(len(gx)):
        a = a + (gx[j][0] + gh[j][0],)
    mean = row_mean(a, ctx[4])
    scale = row_scale(a, mean, ctx[4])
    new = ()
    saved = ()
    for j in tl.static_range(len(a)):
        new = new + ((tanh((a[j] - mean) * scale),),)
        saved = saved + ((a[j],),)
    return new, saved


@triton.jit
def normed_adjoint(PHASE: tl.constexpr, ctx, d_state, du, saved, prev, new, carry):
    a = pick(saved, 0)
    mean = row_mean(a, ctx[4])
    scale = row_scale(a, mean, ctx[4])
    dn = ()
    dnn = ()
    for j in tl.static_range(len(a)):
        slope = d_state[j][0] * (1.0 - new[j][0] * new[j][0])
        dn = dn + (slope,)
        dnn = dnn + (slope * (a[j] - mean) * scale,)
    mean_dn = row_mean(dn, ctx[4])
    mean_dnn = row_mean(dnn, ctx[4])
    grads = ()
    zero = ()
    for j in tl.static_range(len(a)):
        n = (a[j] - mean) * scale
        grads = grads + (((dn[j] - mean_dn - n * mean_dnn) * scale,),)
        zero = zero + ((tl.zeros_like(n),),)
    return grads, zero, ()


@triton.jit
def normed_fold(ctx, d_state, du):
    return cells._fold_h(ctx, d_state, masked(ctx, du))


def expected(gx, w_hh, b_hh, h, mask):
    out = []
    for x in gx:
        a = x + (h * mask) @ w_hh.T + b_hh
        h = torch.nn.functional.layer_norm(a, a.shape[-1:], eps=1e-5).tanh()
        out.append(h)
    return torch.stack(out)


@pytest.mark.parametrize("H", [20, 48])  # one block, and 32 + 16
def test_a_new_cell_needs_no_new_schedule(H, device, monkeypatch):
    monkeypatch.setitem(spec.SPECS, "normed", SPEC)
    monkeypatch.setitem(
        cells.CELLS,
        "normed",
        cells.Cell(SPEC, normed_operand, normed_forward, normed_adjoint, normed_fold),
    )
    T, B = 5, 6
    tiles = Tiles(16, blocks_of(H), 4, None, "ieee", 0)
    plan = Plan("resident", tiles, tiles, ())
    gx, w_hh, b_hh, h_0, dy = (
        torch.randn(*shape, device=device)
        for shape in ((1, T, B, H), (H, H), (H,), (1, B, H), (T, B, H))
    )
    w_hh = w_hh / H**0.5
    mask = (torch.rand(B, H, device=device) > 0.3) / 0.7
    weights = [spec.Weights(w_hh, w_hh, None, b_hh)]
    out, gates, dgates = (torch.empty(1, T, B, H, device=device) for _ in range(3))
    h_n, d_h_0 = torch.empty_like(h_0), torch.empty_like(h_0)

    resident.resident_fwd(
        "normed", plan, gx, weights, h_0, None, out[0], h_n, None, gates, None, Rows(T, B), aux=mask
    )
    zero = torch.zeros_like(h_0)
    resident.resident_bwd(
        "normed", plan, dy, None, zero, None, weights, h_0, None, out[0], gates, None, dgates,
        d_h_0, None, Rows(T, B), aux=mask,
    )  # fmt: skip

    results = {}
    for name, dtype in (("ref", torch.float32), ("truth", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (gx[0], h_0[0])]
        y = expected(leaves[0], w_hh.to(dtype), b_hh.to(dtype), leaves[1], mask.to(dtype))
        results[name] = y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))
    for name, got, ref, truth in zip(
        ("output", "d_gx", "d_h_0"),
        (out[0], dgates[0], d_h_0[0]),
        results["ref"],
        results["truth"],
        strict=True,
    ):
        assert_budget(name, got, ref, truth)
