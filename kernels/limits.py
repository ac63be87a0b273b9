"""The part of W_hh that one program holds: larger ones spill registers, as compiled.

``tests/compile_all.py`` compiles what stays within and fails if a binary spills more than 64 bytes
a thread, or asks for more shared memory than estimated. "Gates" are the number of gates of the
cell; a kind is a way to multiply: "16-bit", "tf32", "tf32x3" or "ieee" (fp32 in fp32).
"""

from typing import NamedTuple

from .problem import Chip, Problem, Tiles


def largest_h(kind: str, gates: int) -> int:
    """Returns the largest H of schedule resident, which pads H to a power of two."""
    return (128 if gates > 1 else 256) // (1 if kind == "16-bit" else 2)


def resident_bytes(kind: str, gates: int, units: int, rows: int) -> int:
    """An upper bound: W_hh, and the operands of every dot on their way through shared memory."""
    itemsize = 2 if kind == "16-bit" else 4
    operands = max(rows, 16) * (gates + 1) * units * itemsize
    return (gates * units * units * itemsize + operands) * (2 if kind == "tf32x3" else 1)


class SliceNeeds(NamedTuple):
    """The needs of one program of schedule cooperative."""

    registers: int  # of a thread, for W, one operand and the accumulators
    shared_bytes: int
    mma: int  # instructions of 16 x 8 x 16 (tf32: 8) a warp in a step
    read_bytes: int  # of operands in a step


def slice_needs(p: Problem, forward: bool, tiles: Tiles) -> SliceNeeds:
    """The needs of a program (``slices.py``).

    Forward, a product has 16 rows of gates and units, and H columns; backward, units and the
    columns of all gates of a phase. If halved, half of the columns of W is in shared memory.
    """
    spec, H, itemsize = p.spec, p.hidden_size, p.dtype.itemsize
    rows, units, warps, halved = tiles.block_b, tiles.block_h, tiles.num_warps, tiles.halved
    line = 64 // itemsize * warps
    gates = [len(phase) for phase in spec.phases]
    if p.layers > 1:  # the product with W_ih, or with that of the layer above
        gates.append(spec.gates)
    if forward:
        blocks, columns = [-(-n * units // 16) for n in gates], [H] * len(gates)
    else:
        blocks, columns = [-(-units // 16)] * len(gates), [n * H for n in gates]
    held = [-(-n // (1 + halved) // line) * line for n in columns]
    rest = [-(-(n - k) // line) * line if halved else 0 for n, k in zip(columns, held, strict=True)]
    in_registers, in_shared = (
        sum(n * k for n, k in zip(blocks, each, strict=True)) * 16 * itemsize
        for each in (held, rest)
    )
    sums = max(blocks)
    if p.layers > 1 and forward:  # the input's part of n in the GRU is a sum of its own
        sums += sum(tile >= spec.gates for tile in spec.recurrent) * units // 16
    elif p.layers > 1:
        sums *= 2
    operand = max(*held, *rest) * rows * itemsize
    return SliceNeeds(
        (in_registers + operand) // (128 * warps) + sums * rows // 2,
        sums * warps * rows * 64 + in_shared,
        (in_registers + in_shared) // (512 * warps) * rows // 8,
        sum(held + rest) * rows * itemsize,
    )


def holds_slice(needs: SliceNeeds, p: Problem, chip: Chip, forward: bool, tiles: Tiles) -> bool:
    """Returns whether a program fits and leaves registers for the rest of a step."""
    is_wave, halved = p.layers > 1, tiles.halved
    if tiles.block_h == 8 and (is_wave or not forward):  # an instruction has 16 rows
        return False
    if halved:
        most = 64 // p.spec.gates if forward else 32  # units
        spills = forward and p.hidden_size > 3072 and chip.arch == "sm_100"
        if is_wave or spills or tiles.block_b > 16 or tiles.block_h > most:
            return False
    scarce = p.ragged and (forward or halved or is_wave)
    left = 208 - 16 * scarce - 32 * is_wave - 8 * (halved and forward)
    return needs.registers <= left and needs.shared_bytes <= chip.shared_bytes
