"""The limits by themselves; ``test_compile.py`` holds them against the compiler."""

from fusedrnn.kernels.limits import padded_units, resident_bytes, slice_needs
from fusedrnn.kernels.spec import SPECS


def test_units_are_padded_to_a_power_of_two():
    assert [padded_units(H) for H in (1, 16, 17, 64, 65, 256)] == [16, 16, 32, 64, 128, 256]


def test_shared_memory_worked_out_by_hand():
    # W_hh of an LSTM with H = 128 in bf16, and 16 rows of h and of four gates.
    assert resident_bytes("16-bit", 4, 128, 8) == 4 * 128 * 128 * 2 + 16 * 5 * 128 * 2
    assert resident_bytes("tf32x3", 4, 64, 8) == 2 * resident_bytes("tf32", 4, 64, 8)


def test_the_needs_of_a_slice_worked_out_by_hand():
    # 16 units of an LSTM with H = 512 in bf16, 16 sequences, 4 warps with 128 columns each.
    lstm = SPECS["lstm"]
    weights, operand, sums = 4 * 16 * 512 * 2 // 512, 16 * 512 * 2 // 512, 4 * 16 * 16 // 32
    needs = slice_needs(lstm, "16-bit", 1, True, 512, 16, 16, 4)
    assert needs == (weights + operand + sums, 4 * 4 * 16 * 16 * 4, 4 * 8 * 2, 16 * 512 * 2)
    # Backward the columns are those of all gates, and the rows the units alone.
    back = slice_needs(lstm, "16-bit", 1, False, 512, 16, 16, 4)
    assert back == (weights + 4 * operand + sums // 4, 4 * 16 * 16 * 4, needs.mma, 16 * 2048 * 2)
    # A layer above the first holds W_ih too, and the input's part of n in the GRU is its own sum.
    one, two = (slice_needs(SPECS["gru"], "tf32", n, True, 128, 16, 8, 4) for n in (1, 2))
    assert (two.mma, two.shared_bytes) == (2 * one.mma, one.shared_bytes * 4 // 3)
