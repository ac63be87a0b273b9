"""The part of W_hh that one program holds: larger ones spill registers, as compiled.

``tests/compile_all.py`` compiles what stays within and fails if a binary spills more than 64 bytes
a thread, or asks for more shared memory than estimated. "Gates" are the number of gates of the
cell; a kind is a way to multiply: "16-bit", "tf32", "tf32x3" or "ieee" (fp32 in fp32).
"""

from typing import NamedTuple

from .spec import CellSpec

#: The largest H of schedule resident, by number of gates. H is padded to a power of two.
LARGEST_H = {
    "16-bit": {4: 128, 3: 128, 1: 256},
    "tf32": {4: 64, 3: 64, 1: 128},
    "tf32x3": {4: 64, 3: 64, 1: 128},
    "ieee": {4: 64, 3: 64, 1: 128},
}


def resident_bytes(kind: str, gates: int, units: int, rows: int) -> int:
    """An upper bound: W_hh, and the operands of every dot on their way through shared memory."""
    itemsize = 2 if kind == "16-bit" else 4
    operands = max(rows, 16) * (gates + 1) * units * itemsize
    return (gates * units * units * itemsize + operands) * (2 if kind == "tf32x3" else 1)


class SliceNeeds(NamedTuple):
    """What one program of schedule cooperative needs."""

    registers: int  # of a thread, for W, one operand and the accumulators
    shared_bytes: int
    mma: int  # instructions of 16 x 8 x 16 (tf32: 8) a warp in a step
    read_bytes: int  # of operands in a step


def slice_needs(
    spec: CellSpec, kind: str, layers: int, forward: bool, H: int, units: int, rows: int, warps: int
) -> SliceNeeds:
    """The needs of a program of ``units``, ``rows`` sequences and ``warps`` (``slices.py``).

    Forward, a product has 16 rows of gates and units, and H columns; backward, units and the
    columns of all gates of a phase.
    """
    itemsize = 2 if kind == "16-bit" else 4
    line = 64 // itemsize * warps
    gates = [len(phase) for phase in spec.phases]
    if layers > 1:  # the product with W_ih, or with that of the layer above
        gates.append(spec.gates)
    if forward:
        blocks, columns = [-(-n * units // 16) for n in gates], [H] * len(gates)
    else:
        blocks, columns = [-(-units // 16)] * len(gates), [n * -(-H // 16) * 16 for n in gates]
    columns = [-(-n // line) * line for n in columns]
    weights = sum(n * k for n, k in zip(blocks, columns, strict=True)) * itemsize // 8 // warps
    operands = [rows * k * itemsize // 128 // warps for k in columns]
    sums = max(blocks)
    if layers > 1:
        sums += sum(n for n in spec.recurrent if n >= spec.gates) and units // 16
        sums = sums if forward else 2 * sums
    instructions = weights // 4 * rows // 8
    return SliceNeeds(
        weights + max(operands) + sums * rows // 2,
        sums * warps * rows * 64,
        instructions,
        sum(operands) * 128 * warps,
    )


#: The registers of ``slice_needs`` that leave room for the rest: more for ragged rows and several
#: layers.
ROOM = 208


def holds_slice(needs: SliceNeeds, layers: int, ragged: bool) -> bool:
    """Returns whether the registers hold a slice; ``tests/compile_all.py`` checks it."""
    return needs.registers <= ROOM - 16 * ragged - 32 * (layers > 1)
