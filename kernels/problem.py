"""The records of the planner: a problem, a chip, the tiles of a program, and a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import distributed

from .latencies import TIMINGS, Timings
from .spec import SPECS, CellSpec


class NoPlan(Exception):  # noqa: N818, a planner's answer rather than an error
    """No schedule takes the problem; the message is the reason, in one sentence."""


class LaunchRefused(RuntimeError):  # noqa: N818, as above
    """The device does not hold all programs of a cooperative launch at once; nothing has run."""


class KernelFailed(RuntimeError):  # noqa: N818, as above
    """The kernels of a schedule did not compile or launch; the message is the cause."""


class Chip(NamedTuple):
    """The limits of a GPU that a plan must respect."""

    name: str
    arch: str
    sms: int
    shared_bytes: int  # the most one program may have
    warp_size: int = 32
    concurrent: bool = True  # False in Triton's interpreter: one program after the other
    mhz: float = 1755.0  # the highest clock
    failed: tuple[tuple[Any, str], ...] = ()  # what ``give_up`` was told, with its causes

    @property
    def unsupported(self) -> str | None:
        """Returns why no kernel runs on the chip, or None."""
        if self.arch.startswith("gfx"):
            waves = f"AMD's GPUs with waves of 64 threads; {self.name} has {self.warp_size}"
            return f"the kernels are made for {waves}" if self.warp_size != 64 else None
        if int(self.arch.removeprefix("sm_")) < 80:
            return f"Triton has no tensor-core products below sm_80; {self.name} is {self.arch}"
        return None

    @property
    def timings(self) -> Timings:
        """Returns the timings of an SM; those of sm_90 if there are none of the architecture."""
        return TIMINGS.get(self.arch, TIMINGS["sm_90"])


CHIPS = {arch: Chip(arch, arch, sm.sms, sm.shared, mhz=sm.mhz) for arch, sm in TIMINGS.items()}

#: The SMs that a running collective of NCCL may take: one for each CTA, of which ``maxCTAs`` in
#: docs.nvidia.com/deeplearning/nccl/user-guide/docs/api/types.html allows 32 by default (since NCCL
#: 2.25 NCCL_MAX_CTAS may raise it to 64). A cooperative launch that needs them waits for its end.
_SMS_OF_NCCL = 32
_FAILED: dict[torch.device, dict[Any, str]] = {}
#: The functions that empty the caches of what was decided; ``forget`` calls them.
CACHES: list[Callable[[], object]] = []


def forget() -> None:
    """Forgets every decision, after a change of what decisions depend on."""
    for clear in CACHES:
        clear()


def give_up(device: torch.device, what: str | tuple[str, int, torch.dtype], cause: str) -> None:
    """Excludes a schedule, or the kernels of a cell, H and dtype, from all later plans."""
    _FAILED.setdefault(device, {})[what] = cause
    forget()


def chip_of(device: torch.device) -> Chip:
    """Returns the chip behind a device, as far as this process may use it."""
    chip = _chip_of(device)._replace(failed=tuple(_FAILED.get(device, {}).items()))
    if distributed.is_available() and distributed.is_initialized():
        if "nccl" in distributed.get_backend():
            return chip._replace(sms=max(chip.sms - _SMS_OF_NCCL, 1))
    return chip


@lru_cache
def _chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":  # the interpreter
        return CHIPS["sm_90"]._replace(name="the interpreter", concurrent=False)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block
    arch = f"sm_{found.major}{found.minor}"
    if torch.version.hip is not None:
        arch = found.gcnArchName.partition(":")[0]
    chip = Chip(found.name, arch, found.multi_processor_count, shared, found.warp_size)
    # torch has the clock in kHz, where it has one.
    return chip._replace(mhz=getattr(found, "clock_rate", 0) / 1000 or chip.timings.mhz)


class Problem(NamedTuple):
    """The sizes that a plan depends on. T is left out: no binary and no choice depends on it."""

    cell: str
    hidden_size: int
    batch: int
    directions: int
    dtype: torch.dtype
    precision: str  # of products in fp32: "tf32", "tf32x3" or "ieee"
    needs_grad: bool
    layers: int = 1
    ragged: bool = False  # lengths, resets or packed input
    layer_by_layer: bool = False  # no wavefront: backward recomputes the gates of each layer

    @property
    def spec(self) -> CellSpec:
        """The counts of the cell."""
        return SPECS[self.cell]

    def kind(self, chip: Chip) -> str:
        """Returns the kind of products: "16-bit", "tf32", "tf32x3", "ieee" (fp32) or "fp64"."""
        if self.dtype != torch.float32:
            return "16-bit" if self.dtype in (torch.float16, torch.bfloat16) else "fp64"
        return "ieee" if chip.warp_size == 64 else self.precision  # AMD's have no tf32


@dataclass(frozen=True)
class Tiles:
    """The sizes of one program of a kernel, with its launch options."""

    block_b: int  # sequences
    block_h: int  # hidden units
    num_warps: int
    max_registers: int | None  # a thread's; None where the compiler has no such option
    precision: str  # of products, as tl.dot's input_precision
    shared_bytes: int  # an upper bound of the compiler's figure
    # For schedule cooperative:
    at_once: int = 1  # batch tiles in a launch
    halved: bool = False  # half of the weights is in shared memory

    @property
    def elements(self) -> int:
        """The sequences and units of a thread."""
        return self.block_b * self.block_h // (32 * self.num_warps)

    def __str__(self) -> str:
        return f"{self.block_b} rows x {self.block_h} units, {self.num_warps} warps"


@dataclass(frozen=True)
class Plan:
    """One launch of ``layers`` layers, or in schedule stepwise one a step, with its tiles."""

    schedule: str  # a name in SCHEDULES
    forward: Tiles
    backward: Tiles | None
    layers: int = 1

    def describe(self) -> str:
        """Returns the plan in one line, as ``explain`` prints it."""
        parts = [f"forward {self.forward}"]
        if self.backward:
            parts.append(f"backward {self.backward}")
        if self.layers > 1:
            parts.append(f"{self.layers} layers as a wavefront")
        return f"{self.schedule}: {'; '.join(parts)}"
