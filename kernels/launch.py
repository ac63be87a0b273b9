"""What every launcher needs besides its kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .cells import CELLS
from .plan import LaunchRefused, Plan, Tiles
from .spec import SPECS


def launch_options(tiles: Tiles) -> dict:
    """Options for the compiler and the launch."""
    # Fusion is stated because its default changes between Triton 3.9 and 3.10. One stage: the
    # kernels load a step ahead themselves, and the pipeliner would only add shared memory.
    options = {"num_warps": tiles.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if tiles.max_registers:
        # Otherwise ptxas stops at 128 and spills 8 bytes, so that two programs fit one SM.
        options["maxnreg"] = tiles.max_registers
    return options


def made_once(
    constants: Callable[..., dict], options: Callable[[Plan], dict]
) -> Callable[..., dict]:
    """``constants(cell, plan, *sizes, rows) | options(plan)``, made once for what it depends on.

    Of rows that is their switches. Cell and plan count as objects: a cell that is registered under
    the name of another is not taken for that one, and no plan is hashed field by field.
    """
    made: dict[tuple, tuple] = {}

    def arguments(cell: str, plan: Plan, *sizes: Any) -> dict:
        *others, rows = sizes
        of, spec, dense = CELLS[cell], SPECS[cell], rows.origins is None
        key = id(plan), id(of), id(spec), dense, rows.sizes is None, *others
        found = made.get(key)
        if found is None:
            if len(made) >= 4096:  # as many plans as are kept
                made.clear()
            # With the objects, so that no others have their ids.
            found = made[key] = constants(cell, plan, *sizes) | options(plan), plan, of, spec
        return found[0]

    return arguments


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv is for kernels, and takes 5 us on the host."""
    return -(-a // b)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def kept(gates: torch.Tensor | None, cs: torch.Tensor | None) -> int:
    """SAVE of the forward kernels: 0 nothing, 1 the c of each step, 2 the gates too."""
    return 2 if gates is not None else int(cs is not None)


def rounds(tiles: Tiles, count: int, H: int, Z: int) -> Iterator[tuple[tuple[int, int, int], int]]:
    """The launches of programs that wait for each other: each one's grid and first batch tile.

    As many of ``count`` batch tiles at once as the chip holds, until all are done.
    """
    partners = cdiv(H, tiles.blocks[0][1])
    for first_tile in range(0, count, tiles.at_once):
        yield (partners, min(tiles.at_once, count - first_tile), Z), first_tile


def in_rounds(
    launch: Callable, tiles: Tiles, like: torch.Tensor, count: int, H: int, Z: int
) -> None:
    """Launches as many of ``count`` batch tiles as the chip holds at once, until all are done."""
    with on_device(like):
        for grid, first_tile in rounds(tiles, count, H, Z):
            try:
                launch(grid, first_tile)
            except RuntimeError as error:
                if "cooperative" in str(error).lower():  # cudaErrorCooperativeLaunchTooLarge
                    raise LaunchRefused(str(error)) from error
                raise


def cooperative_options(tiles: Tiles) -> dict:
    """Options for programs that wait for each other: all at once on the chip, or refused."""
    # Device assertions need debug, which alone would check every integer sum for overflow too.
    checked = {"debug": True, "sanitize_overflow": False}
    return launch_options(tiles) | checked | {"launch_cooperative_grid": True}


def mask_of_each_layer(masks: Sequence[torch.Tensor], like: torch.Tensor, L: int) -> tuple:
    """For layer l the factor of its input: none for the first, whose entry is never read."""
    return (like, *masks) if masks else (like,) * L
