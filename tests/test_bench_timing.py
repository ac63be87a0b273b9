"""How a GPU's times are taken, by a stand-in for ``torch.cuda``; and what the header says of it."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench import timing
from bench.cases import Workload
from bench.protocol import measure_block
from bench.providers import TORCH
from bench.report import environment, header
from bench.run import Settings
from bench.timing import WallClock, captured

CUDA = torch.device("cuda", 0)
#: Seconds that each event takes on the stand-in's clock.
TAKES = {"flush": 1000.0, "synchronize": 100.0, "call": 10.0, "start": 0.0, "end": 0.0}


class StandIn:
    """``torch`` and ``time`` of ``bench/timing.py``; notes what happens, in its order."""

    int8 = torch.int8

    def __init__(self):
        self.said, self.now, self.allocated = [], 0.0, 0
        self.cuda = SimpleNamespace(
            Event=self.event,
            synchronize=lambda device: self.happens("synchronize"),
            device=self.inside("device"),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: self.happens("replay")),
            graph=self.inside("graph"),
        )

    def happens(self, what):
        self.said.append(what)
        self.now += TAKES.get(what, 0.0)

    def perf_counter(self):
        return self.now

    def empty(self, size, dtype, device):
        self.allocated = size * dtype.itemsize
        return SimpleNamespace(zero_=lambda: self.happens("flush"))

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record():
            event.at = self.now
            self.happens("record")

        event.record = record
        event.synchronize = lambda: self.happens("wait")
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def inside(self, what):
        @contextmanager
        def context(*_):
            self.happens(f"enter {what}")
            yield
            self.happens(f"leave {what}")

        return context

    def call(self):
        self.happens("call")


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(timing, "torch", made)
    monkeypatch.setattr(timing, "time", made)
    return made


def test_wall_time_begins_behind_the_flush_and_ends_with_the_results(stand_in):
    clock = WallClock(CUDA)
    assert stand_in.allocated > 126e6  # B200's L2, the largest there is
    assert clock(stand_in.call) == 1e3 * (TAKES["call"] + TAKES["synchronize"])
    assert stand_in.said == ["flush", "synchronize", "call", "synchronize"]


def test_events_stand_between_the_flush_and_the_call(stand_in):
    clock = timing._CudaClock(CUDA)
    assert stand_in.allocated > 126e6
    assert clock(stand_in.call) == 1e3 * TAKES["call"]
    inside = ["flush", "record", "call", "record", "wait"]
    assert stand_in.said == ["enter device", *inside, "leave device"]


def test_on_cuda_every_call_has_its_flush(stand_in):
    calls = dict.fromkeys("ab", stand_in.call)
    timing.interleaved(calls, CUDA, seconds=0.0, least=3, warmed=True)
    assert stand_in.said.count("flush") == stand_in.said.count("call") == 6


def test_a_replay_is_of_the_graph_and_not_of_the_call(stand_in):
    replay = captured(stand_in.call, CUDA)
    assert stand_in.said == [
        "enter device", "enter graph", "call", "leave graph", "leave device",
    ]  # fmt: skip
    stand_in.said.clear()
    replay()
    assert stand_in.said == ["replay"]


@pytest.mark.parametrize(
    ("rnns", "matmuls"), [("tf32", "ieee"), ("ieee", "tf32"), ("tf32", "none")]
)
def test_the_header_says_how_fp32_is_multiplied(rnns, matmuls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch, value in zip(switches, (rnns, matmuls), strict=True):
            switch.fp32_precision = value
        first = header(environment(CUDA, "random input")).splitlines()[0]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
    assert first.startswith("device   A GPU; ")
    assert first.endswith(f"; fp32 as {rnns} (matmul {matmuls.replace('none', 'ieee')})")
    first = header(environment(torch.device("cpu"), "random input")).splitlines()[0]
    assert first.endswith("; fp32 as ieee (matmul ieee)")  # no CPU operator of ours knows tf32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_device_time_is_of_a_replayed_graph():
    x, doubled = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    replay = captured(lambda: torch.mul(x, 2, out=doubled), torch.device("cuda"))
    x.fill_(3)
    replay()
    assert doubled.eq(6).all()
    small = Workload("small", "toy", "none", T=4, B=3, I=5, H=32)
    settings = Settings(torch.device("cuda"), seconds=0.1)
    for prepared in measure_block([small], settings, (TORCH, "fusedrnn"), None):
        assert not prepared.complaints
        for row in prepared.rows.values():
            # Forward has no host in it, and so takes no longer than from the call to its results.
            assert 0 < row.fw_device_ms <= row.fw_ms_p80, row.note
            assert row.fwbw_device_ms or row.note.startswith("no graph of fwbw")
