"""What every launcher needs besides its kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .plan import Tiles


def launch_options(tiles: Tiles) -> dict:
    """Options for the compiler and the launch."""
    # Fusion is stated because its default changes between Triton 3.9 and 3.10. One stage: the
    # kernels load a step ahead themselves, and the pipeliner would only add shared memory.
    options = {"num_warps": tiles.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if tiles.max_registers:
        # Otherwise ptxas stops at 128 and spills 8 bytes, so that two programs fit one SM.
        options["maxnreg"] = tiles.max_registers
    return options


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
