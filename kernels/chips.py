"""The GPUs: the limits that a plan must respect, and the chip behind a device."""

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
    concurrent: bool = True  # False in Triton's interpreter: one program after the other
    cooperates: bool = True  # False once the device has refused a cooperative launch


CHIPS = {
    "sm_80": Chip("sm_80", "sm_80", 108, 166_912),
    "sm_90": Chip("sm_90", "sm_90", 132, 232_448),
    "sm_100": Chip("sm_100", "sm_100", 148, 232_448),
}

_REFUSING: set[torch.device] = set()


def refuse_cooperation(device: torch.device) -> None:
    """Excludes schedule cooperative from all later plans for this device.

    Another process may own a share of the SMs (MPS, green contexts).
    """
    _REFUSING.add(device)


def chip_of(device: torch.device) -> Chip:
    """Returns the chip behind a device, as far as this process may use it."""
    chip = _chip_of(device)
    return chip._replace(cooperates=False) if device in _REFUSING else chip


@lru_cache
def _chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":  # the interpreter
        return CHIPS["sm_90"]._replace(name="the interpreter", concurrent=False)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block
    arch = f"sm_{found.major}{found.minor}"
    if found.warp_size == 64:
        arch = found.gcnArchName.partition(":")[0]
    return Chip(found.name, arch, found.multi_processor_count, shared, found.warp_size)
