"""The host's side of a launch: grid, compile-time arguments and compiler options."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from .problem import CACHES, LaunchRefused, Tiles
from .rows import Rows
from .tensors import Layers
from .tiles import Tile

#: All programs run at once, or the launch is refused. The assertion of ``wait`` needs debug, which
#: by itself would also check every integer sum for overflow.
TOGETHER = {"debug": True, "sanitize_overflow": False, "launch_cooperative_grid": True}
#: Polls of one wait before it fails: about ten seconds.
PATIENCE = 1 << 24


def options_of(tiles: Tiles) -> dict[str, Any]:
    """The options of the compiler and of the launch."""
    # Fusion is stated because its default differs between versions of Triton. One stage: the
    # kernels load a step ahead themselves, and the pipeliner would only add shared memory.
    options = {"num_warps": tiles.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if tiles.max_registers:
        # Otherwise ptxas may stop at 128 registers, to fit two programs on an SM, and spill.
        options["maxnreg"] = tiles.max_registers
    return options


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for the host."""
    return -(-a // b)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one, on which Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


_NOTHING = nullcontext()


class Workspace(NamedTuple):
    """The memory that the programs of one call share besides its results."""

    counters: torch.Tensor  # [Z, batch tiles], int32, zero
    slots: torch.Tensor  # [Z, batch tiles, 2, BLOCK_B, pitch], zero


def workspace(like: torch.Tensor, Z: int, tiles: int, block_b: int, pitch: int) -> Workspace:
    """Allocates the workspace of one call for Z layers and directions of ``tiles`` batch tiles.

    It comes from torch's caching allocator on the current stream, so that calls on two streams
    never share one, and a CUDA graph captures the zeros with the launch.
    """
    size = 2 * Z * tiles * block_b * pitch
    memory = like.new_zeros(size + Z * tiles * 4 // like.element_size())  # one kernel fills both
    slots = memory[:size].view(Z, tiles, 2, block_b, pitch)
    return Workspace(memory[size:].view(torch.int32).view(Z, tiles), slots)


def sizes_of(layers: Layers, tiles: Tiles) -> tuple[int, int, int, int, int]:
    """L, D and H of a launch, BLOCK_B and BLOCK_H of a program."""
    Z, _, H = layers.h_0.shape
    D = layers.out[0].shape[-1] // H
    return Z // D, D, H, tiles.block_b, tiles.block_h


def tile_of(cell: Any, layers: Layers, tiles: Tiles) -> Tile:
    """The argument TILE of a portable kernel."""
    return Tile(*sizes_of(layers, tiles), tiles.precision)


#: The argument TILE and the options of a launch, by what they depend on, with that.
_CONSTANTS: dict[tuple, tuple[Any, dict[str, Any], tuple]] = {}
CACHES.append(_CONSTANTS.clear)


def _constants(
    kernel: Any, cell: Any, layers: Layers, tiles: Tiles, tile_of: Callable
) -> tuple[Any, dict[str, Any], tuple]:
    # None of the first three has a quick hash.
    Z, _, H = layers.h_0.shape
    key = id(kernel), id(cell), id(tiles), Z, H, layers.out[0].shape[-1], layers.h_0.dtype
    found = _CONSTANTS.get(key)
    if found is None:
        assert tiles is not None, "the plan has no backward"
        kept = kernel, cell, tiles
        found = _CONSTANTS[key] = tile_of(cell, layers, tiles), options_of(tiles), kept
    return found


def run(kernel: Any, cell: Any, tensors: tuple, rows: Rows, tiles: Any, tile_of: Callable) -> None:
    """Launches a program for each batch tile and direction of one layer.

    Args:
        cell: the argument CELL.
        tensors: the ``Layers``, and backward the ``Grads``.
        tile_of: makes the argument TILE of cell, layers and tiles.
    """
    tile, options, _ = _constants(kernel, cell, tensors[0], tiles, tile_of)
    h_0, T, B = tensors[0].h_0, rows.T, rows.B
    grid = cdiv(B, tiles.block_b), h_0.shape[0]
    with on_device(h_0):
        kernel.run(*tensors, T, B, rows.total, cell, tile, grid=grid, warmup=False, **options)


def run_together(
    kernel: Any, cell: Any, tensors: tuple, rows: Rows, tiles: Any, tile_of: Callable
) -> None:
    """Launches programs that wait for each other, as ``run`` does; TILE is a ``Slice``.

    Of the batch tiles, as many run in one round as the chip holds at once.

    Raises:
        LaunchRefused: the device does not hold all programs of a round at once.
    """
    tile, options, _ = _constants(kernel, cell, tensors[0], tiles, tile_of)
    h_0, sizes = tensors[0].h_0, (rows.T, rows.B, rows.total)
    (Z, B, H), (block_b, block_h) = h_0.shape, (tile.block_b, tile.block_h)
    total = cdiv(B, block_b)
    shared = workspace(h_0, Z, total, block_b, tile.pitch)
    for first in range(0, total, tiles.at_once):
        grid = cdiv(H, block_h), min(tiles.at_once, total - first), Z
        given = *tensors, shared, *sizes, first, PATIENCE, cell, tile
        try:
            with on_device(h_0):
                kernel[grid](*given, **options, **TOGETHER)
        except RuntimeError as error:
            if "cooperative" in str(error).lower():  # cudaErrorCooperativeLaunchTooLarge
                raise LaunchRefused(str(error)) from error
            raise
