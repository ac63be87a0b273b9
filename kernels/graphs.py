"""Pieces of a loop over T as CUDA graphs: the host launches one graph for many steps.

A graph freezes every address and number, and a call's tensors are new each time. So a piece of the
loop works on buffers of its own, as long as its steps: what the steps read is copied in, the graph
runs, what they wrote is copied out. What is carried from step to step stays in the piece's buffers
from one piece to the next. The copies are one launch for each tensor and direction, however many
steps there are.

A *series* is a tensor with one entry a step, and the dimension of time: 1 for ``[D, T, ...]``, 0
for ``[T, B, D, ...]``. In the s-th piece direction 0 takes the s-th steps from the beginning,
direction 1 from the end. The steps left over at the end, fewer than a piece, run without a graph.

Everything a graph freezes is in its key. The first call of a key runs without a graph: it compiles
kernels and warms up libraries, which no capture may, and shapes that never return cost nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Series = tuple[Tensor | None, int]


class Loop(NamedTuple):
    """A loop over T and the tensors of one call."""

    #: ``run(state, *tensors)`` runs as many steps as the tensors hold, on the current stream.
    run: Callable[..., None]
    state: Sequence[Tensor | None]  # carried from step to step
    series: Sequence[Series]
    written: Sequence[bool]  # which series the loop writes; the others it reads
    T: int
    backwards: bool = False  # from the last step to the first
    #: What else ``run`` takes, after the series: the state that enters the first step.
    entering: Sequence[Tensor | None] = ()
    #: ``enter(first, tensors)`` fills it in, when a piece's series are there.
    enter: Callable[[int, Sequence[Tensor | None]], None] = lambda first, tensors: None

    def directly(self) -> None:
        """All steps, on the call's own tensors."""
        self.run(self.state, *(tensor for tensor, _ in self.series), *self.entering)


class Piece(NamedTuple):
    """Some steps, captured."""

    state: list[Tensor | None]
    tensors: list[Tensor | None]
    replay: Callable[[], None]
    lock: threading.Lock  # one call at a time puts its copies and replays on the stream


class Graphs:
    """The captured pieces, at most ``room``; who was longest unused goes first."""

    def __init__(self, capture: Callable[[Callable[[], None]], Callable[[], None]], room: int = 8):
        self._capture, self._room = capture, room
        self._pieces: OrderedDict[Hashable, Piece | None] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, loop: Loop, steps: int, key: Hashable) -> None:
        """All steps of the loop, in graphs of so many steps once the key was seen before.

        key: all that the loop depends on, besides the contents of its tensors and T.
        """
        piece = self._piece(loop, steps, key)
        if piece is None:
            loop.directly()
            return
        with piece.lock:
            _copy(loop.state, piece.state)
            firsts = range(0, loop.T, steps)
            for first in reversed(firsts) if loop.backwards else firsts:
                count = min(steps, loop.T - first)
                if count == steps:
                    tensors, replay = piece.tensors, piece.replay
                else:
                    tensors = _buffers(loop, count)
                    replay = _bound(loop, piece.state, tensors)
                _exchange(loop, tensors, first, count, inwards=True)
                loop.enter(first, tensors)
                replay()
                _exchange(loop, tensors, first, count, inwards=False)
            _copy(piece.state, loop.state)

    def _piece(self, loop: Loop, steps: int, key: Hashable) -> Piece | None:
        """The captured piece, or None at the first sight of the key."""
        with self._lock:
            seen = key in self._pieces
            piece = self._pieces.setdefault(key, None)
            self._pieces.move_to_end(key)
            if seen and piece is None:
                state = [None if t is None else torch.zeros_like(t) for t in loop.state]
                tensors = _buffers(loop, steps)
                replay = self._capture(_bound(loop, state, tensors))
                piece = self._pieces[key] = Piece(state, tensors, replay, threading.Lock())
            if len(self._pieces) > self._room:
                self._pieces.popitem(last=False)
            return piece


def _bound(loop: Loop, state: list[Tensor | None], tensors: list[Tensor | None]) -> Callable:
    """The run on these tensors. It must not keep the call's own alive, as ``loop`` would."""
    run = loop.run
    return lambda: run(state, *tensors)


def _buffers(loop: Loop, count: int) -> list[Tensor | None]:
    """Tensors like the call's, so many steps long. Zeros: a capture's warm-up reads them."""
    buffers: list[Tensor | None] = []
    for tensor, time in loop.series:
        if tensor is None:
            buffers.append(None)
        else:
            buffers.append(tensor.new_zeros(*tensor.shape[:time], count, *tensor.shape[time + 1 :]))
    return buffers + [None if t is None else torch.zeros_like(t) for t in loop.entering]


def _exchange(
    loop: Loop, buffers: Sequence[Tensor | None], first: int, count: int, *, inwards: bool
) -> None:
    """Copies the steps from ``first`` on: what is read into the buffers, what was written out."""
    spans = slice(first, first + count), slice(loop.T - first - count, loop.T - first)
    for (tensor, time), buffer, written in zip(loop.series, buffers, loop.written, strict=False):
        if tensor is None or buffer is None or written == inwards:
            continue
        for d in range(tensor.shape[0 if time == 1 else 2]):
            whole = tensor[d, spans[d]] if time == 1 else tensor[spans[d], :, d]
            part = buffer[d] if time == 1 else buffer[:, :, d]
            if inwards:
                part.copy_(whole)
            else:
                whole.copy_(part)


def _copy(sources: Sequence[Tensor | None], targets: Sequence[Tensor | None]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source is not None and target is not None:
            target.copy_(source)


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Captures what ``run`` puts on the current stream; calling the result does it again.

    Waits for the device. It runs once before, since no capture may load a kernel's binary.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # "thread_local": another thread may allocate meanwhile, as a loader that pins memory does.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


GRAPHS = Graphs(capture)
