"""The rows of one program: what is read, what is written, and where the rows of a step lie."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import Shape, rows_of

from fusedrnn.kernels import steps, tiles
from fusedrnn.kernels.tensors import Layers


@triton.jit
def copy_kernel(layers, y_ptr, B, TILE: tl.constexpr, AGAIN: tl.constexpr):
    x_ptr, offs_b = layers.out[0], tl.arange(0, TILE.block_b)
    cols, W = tl.arange(0, TILE.block_h), 2 * TILE.H
    program = steps.part_of(layers, 0, tl.program_id(0), offs_b, cols, 1, B, B, TILE, AGAIN)
    x = steps.load(x_ptr, program, (0, program.offs_b), (), 2, W, TILE)
    x = tiles.zero_where(offs_b == 1, x)
    x = tiles.where(offs_b == 2, (x[1], x[0]), x)
    x = tiles.add_to(x, 1, tl.sum(x[0]) * 0.0 + 1.0)
    steps.store(y_ptr, program, (0, program.offs_b), program.mask_b, x, W, TILE)


@pytest.mark.parametrize("again", [False, True])
def test_tiles_are_loaded_masked_and_stored(again, device):
    """Nothing outside ``[B, 2H]`` is read (else the sum is NaN) or written; zero replaces a NaN."""
    B, H = 5, 12
    whole = torch.full((B + 1, 2 * H), torch.nan, device=device)
    whole[:B] = torch.randn(B, 2 * H)
    whole[1, 3] = torch.nan
    out = torch.full_like(whole, 7.0)
    copy_kernel[1,](Layers(out=(whole,)), out, B, tiles.Tile(1, 1, H, 16, 16, "ieee"), again)
    want = whole[:B].clone()
    want[1] = 0.0
    want[2] = want[2].roll(H)
    want[:, H:] += 1.0
    assert torch.equal(out[:B], want)
    assert (out[B] == 7.0).all()


@triton.jit
def places_kernel(layers, row_ptr, origin_ptr, T, B, R, TILE: tl.constexpr):
    rows = tl.arange(0, TILE.block_b)
    program = steps.part_of(layers, tl.program_id(0), 0, rows, rows, T, B, R, TILE)
    for step in range(T):
        place, offs = steps.place_of(layers, program, step), (program.z * T + step) * B + rows
        first, each = steps.rows_of(program, step, place)
        tl.store(row_ptr + offs, first + each, mask=program.mask_b[0])
        if layers.origins is not None:
            origins = steps.origins_at(program, place)
            tl.store(origin_ptr + offs, origins, mask=program.mask_b[0])


@pytest.mark.parametrize("form", ["dense", "ragged", "packed"])
def test_direction_1_has_the_places_of_direction_0_backwards(form, device):
    T, B, D = 5, 3, 2
    rows = rows_of(Shape(T, B, 4, D=D, rows=form), device)
    found = [torch.full((D, T, B), -1, device=device) for _ in range(2)]
    layers = Layers(out=(found[0],), origins=rows.origins, starts=rows.starts)
    places_kernel[D,](layers, *found, T, B, rows.total, tiles.Tile(1, D, 4, 4, 4, "ieee"))
    starts = torch.tensor([span.start for span in rows.spans()], device=device).unsqueeze(1)
    # A packed row that a sequence does not have is another one that exists.
    forward = (starts + torch.arange(B, device=device)).clamp(max=rows.total - 1)
    assert torch.equal(found[0], torch.stack((forward, forward.flip(0))))
    if form != "dense":
        first, second = rows.origins.long()
        assert torch.equal(found[1], torch.stack((first, second.flip(0))))
