"""Predicted times: reading SASS, timing hand-made traces, ordering variants of one kernel."""

import pytest

from fusedrnn.kernels import sass
from fusedrnn.kernels.latencies import TIMINGS
from fusedrnn.kernels.sass import NO_BOARD, Instruction, decode, read_listing, trace
from fusedrnn.kernels.steptime import cost, predict

SM = TIMINGS["sm_90"]
#: A polling loop, and a branch around an instruction, inside the loop over T.
LISTING = """
        /*0000*/  MOV R1, R2 ;                /* 0x0000000000000000 */
                                              /* 0x000fe20000000800 */
.L_x_0:
        //## File "/somewhere/cells.py", line 7
        /*0010*/  FADD R1, R1, R1 ;           /* 0x0000000000000000 */
                                              /* 0x000fe20000000800 */
.L_x_1:
        /*0020*/  LDG.E R3, [R2.64] ;         /* 0x0000000000000000 */
                                              /* 0x000e220000000800 */
        /*0030*/  @!P1 BRA `(.L_x_1) ;        /* 0x0000000000000000 */
                                              /* 0x001fe20000000800 */
        /*0040*/  BRA `(.L_x_2) ;             /* 0x0000000000000000 */
                                              /* 0x000fe20000000800 */
        /*0050*/  MOV R1, R2 ;                /* 0x0000000000000000 */
                                              /* 0x000fe20000000800 */
.L_x_2:
        /*0060*/  @P0 BRA `(.L_x_0) ;         /* 0x0000000000000000 */
                                              /* 0x000fea0000000800 */
"""
PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u32 steps) {{
  .reg .pred %p; .reg .b32 %r<4>; .reg .f32 %f<3>; .reg .b64 %d<3>; .shared .b32 buffer[1024];
  ld.param.u64 %d1, [out]; ld.param.u32 %r1, [steps];
  mov.u32 %r2, %tid.x; shl.b32 %r3, %r2, 2;
  mov.u32 %r2, buffer; add.u32 %r3, %r3, %r2; mov.f32 %f1, 0f3F800000;
again:
  .pragma "nounroll";
  {body}
  sub.u32 %r1, %r1, 1; setp.ne.u32 %p, %r1, 0; @%p bra again;
  st.global.f32 [%d1], %f1; ret;
}}
"""
EXCHANGE = "st.shared.f32 [%r3], %f1; bar.sync 0; ld.shared.f32 %f1, [%r3+4]; bar.sync 0;"


def loop_of(*parts):
    """Instructions from (name, fields), then the branch that closes the loop."""
    made = [Instruction(16 * n, name, **fields) for n, (name, fields) in enumerate(parts)]
    return [*made, Instruction(16 * len(made), "BRA", "`(.L_x_0)", "@P0", stall=5)]


def cycles(path, warps=1, sm=SM):
    return predict(path, sm, warps).cycles


def compiled(body, folder):
    text, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    text.write_text(PTX.format(body=body))
    sass.run_tool("ptxas", "-arch=sm_90", "-o", str(binary), str(text))
    return sass.read(binary.read_bytes())


@pytest.mark.parametrize(
    ("high", "stall", "stay", "write", "read_board", "wait"),
    [
        (0x008FE20000041814, 1, True, NO_BOARD, NO_BOARD, 8),  # HMMA that waits for scoreboard 3
        (0x000E220000000800, 1, True, 0, NO_BOARD, 0),  # MUFU.EX2, releases scoreboard 0
        (0x0001E2000C10190C, 1, True, NO_BOARD, 0, 0),  # STG, releases 0 when it has read
        (0x001FC60000000883, 3, False, NO_BOARD, NO_BOARD, 1),  # MUFU, another warp may follow
    ],
)
def test_decodes_the_control_word(high, stall, stay, write, read_board, wait):
    expected = {"stall": stall, "stay": stay, "write": write, "read": read_board, "wait": wait}
    assert decode(high) == expected


def test_traces_the_loop_over_time():
    instructions = read_listing(LISTING)
    path = trace(instructions)
    assert [each.address for each in path] == [0x10, 0x20, 0x30, 0x40, 0x60]
    assert (path[0].line, path[1].write, path[2].wait) == ("cells.py:7", 0, 1)
    assert trace(instructions[:1]) == []
    with pytest.raises(ValueError, match="no end"):
        trace([each._replace(predicate="") for each in instructions])


@pytest.mark.parametrize("arch", TIMINGS)
def test_every_kind_of_instruction_has_its_pipe(arch):
    pipes = {
        "HMMA.16816.F32": "tensor", "MUFU.EX2": "mufu", "FFMA": "fma", "IMAD.WIDE": "imad",
        "STG.E.128": "memory", "LOP3": "alu", "BAR.SYNC": "barrier", "BRA": "control",
    }  # fmt: skip
    costs = {name: cost(Instruction(0, name), TIMINGS[arch]) for name in pipes}
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
    matrices = loop_of(*[("LDSM.16.M88.4", {"write": 0})] * 16, ("FADD", {"wait": 1}))
    assert 512 <= cycles(matrices, 8) < 600  # 8 x 16 x 512 bytes at 128 a cycle


def test_a_barrier_waits_for_the_last_warp():
    path = loop_of(("BAR.SYNC", {"operands": "0x0"}))
    assert cycles(path, 8) - cycles(path, 1) == pytest.approx(7 * SM.arrive, abs=2)
    slower = cycles(path, 8, SM._replace(barrier=120.0)) - cycles(path, 8)
    assert slower == pytest.approx(100)
    found = predict(path, SM, 8)
    assert sum(found.spent.values()) == pytest.approx(found.cycles)
    assert found.waits[0][1] == "barrier"


def test_a_hop_begins_when_the_program_publishes():
    """And ends when it may read the counter, whatever the program does in between."""
    path = loop_of(("REDG.E.ADD.STRONG.GPU", {}), *[("FADD", {"stall": 4})] * 20,
                   ("LDG.E.STRONG.GPU", {"write": 0}), ("FADD", {"wait": 1}))  # fmt: skip
    hop = SM.hop_us * SM.mhz
    assert hop < cycles(path) < hop + 2 * SM.branch
    sooner = cycles(path, sm=SM._replace(hop_us=0.5))
    assert cycles(path) - sooner == pytest.approx(hop - 0.5 * SM.mhz)


def test_orders_two_variants_and_repeats_itself(tmp_path):
    one, four = (trace(compiled(EXCHANGE * n, tmp_path)) for n in (1, 4))
    fast, slow = (predict(path, SM, 4) for path in (one, four))
    assert (fast.barriers, slow.barriers) == (2, 8)
    assert 3 < slow.cycles / fast.cycles < 4.5
    assert predict(four, SM, 4) == slow
    assert "8 barriers" in slow.report()
