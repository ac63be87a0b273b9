"""The host's side of a launch: grid, compile-time arguments and compiler options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .problem import LaunchRefused, Tiles
from .tensors import Layers
from .tiles import Tile

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


def layers_forward(layers: Layers) -> Layers:
    """The tensors that the forward kernel reads; the others are None, and cost no time."""
    return layers._replace(w_ih=None, b_ih=None, masks=None)


def layers_backward(layers: Layers) -> Layers:
    """The tensors that the backward kernel reads."""
    return layers._replace(gx=None, w_ih=None, b_ih=None, b_hh=None, masks=None, h_n=None, c_n=None)
