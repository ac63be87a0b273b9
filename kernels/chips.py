"""The GPUs: what a plan must respect, and which one a device is.

Whoever plans needs them, so ``plan.py`` hands them on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """The limits of a GPU that a plan must respect."""

    name: str
    arch: str
    sms: int
    shared_bytes: int  # the most one program may have
    warp_size: int = 32
    concurrent: bool = True  # Triton's interpreter runs one program after the other
    cooperates: bool = True  # it has not refused a cooperative launch


CHIPS = {
    "sm_80": Chip("sm_80", "sm_80", 108, 166_912),
    "sm_90": Chip("sm_90", "sm_90", 132, 232_448),
    "sm_100": Chip("sm_100", "sm_100", 148, 232_448),
    "gfx942": Chip("gfx942", "gfx942", 304, 65_536, warp_size=64),
}


_REFUSING: set[torch.device] = set()


def refuse_cooperation(device: torch.device) -> None:
    """From now on no plan for this device lets one program wait for another.

    Another process may own a share of the SMs (MPS, green contexts).
    """
    _REFUSING.add(device)


def chip_of(device: torch.device) -> Chip:
    """The chip behind a device, as far as this process may use it."""
    chip = _chip_of(device)
    return chip._replace(cooperates=False) if device in _REFUSING else chip


@lru_cache
def _chip_of(device: torch.device) -> Chip:
    """The chip behind a device; for the CPU, where the interpreter runs, the limits of sm_90."""
    if device.type != "cuda":
        return CHIPS["sm_90"]._replace(name="the interpreter", concurrent=False)
    properties = torch.cuda.get_device_properties(device)
    shared = (
        getattr(properties, "shared_memory_per_block_optin", 0)
        or properties.shared_memory_per_block
    )
    if properties.warp_size == 64:
        arch = properties.gcnArchName.partition(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Chip(
        properties.name, arch, properties.multi_processor_count, shared, properties.warp_size
    )
