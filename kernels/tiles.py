"""Device functions on tiles, shared by every cell and schedule.

A *tile* is a tensor ``[BLOCK_B, BLOCK_H]``: one value for each sequence and hidden unit that a
program owns. Gates, states and gradients are tuples of tiles, ``gates[n]``, which the compiler
unrolls. Tiles are fp32 (fp64 in fp64); operands of products and results in memory have the dtype
of the tensors. ``steps.py`` loads and stores them.

``layers`` is the named tuple of ``tensors.py``. A field that is None is known at compile time, so
the code behind it is left out. The functions of origins say what ``rows.py`` means on tiles.
"""

from typing import NamedTuple

import triton
import triton.language as tl

#: The origins of ``rows.py``.
SKIPPED, PREVIOUS, ZERO, INITIAL = (tl.constexpr(number) for number in range(4))


class Tile(NamedTuple):
    """The compile-time sizes of a launch: of its layers, and of what one program owns."""

    L: int
    D: int
    H: int
    block_b: int  # sequences
    block_h: int  # hidden units, a power of two
    precision: str  # of fp32 products: "ieee", "tf32" or "tf32x3"


@triton.jit
def tanh(x):
    """tanh within 2 ulp, in fp32 and fp64.

    Below 0.625 it is x + x^3 p(x^2). In fp32, p is the least-squares fit of degree 4 at Chebyshev
    nodes; in fp64 it follows from Lambert's continued fraction x/(1 + z/(3 + z/(5 + ...))), cut
    off at 15. Above, 1 - 2 sigmoid(-2|x|) cancels nothing, because the sigmoid is at most 0.22,
    and its overflow to 1/inf gives the right limit.
    """
    z = x * x
    if x.dtype == tl.float64:
        n = ((z + 594.0) * z + 45045.0) * z + 675675.0
        p = -n / ((((z + 630.0) * z + 51975.0) * z + 945945.0) * z + 2027025.0)
    else:
        p = -6.104945779e-3
        p = p * z + 2.100363926e-2
        p = p * z - 5.385249689e-2
        p = p * z + 1.333278226e-1
        p = p * z - 3.333332910e-1
    large = 1.0 - 2.0 * tl.sigmoid(-2.0 * tl.abs(x))
    return tl.where(z < 0.390625, x + x * z * p, tl.where(x < 0.0, -large, large))


@triton.jit
def squash(tiles, KINDS: tl.constexpr):
    """The sigmoid of each tile, or its tanh where KINDS says so."""
    out = ()
    for n in tl.static_range(len(tiles)):
        out = out + (tanh(tiles[n]) if KINDS[n] else tl.sigmoid(tiles[n]),)
    return out


@triton.jit
def zeros_like(x):
    """Zeros in the layout of x, which the compiler knows here and ``tl.zeros_like`` does not."""
    return tl.where(x == x, 0.0, 0.0).to(x.dtype)


@triton.jit
def widened(tiles):
    """Tiles in the dtype of all arithmetic outside the products: fp32, but fp64 stays fp64."""
    out = ()
    for n in tl.static_range(len(tiles)):
        out = out + (tiles[n] if tiles[n].dtype == tl.float64 else tiles[n].to(tl.float32),)
    return out


@triton.jit
def where(condition, tiles, others):
    """``tiles[n]`` in the sequences where the condition holds, else ``others[n]``."""
    out = ()
    for n in tl.static_range(len(tiles)):
        out = out + (tl.where(condition[:, None], tiles[n], others[n]),)
    return out


@triton.jit
def zero_where(condition, tiles):
    """Zero in the sequences where the condition holds, even in place of a NaN."""
    out = ()
    for n in tl.static_range(len(tiles)):
        out = out + (tl.where(condition[:, None], 0.0, tiles[n]),)
    return out


@triton.jit
def add_to(tiles, N: tl.constexpr, term):
    """Adds ``term`` to tile N."""
    out = ()
    for n in tl.static_range(len(tiles)):
        out = out + (tiles[n] + term if n == N else tiles[n],)
    return out


@triton.jit
def products(u, gx, w, b, CELL: tl.constexpr, PHASE: tl.constexpr, TILE: tl.constexpr):
    """``u W[gate]^T + b[gate]`` in fp32 for the gates of a phase, and gx where it is just added."""
    # Only tensor cores' single products begin with gx: tf32x3 is predicted to be slower then, and
    # FMAs spill registers.
    IS_FIRST: tl.constexpr = TILE.precision == "tf32" or w[0].dtype.primitive_bitwidth == 16
    out = ()
    for i in tl.static_range(len(CELL.phases[PHASE])):
        weight, total = w[CELL.phases[PHASE][i]], b[CELL.phases[PHASE][i]]
        if IS_FIRST and CELL.merged[CELL.phases[PHASE][i]]:
            total = total + gx[CELL.phases[PHASE][i]]
        total = tl.broadcast_to(total, [TILE.block_b, TILE.block_h])
        total = tl.dot(u.to(weight.dtype), weight, total, input_precision=TILE.precision)
        if not IS_FIRST and CELL.merged[CELL.phases[PHASE][i]]:
            total = total + gx[CELL.phases[PHASE][i]]
        out = out + (total,)
    return out


@triton.jit
def product_sum(dgates, w, CELL: tl.constexpr, PHASE: tl.constexpr, TILE: tl.constexpr):
    """The gradient of the operand of ``products``: the sum over gates of ``dgates W[gate]``."""
    for i in tl.static_range(len(CELL.phases[PHASE])):
        dgate, weight = dgates[CELL.factors[PHASE][i]], w[CELL.phases[PHASE][i]]
        term = tl.dot(dgate.to(weight.dtype), weight, input_precision=TILE.precision)
        total = term if i == 0 else total + term  # noqa: F821
    return total


@triton.jit
def load_matrix(w_ptr, cols, TRANSPOSE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr):
    """``w[gate]`` of a whole W_hh ``[G*H, H]``, or its transpose: tiles ``[BLOCK_H, BLOCK_H]``."""
    H: tl.constexpr = TILE.H
    inside = (cols < H)[:, None] & (cols < H)[None, :]
    if TRANSPOSE:
        ptrs = w_ptr + cols[None, :] * H + cols[:, None]
    else:
        ptrs = w_ptr + cols[:, None] * H + cols[None, :]
    w = ()
    for g in tl.static_range(len(CELL.gates)):
        w = w + (tl.load(ptrs + g * H * H, mask=inside, other=0.0),)
    return w


@triton.jit
def load_bias(b_ptr, cols, CELL: tl.constexpr, H: tl.constexpr):
    """``b[gate]``, rows ``[1, BLOCK_H]``; zeros without a bias."""
    b = ()
    for g in tl.static_range(len(CELL.gates)):
        row = tl.zeros_like(cols).to(tl.float32)
        if b_ptr is not None:
            row = widened((tl.load(b_ptr + (g * H + cols), mask=cols < H, other=0.0),))[0]
        b = b + (row[None, :],)
    return b


@triton.jit
def choose(pointers, index):
    """``pointers[index]`` for an index known only at run time; None if there are no pointers."""
    if pointers is None:
        return None
    else:
        pointer = pointers[0]
        for i in tl.static_range(1, len(pointers)):
            pointer = tl.where(index == i, pointers[i], pointer)
        return pointer


@triton.jit
def entering_state(layers, state, origins):
    """The state that enters a step: zero where a new sequence begins."""
    return zero_where(origins == ZERO, state) if layers.origins is not None else state


@triton.jit
def leaving_state(layers, state, entering, origins):
    """The state that leaves a step: a skipped step leaves it as it was."""
    return where(origins == SKIPPED, entering, state) if layers.origins is not None else state


@triton.jit
def visible(layers, tiles, origins):
    """The results of a step: zero where it is skipped."""
    return zero_where(origins == SKIPPED, tiles) if layers.origins is not None else tiles


@triton.jit
def gradient_before(layers, d_entering, d_leaving, origins):
    """The gradient of the state before a step: the adjoint of the three functions above."""
    if layers.origins is not None:
        return zero_where(origins == ZERO, where(origins == SKIPPED, d_leaving, d_entering))
    else:
        return d_entering


@triton.jit
def add_gradients(d_state, d_out, d_cs):
    """Adds the gradients of a step's h and c, each a tile or none, to those of the state."""
    if len(d_out) > 0:
        d_state = add_to(d_state, 0, d_out[0])
    if len(d_cs) > 0:
        d_state = add_to(d_state, 1, d_cs[0])
    return d_state
