"""The rows of a call: the address of each step of each sequence, and the state it continues from.

This is the one mechanism behind ``lengths``, ``reset`` and packed input, in every schedule and in
the CPU's loop.

A *row* is one step of one sequence. Tensors with a row for each step (gx, out, gates, cs, dgates)
are dense, with row ``t * B + b`` and R = T * B; or packed as in torch, with the sequences by
falling length: step t of the sequences that have one is in rows ``starts[t] .. starts[t] +
sizes[t]``, and R is the sum of the sizes.

``origins [D, T, B]`` says for each direction, step and sequence which state enters the step:

- ``SKIPPED``: none, there is no such step. The state stays as it is, the row's results are 0
  (dense) or absent (packed), and no gradient enters or leaves.
- ``PREVIOUS``: the state that left the step before, in the order of the direction.
- ``ZERO``: zero, because a new sequence begins. The gradient of the state ends at this step.
- ``INITIAL``: h_0 and c_0, because this is the first step of the sequence.

The reverse direction begins at the end of each sequence: the steps before it are skipped. A
sequence that begins at t (``reset[t]``) is cut off from t - 1 in both directions: the state is 0
before step t forward, and before step t - 1 in reverse.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

SKIPPED, PREVIOUS, ZERO, INITIAL = range(4)


class Rows(NamedTuple):
    """The steps of one call. Without tensors, every sequence has every step, densely."""

    T: int
    B: int
    #: int32 ``[D, T, B]`` on the tensors' device, or None where only step 0 is not ``PREVIOUS``.
    origins: Tensor | None = None
    #: Packed: int64 ``[T]`` on the CPU, how many sequences have step t; else None.
    sizes: Tensor | None = None
    #: Packed: int32 ``[T]`` on the tensors' device, the row of step t of sequence 0; else None.
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


def origins_of(
    T: int,
    B: int,
    D: int,
    device: torch.device,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """Returns ``origins [D, T, B]`` for lengths ``[B]`` and reset, bool ``[T, B]``, or None.

    It reads no value on the host, so it does not wait for a GPU. Lengths beyond T count as T,
    negative ones as 0, and resets after the end of a sequence are ignored.
    """
    if lengths is None:
        present = torch.ones(T, B, dtype=torch.bool, device=device)
    else:
        present = torch.arange(T, device=device).unsqueeze(1) < lengths.to(device)
    begins = None if reset is None else reset.to(device) & present
    found = [present.to(torch.int32)]  # SKIPPED or PREVIOUS
    if D == 2:
        found.append(found[0] * INITIAL)
        found[1][: T - 1].masked_fill_(present[1:], PREVIOUS)
    first = found[0][:1]
    first.add_(first, alpha=INITIAL - 1)
    if begins is not None:
        found[0].masked_fill_(begins, ZERO)
        if D == 2:
            found[1][: T - 1].masked_fill_(begins[1:], ZERO)
    return torch.stack(found) if D == 2 else found[0].unsqueeze(0)


def packed_table(batch_sizes: Tensor, B: int, device: torch.device) -> Tensor:
    """Returns of packed input the first row of each step and the steps of each sequence.

    int32 ``[T + B]`` on the device, int64 if the rows need that. It is one copy, for which the
    host does not wait.

    Args:
        batch_sizes: int64 ``[T]`` on the CPU, as in torch.
        B: the number of sequences, of which some may have no step at all.
    """
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(B, device="cpu")).sum(0)
    starts = batch_sizes.cumsum(0) - batch_sizes
    table = torch.cat([starts, lengths])
    # A compiler has no values, by which it could choose.
    if not torch.compiler.is_compiling() and int(batch_sizes.sum()) < 2**31:
        table = table.int()
    return table.to(device, non_blocking=True)


def packed_rows(batch_sizes: Tensor, table: Tensor, D: int, reset: Tensor | None = None) -> Rows:
    """Returns the rows of packed input with ``batch_sizes [T]`` and their ``packed_table``.

    Args:
        reset: bool ``[T, B]``, with the sequences by falling length, or None.
    """
    T, B = len(batch_sizes), len(table) - len(batch_sizes)
    starts, lengths = table.split([T, B])
    return Rows(T, B, origins_of(T, B, D, table.device, lengths, reset), batch_sizes, starts)
