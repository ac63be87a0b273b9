"""Small products in the thread that asks for them.

torch hands products on the CPU to MKL, which shares even ``[32, 32] x [32, 128]`` among all threads
of the process. Those must meet before and after, which costs a step more than it saves. By a script
on two cores, torch 2.13, it takes two threads 6 us while the other core is at hand, 14 while it is
not, for tens of seconds on end on a virtual machine, and 60 to 120 once another thread of the
process has computed; one thread always takes 4.7. Nobody here can know which it will be. Whoever
calls ``torch.set_num_threads(1)`` for a small RNN gains the same, and loses what large products
gain.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Multiplications in a step's product, up to which one thread does it: two that are at hand take
#: 0.9 to 1.0 of its time up to here and 0.85 with twice as many, two that are not 1.3 to 1.8 and
#: 1.3 to 1.5. With more threads there are more to wait for.
_FEW = 1 << 17
#: Of fewer MKL makes one thread's work by itself: 2.5 us of 50 lost in an RNN, T = 5, B = 8, H = 8.
_FEWEST = 1 << 10
#: Steps that gain at least those of entering and leaving.
_WORTH_IT = 4


@cache
def _switch() -> Callable[[int], int] | None:
    """MKL's ``mkl_set_num_threads_local`` of the library that torch computes with.

    It holds for the thread that calls it alone, and returns what held before: what this thread said
    to ``torch.set_num_threads``, or 0, "as in the whole process". None where torch multiplies by
    another library, or is built in another way.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not (torch.backends.mkl.is_available() and library.exists()):
        return None
    # PyDLL keeps the GIL: it takes 0.2 us. Found, too, if MKL is a library of its own beside it.
    switch = getattr(ctypes.PyDLL(str(library)), "MKL_Set_Num_Threads_Local", None)
    if switch is not None:
        switch.argtypes, switch.restype = [ctypes.c_int], ctypes.c_int
    return switch


class _OneThread:
    """While it is entered, MKL's products in this thread are made by it alone."""

    __slots__ = ("before", "switch")

    def __init__(self, switch: Callable[[int], int]) -> None:
        self.switch = switch

    def __enter__(self) -> None:
        self.before = self.switch(1)

    def __exit__(self, *_: object) -> None:
        self.switch(self.before)


_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


def are_few(T: int, B: int, w_hh: Tensor) -> bool:
    """Whether T steps of B sequences, each multiplied by ``w_hh [G*H, P]``, gain by one thread."""
    return T >= _WORTH_IT and _FEWEST <= B * w_hh.numel() <= _FEW and w_hh.is_cpu


def alone(few: bool) -> AbstractContextManager[Any]:
    """The context for steps, of which ``are_few`` has spoken."""
    if not few or torch.get_num_threads() == 1 or (switch := _switch()) is None:
        return _AS_IT_IS
    return _OneThread(switch)
