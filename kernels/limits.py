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


def slice_needs(p: Problem, chip: Chip, forward: bool, tiles: Tiles) -> SliceNeeds | None:
    """The needs of a program (``slices.py``); None where registers or shared memory end.

    Forward, a product has 16 rows of gates and units, and H columns; backward, units and the
    columns of all gates of a phase. If halved, half of the columns of W is in shared memory.
    """
    spec, H, itemsize = p.spec, p.hidden_size, p.dtype.itemsize
    rows, units, warps, halved = tiles.block_b, tiles.block_h, tiles.num_warps, tiles.halved
    is_wave, line = p.layers > 1, 64 // itemsize * warps
    if units == 8 and (is_wave or not forward):  # an instruction has 16 rows
        return None
    most = 64 // spec.gates if forward else 32  # units of a halved slice; more would spill
    if halved and (is_wave or rows > 16 or units > most):
        return None
    # The last part is the product with W_ih, or with that of the layer above.
    gates = [len(phase) for phase in spec.phases] + [spec.gates] * is_wave
    blocks = [-(-units * (n if forward else 1) // 16) for n in gates]
    columns = [H * (1 if forward else n) for n in gates]
    held = [-(-n // (1 + halved) // line) * line for n in columns]
    rest = [-(-(n - k) // line) * line for n, k in zip(columns, held, strict=True)]
    in_registers, in_shared = (
        sum(n * k for n, k in zip(blocks, each, strict=True)) * 16 * itemsize
        for each in (held, rest)
    )
    sums = max(blocks)
    if is_wave and forward:  # the input's part of n in the GRU is a sum of its own
        sums += sum(tile >= spec.gates for tile in spec.recurrent) * units // 16
    elif is_wave:
        sums *= 2
    operand = max(*held, *rest) * rows * itemsize
    needs = SliceNeeds(
        (in_registers + operand) // (128 * warps) + sums * rows // 2,
        sums * warps * rows * 64 + in_shared,
        (in_registers + in_shared) // (512 * warps) * rows // 8,
        sum(held + rest) * rows * itemsize,
    )
    scarce = p.ragged and (forward or halved or is_wave)  # registers for the rest of a step
    # Tiles of the step wait across the product; a second phase keeps more of them.
    wide = spec.gates * tiles.elements > (12 if forward else 16) and (forward or itemsize == 4)
    has_c = spec.states > 1 and tiles.elements > 1 and not forward  # c stays in registers, too
    twice = halved and tiles.elements > 1 and len(spec.phases) > 1 and itemsize == 4
    least = (halved and forward) or wide or twice or (p.ragged and (is_wave or has_c))
    left = 208 - 16 * scarce - 32 * is_wave - 8 * least
    fits = needs.registers <= left and needs.shared_bytes <= chip.shared_bytes
    return needs if fits else None
