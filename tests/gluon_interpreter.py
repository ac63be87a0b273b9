"""Runs Gluon kernels in Triton's interpreter, which knows no layouts and no shared memory.

Layouts are ignored, buffers of shared memory hold the last tile that was written to them, and
inline assembly is replaced by what it computes. Barriers are not modelled: programs run one after
the other, and each as if all of its threads ran in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere
from triton.runtime.interpreter import TensorHandle


class Buffer:
    """A tile in shared memory, or a transposed view of one."""

    def __init__(
        self, dtype: tl.dtype, shape: Sequence[int], layout: Any = None, tile: Any = None
    ) -> None:
        self.dtype, self.shape = dtype, [int(size) for size in shape]
        self.tile: tl.tensor | None = tile  # if nothing was written a read fails

    def store(self, tile: tl.tensor) -> None:
        assert list(tile.shape) == self.shape
        assert tile.dtype == self.dtype
        self.tile = tile

    def permute(self, order: tuple[int, ...]) -> Buffer:
        shape = [self.shape[axis] for axis in order]
        return Buffer(self.dtype, shape, tile=tl.permute(self.tile, order))

    def slice(self, start: int, length: int, dim: int = 0) -> Buffer:
        data = self.tile.handle.data.take(range(int(start), int(start + length)), int(dim))
        return Buffer(self.dtype, data.shape, tile=tensor(data, self.dtype))

    def load(self, layout: Any) -> tl.tensor:
        return self.tile


def tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))


def arange(start: int, stop: int, layout: Any = None) -> tl.tensor:
    """Unlike ``tl.arange``, for a single number too."""
    return tensor(np.arange(int(start), int(stop), dtype=np.int32), tl.int32)


def assembly(code: str, constraints: str, args: list, dtype: tl.dtype, *_: Any) -> tl.tensor:
    """The instructions that the kernels use, by their names."""
    x = args[0]
    if "ld.acquire" in code:
        return poll(*args)
    if "red.release" in code:
        return tl.atomic_add(x, 1, sem="release", scope="gpu")
    if code.startswith("and"):
        return tl.where(args[1] == 0, 0.0, x)
    unary = {"ex2": tl.exp2, "rcp": lambda x: 1.0 / x, "bar": lambda x: x, "cvt": round_to_tf32}
    return unary[code.partition(".")[0]](x)


def poll(one: Any, other: Any, target: Any, others: Any, patience: Any, count: Any) -> tl.tensor:
    """1 when each of ``count`` counters has reached its target, 0 after so many polls."""
    for counter, wanted in ((one, target), (other, others))[: _number(count)]:
        for _ in range(_number(patience)):
            if _number(tl.atomic_add(counter, 0, sem="acquire", scope="gpu")) >= _number(wanted):
                break
        else:
            return tl.full([], 0, tl.int32)
    return tl.full([], 1, tl.int32)


def _number(value: Any) -> int:
    return int(value.handle.data.item() if hasattr(value, "handle") else value)


def round_to_tf32(x: tl.tensor) -> tl.tensor:
    """To the nearest of 11 significant bits."""
    bits = x.handle.data.view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    finite = np.isfinite(x.handle.data)
    return tensor(np.where(finite, rounded, x.handle.data), tl.float32)


def full(shape: list[int], value: float, dtype: tl.dtype, layout: Any = None) -> tl.tensor:
    return tl.full([int(size) for size in shape], value, dtype)


def mma_v2(a: tl.tensor, b: tl.tensor, acc: tl.tensor, input_precision: str = "") -> tl.tensor:
    """Exact products: the operands are rounded before, or not at all."""
    return tl.dot(a, b, acc, input_precision="ieee")


def install() -> None:
    """Replaces Gluon's language for all kernels imported from now on; layouts stay Gluon's."""
    gluon.jit, ampere.mma_v2 = triton.jit, mma_v2
    gl.arange, gl.full = arange, full
    gl.split, gl.join = lambda x: tl.split(x), lambda a, b: tl.join(a, b)  # replaced later in tl
    gl.convert_layout = gl.set_auto_layout = lambda x, *_, **__: x
    gl.allocate_shared_memory, gl.inline_asm_elementwise = Buffer, assembly
    gl.barrier = lambda: None
