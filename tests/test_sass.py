"""Reading SASS: control words, a listing, the turn of a loop, and kinds of instructions."""

import pytest

from fusedrnn.kernels import sass
from fusedrnn.kernels.sass import NO_BOARD, Instruction, read_listing, trace

#: A polling loop, and a branch around an instruction, inside the loop over T.
LISTING = """
        /*0000*/  MOV R1, R2 ;                /* 0x0000000000000000 */
                                              /* 0x000fe20000000800 */
.L_x_0:
        //## File "/somewhere/cells.py", line 7
        /*0010*/  FADD R1, R1, R1 ;  /* 0x0000000000000000 */ /* 0x000fe20000000800 */
.L_x_1:
        /*0020*/  LDG.E R3, [R2.64] ;  /* 0x0000000000000000 */ /* 0x000e220000000800 */
        /*0030*/  @!P1 BRA `(.L_x_1) ;  /* 0x0000000000000000 */ /* 0x001fe20000000800 */
        /*0040*/  BRA `(.L_x_2) ;  /* 0x0000000000000000 */ /* 0x000fe20000000800 */
        /*0050*/  MOV R1, R2 ;  /* 0x0000000000000000 */ /* 0x000fe20000000800 */
.L_x_2:
        /*0060*/  @P0 BRA `(.L_x_0) ;  /* 0x0000000000000000 */ /* 0x000fea0000000800 */
"""


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
    assert sass.decode(high) == expected


def test_traces_the_loop_over_time():
    instructions = read_listing(LISTING)
    path = trace(instructions)
    assert [each.address for each in path] == [0x10, 0x20, 0x30, 0x40, 0x60]
    assert (path[0].line, path[1].write, path[2].wait) == ("cells.py:7", 0, 1)
    assert trace(instructions[:1]) == []
    with pytest.raises(ValueError, match="no end"):
        trace([each._replace(predicate="") for each in instructions])
    with pytest.raises(ValueError, match="no instruction"):
        read_listing("")


def test_counts_of_kinds():
    names = ["LDG.E.128", "LD.E.STRONG", "BRA", "HMMA.16816", "MUFU.EX2", "FFMA", "BRA"]
    counts = sass.count_kinds([Instruction(i, name) for i, name in enumerate(names)])
    assert {kind: n for kind, n in counts.items() if n} == {
        "tensor core": 1, "MUFU": 1, "global load": 2, "FMA unit": 1, "control": 2, "total": 7,
    }  # fmt: skip
