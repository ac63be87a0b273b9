"""The loop's steps compiled by torch, ``STEPS`` at a time: the CPU's backend ``compiled``.

The loop calls torch for each operation of each step; a compiled chunk (``chunks.py``) does all that
stands between two products in one pass, and is entered once. It is nobody's default: it needs a C++
compiler and, for each size of each cell, direction and pass, 10 to 20 seconds, once on a machine:
the program is kept in torch's own cache of compiled code and loaded from there.

torch.compile itself would do the same and take 65 us a call for what it looks at, where 8 steps of
B = H = 32 take 84. So a chunk goes through ``torch.export`` and AOTInductor, the same compiler
without guards: what a program takes for granted is its key here. B is none of it, nor is T.

Compiled are small steps that are alike, those of dense rows. All others, and those that are left
when T is divided by ``STEPS``, are the loop's.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunks, reference
from .chunks import ADJOINTS, backward_chunk, forward_chunk, there
from .kernels.spec import SPECS, Weights
from .loop_cells import CELLS, State
from .steps import Part, Steps

#: Steps of one call. 16 take the same time a step, and twice as long to compile.
STEPS = 8
#: From how many steps on it pays: with B = H = 32 a GRU of T = 10 or 20 trains in 1.1 times the
#: loop's time, of T = 50 in 0.95, of T = 100 in 0.87.
_LEAST = 4 * STEPS
#: Multiplications in a step's product up to which it is compiled: above, the product takes most of
#: the time, and the loop's element-wise calls use all threads, which a compiled step does not.
_MOST = 1 << 19
#: One thread: a step's parallel loops would wait for each other longer than they take.
_OPTIONS = {"cpp.threads": 1}


def _takes(cell: str, s: Steps, w: Weights) -> bool:
    return s.is_dense and not refusal(cell, s.T, s.B * w.w_hh.numel(), w.w_hh.dtype)


def refusal(cell: str, T: int, products: int, dtype: torch.dtype) -> str | None:
    """Why none of T dense steps is compiled, or None.

    products: the multiplications of a step, B times the numbers of W_hh.
    """
    if cell not in ADJOINTS:
        return f"chunks.py has no adjoint of {cell}"
    if dtype not in (torch.float32, torch.float64):
        return "only fp32 and fp64 are compiled"
    if T < _LEAST:
        return f"of fewer than {_LEAST} steps none is compiled"
    if not products:
        return "there is nothing to compile"
    if products > _MOST:
        return f"steps of more than {_MOST:,} multiplications are not compiled"
    return None


def missing() -> str | None:
    """What compiling lacks on this machine, or None. It imports the compiler, in seconds."""
    return _missing()


# As torch.compiler.assume_constant_result sets it: a compiler that traces a call keeps the answer.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _missing() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler (it asks the environment's CXX, then for g++)"
    return None


class _Chunk(torch.nn.Module):
    """A chunk's function with all that is no tensor, as torch.export wants it."""

    def __init__(self, function: Callable, fixed: tuple) -> None:
        super().__init__()
        self.function, self.fixed = function, fixed

    def forward(self, *tensors):
        return self.function(*self.fixed, *tensors)


class _Like(NamedTuple):
    """All that a program takes for granted of a tensor, but for its dtype."""

    axis: int | None  # which is B, any; of weights None
    size: tuple[int, ...]  # but for B
    gap: int = 0  # numbers from row to row that are others'

    @classmethod
    def of(cls, tensor: Tensor, is_weight: bool) -> _Like:
        if is_weight:
            return cls(None, tuple(tensor.shape))
        *leading, n, columns = tensor.shape
        gap = tensor.stride(0) // n - columns if leading else 0
        return cls(len(leading), (*leading, columns), gap)

    def example(self, B: int, dtype: torch.dtype) -> Tensor:
        if self.axis is None:
            return torch.empty(self.size, dtype=dtype)
        *leading, columns = self.size
        return torch.empty(*leading, B, columns + self.gap, dtype=dtype)[..., :columns]


#: Takes the tensors that are there, and returns those.
Program = Callable[[list[Tensor]], list[Tensor]]
_PROGRAMS: dict[tuple, Program] = {}
_LOCK = Lock()


def _program(function: Callable, fixed: tuple, tensors: Sequence[Any]) -> Program:
    """``function(*fixed, *tensors)`` compiled for such tensors and any B.

    tensors: of steps ``[K, B, .]``, dense but for gaps between rows; of one ``[B, .]``, dense; and
    dense weights, the last three. None is there for what is not.
    """
    dtype, n = tensors[1].dtype, len(tensors)
    like = tuple(None if t is None else _Like.of(t, k >= n - 3) for k, t in enumerate(tensors))
    key = function, fixed, dtype, like
    program = _PROGRAMS.get(key)
    if program is None:
        with _LOCK:
            program = _PROGRAMS.get(key)
            if program is None:
                # A thread of its own is in none of the modes that the caller is in.
                with ThreadPoolExecutor(1) as thread:
                    program = thread.submit(_made_or_said_why, *key).result()
                _PROGRAMS[key] = program
    return program


def _made_or_said_why(*key: Any) -> Program:
    try:
        return _made(*key)
    except Exception as error:
        raise RuntimeError(
            f"backend 'compiled' could not compile steps of {key[1][0]}; backend 'torch' runs the "
            "same loop without a compiler"
        ) from error


def _made(function: Callable, fixed: tuple, dtype: torch.dtype, like: tuple) -> Program:
    """The program, loaded from the cache or compiled."""
    from torch._inductor import aoti_load_package
    from torch._inductor.codecache import cache_dir

    key = f"{_machine()} {STEPS} {function.__name__} {fixed} {dtype} {like}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = Path(cache_dir()) / "fusedrnn" / f"{name}.pt2"
    if not path.exists() or torch.compiler.config.force_disable_caches:
        _compile(function, fixed, dtype, like, path)
    return aoti_load_package(str(path)).loader.boxed_run


def _compile(function: Callable, fixed: tuple, dtype: torch.dtype, like: tuple, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    B = torch.export.Dim("B", min=1)
    examples = tuple(None if of is None else of.example(3, dtype) for of in like)
    sizes = tuple(None if of is None or of.axis is None else {of.axis: B} for of in like)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{os.getpid()}-{path.name}")
    with torch.no_grad(), warnings.catch_warnings():
        # Of what torch 2.13 calls its own LeafSpec, each time.
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec", FutureWarning)
        program = torch.export.export(
            _Chunk(function, fixed), examples, dynamic_shapes={"tensors": sizes}
        )
        aoti_compile_and_package(program, package_path=str(beside), inductor_configs=_OPTIONS)
    beside.replace(path)  # at once: another process may look for it


@cache
def _machine() -> str:
    """What the programs of another machine, or of other sources, would not fit."""
    sources = b"".join(
        Path(module.__file__).read_bytes() for module in (chunks, reference) if module.__file__
    )
    info = Path("/proc/cpuinfo")  # Linux alone has it
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith(("flags", "Feat"))] or lines
    parts: list[Any] = [torch.__version__, platform.machine(), flags[:1], _OPTIONS]
    return f"{parts} {hashlib.sha256(sources).hexdigest()}"


class _Chunks(NamedTuple):
    """The chunks of some dense steps in the order in which they are run, and what is left over."""

    first: int  # the earliest step of a chunk
    number: int
    B: int
    backwards: bool  # in time
    rest: Part

    @classmethod
    def of(cls, part: Part, backwards: bool) -> _Chunks:
        """From the start of a part on or, backwards, from its end."""
        number, left = divmod(len(part.sizes), STEPS)
        start, done, B = part.times.start, number * STEPS, part.most
        first = start + left if backwards else start
        times = range(start, first) if backwards else range(first + done, first + done + left)
        skipped = part.rows.start + (times.start - start) * B
        rest = Part(times, slice(skipped, skipped + left * B), [B] * left)
        return cls(first, number, B, backwards, rest)

    def each(self, rows: Tensor | None, since: int = 0) -> Sequence[Any]:
        """Of the rows ``[., .]`` of all steps since one, each chunk's ``[K, B, .]``."""
        if rows is None:
            return [None] * self.number
        size, start = STEPS * self.B, (self.first - since) * self.B
        own = rows[start : start + self.number * size]
        found = own.unflatten(0, (self.number, STEPS, self.B)).unbind(0)
        return found[::-1] if self.backwards else found

    def entered(self, initial: Tensor, left: Tensor) -> list[Tensor]:
        """The state ``[B, .]`` that entered each in the direction against which they are run.

        initial: that of all steps; left ``[R, .]``: what left each.
        """
        stop = self.first + self.number * STEPS
        if self.backwards:
            before = range(stop - STEPS - 1, self.first - 2, -STEPS)
        else:
            before = range(self.first + STEPS, stop + 1, STEPS)
        B, T = self.B, len(left) // self.B
        return [left[t * B : (t + 1) * B] if 0 <= t < T else initial for t in before]


def _dense(tensor: State) -> State:
    return None if tensor is None else tensor.contiguous()


def _own_biases(cell: str, w: Weights) -> Tensor | None:
    """b_hh, but zeros for what of it is a part of gx."""
    columns = w.w_hh.shape[0]
    own = CELLS[cell].own_biases * columns // SPECS[cell].gates
    return F.pad(w.b_hh[-own:], (columns - own, 0)) if own and w.b_hh is not None else None


def forward_steps(
    cell: str,
    s: Steps,
    w: Weights,
    room: Tensor,
    saves: bool,
    h: Tensor,
    c: State,
    hs: Tensor,
    cs: Tensor | None,
) -> tuple[Part, Tensor, State]:
    """Runs the steps of a dense direction for as far as there are whole chunks.

    room: ``[R, .]``, whose first columns are gx, and which becomes the gates if it saves them; h
    and c: what enters; hs ``[R, P]`` and cs ``[R, H]`` are written. Returns the steps that are left
    and the states that enter them.
    """
    if not _takes(cell, s, w):
        return s.whole, h, c
    chunks = _Chunks.of(s.whole, backwards=s.d == 1)
    saves = saves and SPECS[cell].saved > 0
    gx = chunks.each(room[:, : w.w_hh.shape[0]])
    results = list(zip(*map(chunks.each, there(room if saves else None, hs, cs)), strict=True))
    # Every step multiplies by W_hh^T, so it gets rows of its own.
    weights = w.w_hh.t().contiguous(), _own_biases(cell, w), _dense(w.w_hr)
    h, c = _dense(h), _dense(c)
    fixed, last = (cell, s.d, saves, cs is not None), 0 if s.d else -1
    program = _program(forward_chunk, fixed, [gx[0], h, c, *weights])
    for own, to in zip(gx, results, strict=True):
        found = program(there(own, h, c, *weights))
        for room_of_each, of_each in zip(to, found, strict=False):
            room_of_each.copy_(of_each)
        h = found[saves][last]
        if c is not None:
            c = found[-1] if cs is None else found[-1][last]
    return chunks.rest, h, c


def backward_steps(
    cell: str,
    s: Steps,
    part: Part,
    w: Weights,
    initial: Tensor,
    left: Tensor,
    gates: Tensor,
    d_out: Tensor | None,
    dgates: Tensor,
    dh: Tensor,
    dc: State,
) -> Part:
    """Runs some steps of a dense direction backwards, for as far as there are whole chunks.

    initial ``[B, .]``, left ``[R, .]``: c, or h of a cell without c; gates ``[R, S*H]``, d_out
    ``[R, P]``; dgates, of the part ``[r, N*H]``, is written; dh and dc are overwritten by those
    before the steps. Returns the steps that are left.
    """
    chunks = _Chunks.of(part, backwards=s.d == 0)
    if not chunks.number or not _takes(cell, s, w):
        return part
    tensors = gates if SPECS[cell].saved else None, left, d_out
    given = zip(*map(chunks.each, tensors), chunks.entered(initial, left), strict=True)
    grads, weights = [dh, dc], (_dense(w.w_hh), None, _dense(w.w_hr))
    to_each, program = chunks.each(dgates, part.times.start), None
    for to, (of_gates, of_left, of_out, first) in zip(to_each, given, strict=True):
        first = _dense(first)
        if program is None:
            like = of_gates, of_left, first, of_out, *grads, *weights
            program = _program(backward_chunk, (cell, s.d), like)
        found, *grads = program(there(of_gates, of_left, first, of_out, *grads, *weights))
        to.copy_(found)
    for carried, grad in zip(there(dh, dc), grads, strict=True):
        carried.copy_(grad)
    return chunks.rest
