"""Device functions for rows and origins (``rows.py``): the only place that knows what they mean.

Where ``RAGGED`` is false there are no origins to load, all of this folds away, and step 0 alone
enters from h_0 and c_0. ``PACKED`` implies it.
"""

import triton
import triton.language as tl

from . import rows

SKIPPED = tl.constexpr(rows.SKIPPED)
PREVIOUS = tl.constexpr(rows.PREVIOUS)
ZERO = tl.constexpr(rows.ZERO)
INITIAL = tl.constexpr(rows.INITIAL)


@triton.jit
def first_row(starts_ptr, t, B, PACKED: tl.constexpr):
    """The row of step t of sequence 0."""
    if PACKED:
        return tl.load(starts_ptr + t)
    else:
        return t * B


@triton.jit
def load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED: tl.constexpr):
    """Where the state of each sequence comes from at time t; ``SKIPPED`` beyond B."""
    if RAGGED:
        return tl.load(origins_ptr + (pid_d * T + t) * B + offs_b, mask=mask_b, other=SKIPPED)
    else:
        return mask_b


@triton.jit
def present(origins, mask_b, ONLY: tl.constexpr):
    """All sequences, or where ONLY is set those that have this step.

    Loads say ``RAGGED``: what is missing may hold anything. Stores say ``PACKED``: a dense row that
    is missing is written too, as zero; a packed one does not exist.
    """
    if ONLY:
        return origins != SKIPPED
    else:
        return mask_b


@triton.jit
def select(condition, tiles, others):
    """``tiles[block][n]`` in the rows where the condition holds, else ``others[block][n]``."""
    out = ()
    for j in tl.static_range(len(tiles)):
        block = ()
        for n in tl.static_range(len(tiles[j])):
            block = block + (tl.where(condition[:, None], tiles[j][n], others[j][n]),)
        out = out + (block,)
    return out


@triton.jit
def zero_where(condition, tiles):
    """Zero in the rows where the condition holds, whatever stood there: no 0 * NaN."""
    out = ()
    for j in tl.static_range(len(tiles)):
        block = ()
        for n in tl.static_range(len(tiles[j])):
            block = block + (tl.where(condition[:, None], 0.0, tiles[j][n]),)
        out = out + (block,)
    return out


@triton.jit
def enter(state, origins, RAGGED: tl.constexpr):
    """The state that enters a step, of the one that left the step before."""
    if RAGGED:
        return zero_where(origins == ZERO, state)
    else:
        return state


@triton.jit
def leave(state, entered, origins, RAGGED: tl.constexpr):
    """The state that leaves a step: of a skipped one the state that entered it."""
    if RAGGED:
        return select(origins == SKIPPED, entered, state)
    else:
        return state


@triton.jit
def shown(tiles, origins, RAGGED: tl.constexpr):
    """What is seen of a step from outside, and saved of it: zero where it is skipped."""
    if RAGGED:
        return zero_where(origins == SKIPPED, tiles)
    else:
        return tiles


@triton.jit
def enter_gradient(d_state, d_left, origins, RAGGED: tl.constexpr):
    """The gradient of the state before a step, of that of the state that entered it.

    d_left is that of the state that left it, for skipped steps. The adjoint of ``enter`` and
    ``leave``.
    """
    if RAGGED:
        return zero_where(origins == ZERO, select(origins == SKIPPED, d_left, d_state))
    else:
        return d_state
