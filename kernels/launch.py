"""The host's side of a launch: grid, compile-time arguments and compiler options."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from .problem import LaunchRefused, Tiles
from .rows import Rows
from .tensors import Layers
from .tiles import Tile

#: All programs run at once, or the launch is refused. The assertion of ``wait`` needs debug, which
#: by itself would also check every integer sum for overflow.
TOGETHER = {"debug": True, "sanitize_overflow": False, "launch_cooperative_grid": True}
_CONSTANTS: dict[tuple, tuple] = {}


def constants(cell: Any, tiles: Tiles, L: int, D: int, H: int) -> tuple[Any, Tile, dict[str, Any]]:
    """The arguments CELL and TILE of a kernel and its compiler options, made once.

    The cache compares cells and tiles by identity: it hashes no plan field by field, and a cell
    that is registered under the name of another is not taken for that one.
    """
    key = id(cell), id(tiles), L, D, H
    made = _CONSTANTS.get(key)
    if made is None:
        if len(_CONSTANTS) >= 4096:
            _CONSTANTS.clear()
        tile = Tile(L, D, H, tiles.block_b, tiles.block_h, tiles.precision)
        # The entry holds the tiles, so that no others can get their id.
        made = _CONSTANTS[key] = cell, tile, options_of(tiles), tiles
    return made[:3]


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
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def in_rounds(launch: Callable[[int, int], None], B: int, tiles: Tiles) -> None:
    """Calls ``launch(first_tile, count)`` with as many batch tiles as the chip holds at once.

    Raises:
        LaunchRefused: the device does not hold all programs of a round at once.
    """
    total = cdiv(B, tiles.block_b)
    for first_tile in range(0, total, tiles.at_once):
        try:
            launch(first_tile, min(tiles.at_once, total - first_tile))
        except RuntimeError as error:
            if "cooperative" in str(error).lower():  # cudaErrorCooperativeLaunchTooLarge
                raise LaunchRefused(str(error)) from error
            raise


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


def launch_together(
    kernel: Any,
    tensors: tuple,
    rows: Rows,
    tiles: Tiles,
    constants: tuple,
    shared: Workspace | None,
    patience: int,
) -> None:
    """Launches a kernel in rounds of batch tiles; its last compile-time argument is a ``Slice``.

    Raises:
        LaunchRefused: the device does not hold all programs of a round at once.
    """
    h_0, tile = tensors[0].h_0, constants[-1]
    Z, B, H = h_0.shape
    if shared is None:
        shared = workspace(h_0, Z, cdiv(B, tile.block_b), tile.block_b, tile.pitch)
    options = options_of(tiles) | TOGETHER

    def launch(first_tile: int, count: int) -> None:
        kernel[cdiv(H, tile.block_h), count, Z](
            *tensors, shared, rows.T, B, rows.total, first_tile, patience, *constants, **options
        )

    with on_device(h_0):
        in_rounds(launch, B, tiles)


def layers_forward(layers: Layers, L: int = 1) -> Layers:
    """The tensors that a kernel of L layers reads; the others are None, and cost no time."""
    return layers if L > 1 else layers._replace(w_ih=None, b_ih=None, masks=None)


def layers_backward(layers: Layers, L: int = 1) -> Layers:
    """The tensors that its backward reads."""
    read = layers_forward(layers, L)
    return read._replace(gx=None, b_ih=None, b_hh=None, h_n=None, c_n=None)
