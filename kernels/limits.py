"""The part of W_hh that one program holds: larger ones spill registers, as compiled.

``tests/compile_all.py`` compiles what stays within and fails if a binary spills more than 64 bytes
a thread, or asks for more shared memory than estimated. "Gates" are the number of gates of the
cell; a kind is a way to multiply: "16-bit", "tf32", "tf32x3" or "ieee" (fp32 in fp32).
"""

#: The largest H of schedule resident, by number of gates. H is padded to a power of two.
LARGEST_H = {
    "16-bit": {4: 128, 3: 128, 1: 256},
    "tf32": {4: 64, 3: 64, 1: 128},
    "tf32x3": {4: 64, 3: 64, 1: 128},
    "ieee": {4: 64, 3: 64, 1: 128},
}
#: The largest slice of a program in schedule cooperative, by number of gates: units, and units
#: times the columns of W_hh with 16 rows and with 32.
LARGEST_SLICE = {
    "16-bit": {4: (32, 16384, 4096), 3: (32, 20480, 4096), 1: (64, 65536, 8192)},
    "tf32": {4: (16, 8192, 2048), 3: (32, 8192, 2048), 1: (64, 32768, 4096)},
}
OPERAND_COLUMNS = {"16-bit": 512, "tf32": 256}  # of h or dgates, loaded at a time


def padded_units(H: int) -> int:
    """Returns the power of two to which a program of schedule resident pads H.

    >>> padded_units(5), padded_units(65)
    (16, 128)
    """
    return max(16, 1 << (H - 1).bit_length())


def holds_slice(
    kind: str, gates: int, layers: int, ragged: bool, units: int, rows: int, columns: int
) -> bool:
    """Returns whether a cooperative program holds ``units`` times ``columns`` of W_hh."""
    most, few_rows, many_rows = LARGEST_SLICE[kind][gates]
    room = few_rows if rows == 16 else many_rows
    if layers > 1:  # W_ih beside W_hh
        room //= 2 if kind == "16-bit" else 4
    if ragged:  # h_0 beside the step before
        room = room * 5 // 8
        most = min(most, 32)
    return units <= most and units * columns <= room


def k_chunks(H: int, kind: str) -> tuple[tuple[int, int, int], ...]:
    """Cuts H columns into chunks of equally many pieces: (start, pieces, columns of a piece).

    8 pieces, one for each warp, or 4 where that saves much padding. With fewer pieces several warps
    would compute the same.

    >>> k_chunks(512, "16-bit")
    ((0, 8, 64),)
    >>> k_chunks(192, "16-bit")
    ((0, 4, 32), (128, 4, 16))
    """
    most = OPERAND_COLUMNS[kind]
    saves = -H % 128 != -H % 64 and 4 * (-H % 128) > H
    pieces = 4 if saves and 2 * H <= most else 8
    most = most * pieces // 8
    # Unequal chunks of fp32 spill beyond one chunk.
    least = most if kind != "16-bit" and most < H else 16 * pieces
    chunks, start, end = [], 0, -(-H // least) * least
    while start < end:
        width = min(most, 1 << ((end - start).bit_length() - 1))
        chunks.append((start, pieces, width // pieces))
        start += width
    return tuple(chunks)


def resident_bytes(kind: str, gates: int, units: int, rows: int) -> int:
    """An upper bound: W_hh, and the operands of every dot on their way through shared memory."""
    itemsize = 2 if kind == "16-bit" else 4
    operands = max(rows, 16) * (gates + 1) * units * itemsize
    return (gates * units * units * itemsize + operands) * (2 if kind == "tf32x3" else 1)


def slice_bytes(kind: str, gates: int, layers: int, units: int, rows: int, columns: int) -> int:
    """An upper bound: the slice of W_hh (and W_ih above the first layer), and an operand."""
    itemsize = 2 if kind == "16-bit" else 4
    weights = gates * units * columns * itemsize * (2 if layers > 1 else 1)
    # The warps' pieces are summed through shared memory: 8 of each gate's tile.
    return weights + max(rows * columns * itemsize, gates * 8 * rows * units * 4)
