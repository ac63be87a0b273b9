"""The limits by themselves; ``test_compile.py`` holds them against the compiler."""

import torch

from fusedrnn.kernels.limits import SliceNeeds, resident_bytes, slice_needs
from fusedrnn.kernels.problem import CHIPS, Problem, Tiles


def test_shared_memory_worked_out_by_hand():
    # W_hh of an LSTM with H = 128 in bf16, and 16 rows of h and of four gates.
    assert resident_bytes("16-bit", 4, 128, 8) == 4 * 128 * 128 * 2 + 16 * 5 * 128 * 2
    assert resident_bytes("tf32x3", 4, 64, 8) == 2 * resident_bytes("tf32", 4, 64, 8)


def test_a_slice_worked_out_by_hand():
    """16 units of an LSTM with H = 512 in bf16, 8 rows of h, 4 warps of 32 threads."""
    weights, operand, sums = 4 * 16 * 512 * 2, 8 * 512 * 2, 4 * 16 * 8 * 4  # bytes
    registers = weights // 4 // 128 + operand // 4 // 128 + sums // 4 // 32
    mma = 4 * 512 // 16 // 4
    problem, tiles = Problem("lstm", 512, 8, 1, torch.bfloat16, "", True), Tiles(8, 16, 4, 0, "", 0)
    chip = CHIPS["sm_90"]._replace(shared_bytes=4 * sums)
    needs = slice_needs(problem, chip, True, tiles)
    assert needs == SliceNeeds(registers, 4 * sums, mma, operand)
    assert slice_needs(problem._replace(hidden_size=500), chip, True, tiles) == needs
    assert slice_needs(problem, chip._replace(shared_bytes=4 * sums - 1), True, tiles) is None
    assert slice_needs(problem._replace(hidden_size=2048), chip, True, tiles) is None
