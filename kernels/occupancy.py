"""How many programs one SM holds at once, and what limits it: arithmetic, without triton.

Rules of NVIDIA's occupancy calculator (CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"), the same for compute capability 8.0, 9.0 and 10.0 but for the size of shared
memory: a warp gets registers in units of 256, i.e. of 8 a thread; warps come in fours, one for each
quarter of the SM with its own 16384 registers; a program's shared memory is rounded up to 128
bytes, with the 1024 that the system keeps of it. On gfx942 (LLVM's "User Guide for AMDGPU Backend"
and the CDNA 3 ISA): 512 vector registers a lane on each of four SIMDs in units of 8, 8 waves a
SIMD, 64 KiB of shared memory a CU in units of 512 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from .plan import Chip


class Occupancy(NamedTuple):
    """Programs on one SM (on AMD: CU) by each limit alone."""

    registers: int
    shared: int
    threads: int

    @property
    def programs(self) -> int:
        return min(self)

    @property
    def limit(self) -> str:
        """What binds; of equal ones all."""
        names = ("registers", "shared memory", "threads")
        equal = [name for name, n in zip(names, self, strict=True) if n == self.programs]
        return " and ".join(equal)


def occupancy(chip: Chip, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """Of programs of ``num_warps`` with ``registers`` a thread and ``shared_bytes`` of their own.

    >>> from fusedrnn.kernels.plan import CHIPS
    >>> occupancy(CHIPS["sm_90"], 228, 66_560, 4)
    Occupancy(registers=2, shared=3, threads=16)
    """
    if chip.warp_size == 64:
        waves = min(8, 512 // _up(max(registers, 1), 8)) * 4
        shared = chip.shared_bytes // max(_up(shared_bytes, 512), 512)
        # A CU has 16 barriers; a program of one wave needs none.
        most = 16 if num_warps > 1 else 32
        return Occupancy(waves // num_warps, shared, min(32 // num_warps, most))
    warps = 65_536 // _up(max(registers, 1) * 32, 256) // 4 * 4
    # The most one program may have is all but the system's share of one.
    shared = (chip.shared_bytes + 1024) // _up(shared_bytes + 1024, 128)
    return Occupancy(warps // num_warps, shared, min(64 // num_warps, 32))


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
