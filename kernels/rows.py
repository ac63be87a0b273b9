"""Which sequence has a step at which time, in which row it stands, and where its state comes from.

The one mechanism behind ``lengths``, ``reset`` and packed input, in every schedule and in the
plain-torch loop. Axes: T time, B batch, D directions, R rows.

A *row* is one step of one sequence. What has a row for each step (gx, out, gates, cs, dgates) is
dense, with row ``t * B + b`` and R = T * B; or packed as torch packs: sequences by falling length,
step t of those that have one in rows ``starts[t] .. starts[t] + sizes[t]``, and R is their sum.

``origins [D, T, B]`` says for each direction, step and sequence where the state comes from that
enters the step:

- ``SKIPPED``: there is no such step. The state stays what it is, the row's outputs are 0 (dense)
  or absent (packed), and no gradient enters or leaves.
- ``PREVIOUS``: the step before, in the order of the direction.
- ``ZERO``: a new sequence begins here: the state is 0, and its gradient ends here.
- ``INITIAL``: the given h_0 and c_0: the first step that the sequence has.

A direction that runs backwards begins at each sequence's own end, since what it skips comes first.
A sequence that begins at t (``reset[t]``) is cut off from t - 1 in both directions: forward the
state is 0 before step t, backward before step t - 1.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

SKIPPED, PREVIOUS, ZERO, INITIAL = range(4)
#: Rows behind packed dgates: a step's tile of rows reads as many as it has, whether or not all of
#: them are the step's. A mask instead spilled up to 48 bytes of registers at H = 512 to 1024.
SLACK = 32


class Rows(NamedTuple):
    """The steps of one call. Without tensors: all sequences have all steps, densely."""

    T: int
    B: int
    #: int8 ``[D, T, B]`` on the tensors' device, or None where only step 0 is not ``PREVIOUS``.
    origins: Tensor | None = None
    #: Packed: int64 ``[T]`` on the CPU, how many sequences have step t; else None.
    sizes: Tensor | None = None
    #: Packed: int64 ``[T]`` on the tensors' device, the row of step t of sequence 0; else None.
    starts: Tensor | None = None

    @property
    def total(self) -> int:
        """R."""
        return self.T * self.B if self.sizes is None else int(self.sizes.sum())

    def spans(self) -> list[slice]:
        """The rows of each step."""
        sizes = [self.B] * self.T if self.sizes is None else self.sizes.tolist()
        ends = list(accumulate(sizes))
        return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    @property
    def switches(self) -> dict[str, bool]:
        """The compile-time arguments of every kernel that depend on the form of the rows."""
        return {"RAGGED": self.origins is not None, "PACKED": self.sizes is not None}


def origins_of(
    T: int,
    B: int,
    D: int,
    device: torch.device,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """``origins [D, T, B]`` of lengths ``[B]`` (None: all T) and reset, bool ``[T, B]`` (None: no).

    Without a look at the values: nothing here waits for the device. Lengths beyond T count as T,
    negative ones as 0, and resets after the end of a sequence are ignored.
    """
    ones = torch.ones(T + 1, B, dtype=torch.bool, device=device)
    ones[T] = False
    times = torch.arange(T + 1, device=device).unsqueeze(1)
    present = ones if lengths is None else ones & (times < lengths.to(device))
    begins = torch.zeros_like(present)
    if reset is not None:
        begins[:T] = reset.to(device)
        begins &= present
    origins = torch.full((D, T, B), PREVIOUS, dtype=torch.int8, device=device)
    origins[0, :1] = INITIAL
    origins[0].masked_fill_(begins[:T], ZERO)
    if D == 2:
        origins[1].masked_fill_(~present[1:], INITIAL)
        origins[1].masked_fill_(begins[1:], ZERO)
    return origins.masked_fill_(~present[:T], SKIPPED)


def packed_rows(
    batch_sizes: Tensor,
    D: int,
    device: torch.device,
    reset: Tensor | None = None,
    B: int | None = None,
) -> Rows:
    """The rows of packed input, whose ``batch_sizes [T]`` are on the CPU as torch has them.

    reset: bool ``[T, B]``, its sequences by falling length, or None; B: how many sequences there
    are, if some have no step at all.
    """
    T, B = len(batch_sizes), int(batch_sizes[0]) if B is None else B
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(B, device="cpu")).sum(0)
    starts = batch_sizes.cumsum(0) - batch_sizes
    origins = origins_of(T, B, D, device, lengths, reset)
    return Rows(T, B, origins, batch_sizes, starts.to(device))
