"""Products of slices of W_hh, program after program; ``test_cooperative.py`` exchanges operands."""

import pytest
import torch
import triton.language as tl
from triton.experimental import gluon

from fusedrnn.kernels import slices
from fusedrnn.kernels.cells import CELLS
from fusedrnn.kernels.layouts import slice_of


@gluon.jit
def product_kernel(w_ptr, slot_ptr, out_ptr, CELL: tl.constexpr, TILE: tl.constexpr):
    (w,) = slices.load_slices(w_ptr, 0, 1, CELL, TILE)
    accs = slices.products(w, slot_ptr, slices.zero_accs(len(w), TILE), 0, TILE)
    sums = slices.add_up(accs, TILE)
    rows, cols = tl.arange(0, TILE.block_b), tl.arange(0, TILE.block_h)
    for n in tl.static_range(len(sums)):
        gate = out_ptr + n * TILE.block_b * TILE.H + rows[:, None] * TILE.H
        unit = tl.program_id(0) * TILE.block_h + cols[None, :]
        tl.store(gate + unit, sums[n], mask=unit < TILE.H)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are those of the interpreter")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("cell", "H", "block_h", "halved"),
    [
        ("lstm", 41, 16, False),
        ("lstm", 20, 8, False),
        ("rnn_tanh", 72, 32, True),
        ("gru", 48, 16, False),  # columns end within a line, units do not
    ],
)
def test_all_slices_make_the_whole_product(cell, H, block_h, halved, transposed):
    B, block_h, gates = 8, max(block_h, 16 * transposed), CELLS[cell].phases[0]
    columns = H * len(gates) if transposed else H
    tile = slice_of(1, 1, H, B, block_h, 4, 4, (columns,), transposed, halved)
    size, u = len(gates) * H * H, torch.randn(B, columns)
    memory = torch.full((size + 64 * H,), torch.nan)  # beyond W_hh, where columns must not be read
    w = memory[:size].normal_().view(-1, H)
    slot = torch.nn.functional.pad(u, (0, tile.pitch - columns))
    out = torch.empty(1 if transposed else len(gates), B, H)
    product_kernel[-(-H // block_h),](w, slot, out, CELLS[cell], tile)
    want = (u @ w).unsqueeze(0) if transposed else torch.stack([u @ v.T for v in w.split(H)])
    torch.testing.assert_close(out, want)
