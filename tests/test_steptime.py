"""Predicted times of hand-made traces, and the order of variants of one kernel."""

import pytest

from fusedrnn.kernels.latencies import TIMINGS
from fusedrnn.kernels.sass import Instruction
from fusedrnn.kernels.steptime import cost, predict

SM = TIMINGS["sm_90"]


def loop_of(*parts):
    """Instructions from (name, fields), then the branch that closes the loop."""
    made = [Instruction(16 * n, name, **fields) for n, (name, fields) in enumerate(parts)]
    return [*made, Instruction(16 * len(made), "BRA", "`(.L_x_0)", "@P0", stall=5)]


def cycles(path, warps=1, sm=SM):
    return predict(path, sm, warps).cycles


def test_every_kind_of_instruction_has_its_pipe():
    pipes = {
        "HMMA.16816.F32": "tensor", "MUFU.EX2": "mufu", "FFMA": "fma", "IMAD.WIDE": "imad",
        "STG.E.128": "memory", "LOP3": "alu", "BAR.SYNC": "barrier", "BRA": "control",
    }  # fmt: skip
    costs = {name: cost(Instruction(0, name), SM) for name in pipes}
    assert {name: each.pipe for name, each in costs.items()} == pipes


def test_hand_made_traces():
    chain = loop_of(*[("FADD", {"stall": 4})] * 10)
    assert cycles(chain) == pytest.approx(40 + SM.branch, abs=1)
    many = loop_of(*[("MUFU.EX2", {})] * 32)
    assert cycles(many) == pytest.approx(32 * SM.mufu, abs=SM.mufu + SM.branch)
    assert cycles(many, 4) == pytest.approx(cycles(many), abs=1)  # each scheduler has a pipe
    assert cycles(many, 8) > 1.8 * cycles(many, 4) - 2 * SM.branch  # two warps share it
    load = loop_of(("LDG.E", {"write": 0}), ("FADD", {"wait": 1}))
    near, far = (cycles(load, sm=SM._replace(l2=latency)) for latency in (300.0, 600.0))
    assert far - near == pytest.approx(300, abs=1)
    both = loop_of(("LDG.E", {"write": 0}), ("LDS", {"write": 0}), ("FADD", {"wait": 1}))
    assert cycles(both) >= cycles(load)  # a scoreboard waits for all
    matrices = loop_of(*[("LDSM.16.M88.4", {"write": 0})] * 16, ("FADD", {"wait": 1}))
    assert 512 <= cycles(matrices, 8) < 600  # 8 x 16 x 512 bytes at 128 a cycle


def test_a_barrier_waits_for_the_last_warp():
    path = loop_of(("BAR.SYNC", {"operands": "0x0"}))
    assert cycles(path, 8) - cycles(path, 1) == pytest.approx(7 * SM.arrive, abs=2)
    slower = cycles(path, 8, SM._replace(barrier=120.0)) - cycles(path, 8)
    assert slower == pytest.approx(100)
    found = predict(path, SM, 8)
    assert sum(cycles for cycles, _ in found.spent("cause")) == pytest.approx(found.cycles)
    assert found.spent("cause")[0][1] == "barrier"


def test_a_hop_begins_when_the_program_publishes():
    """And ends when it may read the counter, whatever the program does in between."""
    path = loop_of(("REDG.E.ADD.STRONG.GPU", {}), *[("FADD", {"stall": 4})] * 20,
                   ("LDG.E.STRONG.GPU", {"write": 0}), ("FADD", {"wait": 1}))  # fmt: skip
    hop = SM.hop_us * SM.mhz
    assert hop < cycles(path) < hop + 2 * SM.branch
    sooner = cycles(path, sm=SM._replace(hop_us=0.5))
    assert cycles(path) - sooner == pytest.approx(hop - 0.5 * SM.mhz)


def test_orders_two_variants_and_repeats_itself():
    exchange = ("STS", {}), ("BAR.SYNC", {}), ("LDS", {"write": 0}), ("BAR.SYNC", {"wait": 1})
    one, four = (loop_of(*exchange * n) for n in (1, 4))
    fast, slow = (predict(path, SM, 4) for path in (one, four))
    assert (fast.barriers, slow.barriers) == (2, 8)
    assert 3 < slow.cycles / fast.cycles < 4.5
    assert predict(four, SM, 4) == slow
    assert "8 barriers" in slow.report()
