"""Device functions that every cell and schedule shares.

*Rows of tiles* are how a schedule holds ``[BLOCK_B, H]`` values: H is cut into blocks
``BLOCKS = ((start, width), ...)``, each a power of two wide, and the tiles stand in a tuple
``tiles[block][n]``. So H = 160 is 128 + 32 columns and not 256. Tuples are unrolled at compile
time; each tile is one tensor to the compiler.
"""

import triton
import triton.language as tl

from .ragged import INITIAL, PREVIOUS, first_row, load_origins, present, select


@triton.jit
def tanh(x):
    """tanh to 1.4 ulp near zero, 1.2e-7 absolute elsewhere; never NaN for a number.

    The quotient of exponentials is inf/inf below -44, and libdevice is absent from the
    interpreter. The sigmoid form alone loses all relative precision near 0 (1e-4 at x = 1e-3), so
    below 0.625 a polynomial in x^2 takes over: the least-squares fit of (tanh(x)/x - 1)/x^2 of
    degree 4 at Chebyshev nodes. It runs on the FMA units, which idle while exp is computed.

    In fp64 it is Lambert's continued fraction x/(1 + z/(3 + z/(5 + ...))) down to 15, whose own
    relative error is 6.2e-18 at 0.625: tanh to 1.2 ulp there, 3.2e-16 absolute elsewhere.
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
    return tl.where(z < 0.390625, x + x * z * p, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def batch_tile(B, BLOCK_B: tl.constexpr, MEMBERS: tl.constexpr):
    """The sequences of a program on axis 0 of the grid, and which of them exist.

    With members B is so many equal parts, each with programs of its own on axis 2.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    if MEMBERS:
        each = B // tl.num_programs(2)
        mask_b = offs_b < each
        offs_b += tl.program_id(2).to(tl.int64) * each
    else:
        mask_b = offs_b < B
    return offs_b, mask_b


@triton.jit
def tile_of_member(tile, B, each, BLOCK_B: tl.constexpr):
    """Batch tile ``tile`` where B is parts of ``each`` sequences and no tile has those of two.

    Its sequences, which of them exist, how many tiles there are, and whose part it is.
    """
    tiles = tl.cdiv(each, BLOCK_B)
    member = (tile // tiles).to(tl.int64)
    offs_b = (tile - member * tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
    return member * each + offs_b, offs_b < each, B // each * tiles, member


@triton.jit
def columns(start, WIDTH: tl.constexpr):
    return start + tl.arange(0, WIDTH)


@triton.jit
def all_columns(start, BLOCKS: tl.constexpr):
    """The column numbers of every block, ``[block]``, the first of which begins at ``start``."""
    out = ()
    for j in tl.static_range(len(BLOCKS)):
        out = out + (columns(start + BLOCKS[j][0], BLOCKS[j][1]),)
    return out


@triton.jit
def load_rows(row_ptrs, mask_row, start, N: tl.constexpr, H: tl.constexpr, BLOCKS: tl.constexpr):
    """Loads ``tiles[block][n]`` from rows of N*H columns, of each H those from ``start``.

    Zero beyond H and where masked.
    """
    tiles = ()
    for j in tl.static_range(len(BLOCKS)):
        cols = columns(start + BLOCKS[j][0], BLOCKS[j][1])
        mask = mask_row[:, None] & (cols < H)[None, :]
        block = ()
        for n in tl.static_range(N):
            ptrs = row_ptrs[:, None] + (n * H + cols)[None, :]
            block = block + (tl.load(ptrs, mask=mask, other=0.0),)
        tiles = tiles + (block,)
    return tiles


@triton.jit
def store_rows(
    row_ptrs,
    mask_row,
    start,
    tiles,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Stores ``tiles[block][n]`` as tile FIRST + n of each row, rounded to the pointer's dtype."""
    for j in tl.static_range(len(BLOCKS)):
        cols = columns(start + BLOCKS[j][0], BLOCKS[j][1])
        mask = mask_row[:, None] & (cols < H)[None, :]
        for n in tl.static_range(len(tiles[j])):
            ptrs = row_ptrs[:, None] + ((FIRST + n) * H + cols)[None, :]
            tl.store(ptrs, tiles[j][n].to(row_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def to_float(tiles):
    """Every tile in fp32, the dtype of all arithmetic outside the dots; fp64 stays fp64."""
    out = ()
    for j in tl.static_range(len(tiles)):
        block = ()
        for n in tl.static_range(len(tiles[j])):
            tile = tiles[j][n]
            block = block + (tile if tile.dtype == tl.float64 else tile.to(tl.float32),)
        out = out + (block,)
    return out


@triton.jit
def pick(tiles, N: tl.constexpr):
    """Tile N of every block, ``[block]``."""
    out = ()
    for j in tl.static_range(len(tiles)):
        out = out + (tiles[j][N],)
    return out


@triton.jit
def only(tiles, N: tl.constexpr):
    """Rows that hold nothing but tile N, ``[block][0]``."""
    out = ()
    for j in tl.static_range(len(tiles)):
        out = out + ((tiles[j][N],),)
    return out


@triton.jit
def join(left, right):
    """The tiles of both, block by block: ``left[block] + right[block]`` as tuples."""
    out = ()
    for j in tl.static_range(len(left)):
        out = out + (left[j] + right[j],)
    return out


@triton.jit
def no_tiles(BLOCKS: tl.constexpr):
    """Rows with no tile in them, to ``join`` to."""
    out = ()
    for _ in tl.static_range(len(BLOCKS)):
        out = out + ((),)
    return out


@triton.jit
def add_tile(tiles, terms, N: tl.constexpr):
    """Adds ``terms[block][0]``, if there is such a tile, to tile N of every block."""
    out = ()
    for j in tl.static_range(len(tiles)):
        block = ()
        for n in tl.static_range(len(tiles[j])):
            tile = tiles[j][n]
            if n == N and len(terms[j]) > 0:
                tile = tile + terms[j][0]
            block = block + (tile,)
        out = out + (block,)
    return out


@triton.jit
def time_of(step, T, pid_d):
    """The step-th time in the order of this direction; direction 1 runs from T-1 down to 0."""
    return step + pid_d * (T - 1 - 2 * step)


@triton.jit
def store_state(
    h_rows, c_rows, mask_b, start, state, STATES: tl.constexpr, H: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Stores what ``load_state`` loads, rounded to the dtype of the tensors."""
    store_rows(h_rows, mask_b, start, only(state, 0), 0, H, BLOCKS)
    if STATES == 2:
        store_rows(c_rows, mask_b, start, only(state, 1), 0, H, BLOCKS)


@triton.jit
def load_state(
    h_rows, c_rows, mask_b, start, STATES: tl.constexpr, H: tl.constexpr, BLOCKS: tl.constexpr
):
    """h and, with two states, c: ``state[block][n]``."""
    state = load_rows(h_rows, mask_b, start, 1, H, BLOCKS)
    if STATES == 2:
        state = join(state, load_rows(c_rows, mask_b, start, 1, H, BLOCKS))
    return state


@triton.jit
def load_left(
    out_ptr, cs_ptr, origins_ptr, starts_ptr, t, T, B, R, pid_z, pid_d, offs_b, mask_b, start,
    STATES: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The state that left step t, which out and cs hold; zero where it is skipped."""
    origins = load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED)
    first = first_row(starts_ptr, t, B, PACKED)
    h_rows = out_ptr + (first + offs_b) * (D * H) + pid_d * H
    c_rows = cs_ptr + (pid_z * R + first + offs_b) * H
    return load_state(h_rows, c_rows, present(origins, mask_b, RAGGED), start, STATES, H, BLOCKS)


@triton.jit
def load_step(
    gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr, d_cs_ptr, origins_ptr, starts_ptr,
    step, T, B, R, pid_z, pid_d, offs_b, mask_b, start,
    SAVED: tl.constexpr, STATES: tl.constexpr, HAS_D_OUT: tl.constexpr, HAS_D_CS: tl.constexpr,
    RAGGED: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """All that a step of backward reads and no dot produces.

    Saved tiles; the state that entered the step; the gradients of out and cs, each a tile or none;
    when RAGGED the state that left the step before, which is another one where a sequence begins;
    origins. pid_z numbers the layers and directions of gates, cs, h_0 and c_0; pid_d the
    directions in out.
    """
    t = time_of(step, T, pid_d)
    t_prev = time_of(tl.maximum(step - 1, 0), T, pid_d)
    origins = load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED)
    here = present(origins, mask_b, RAGGED)
    first = first_row(starts_ptr, t, B, PACKED)
    gates_rows = gates_ptr + (pid_z * R + first + offs_b) * (len(SAVED) * H)
    saved = load_rows(gates_rows, here, start, len(SAVED), H, BLOCKS)

    h_0_rows = h_0_ptr + (pid_z * B + offs_b) * H
    c_0_rows = c_0_ptr + (pid_z * B + offs_b) * H
    if RAGGED:
        left = load_left(
            out_ptr, cs_ptr, origins_ptr, starts_ptr, t_prev, T, B, R, pid_z, pid_d, offs_b,
            mask_b, start, STATES, RAGGED, PACKED, D, H, BLOCKS,
        )  # fmt: skip
        prev = load_state(h_0_rows, c_0_rows, origins == INITIAL, start, STATES, H, BLOCKS)
        prev = select(origins == PREVIOUS, left, prev)
    else:
        h_rows = out_ptr + (t_prev * B + offs_b) * (D * H) + pid_d * H
        h_rows = tl.where(step > 0, h_rows, h_0_rows)
        c_rows = cs_ptr + (pid_z * R + t_prev * B + offs_b) * H
        c_rows = tl.where(step > 0, c_rows, c_0_rows)
        prev = load_state(h_rows, c_rows, mask_b, start, STATES, H, BLOCKS)
        left = no_tiles(BLOCKS)

    d_out = no_tiles(BLOCKS)
    d_cs = no_tiles(BLOCKS)
    if HAS_D_OUT:
        d_out = load_rows(
            d_out_ptr + (first + offs_b) * (D * H) + pid_d * H, here, start, 1, H, BLOCKS
        )
    if HAS_D_CS:
        d_cs = load_rows(d_cs_ptr + (pid_z * R + first + offs_b) * H, here, start, 1, H, BLOCKS)
    return saved, prev, d_out, d_cs, left, origins


@triton.jit
def load_weight(
    w_ptr,  # [G*H, K]
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    """``w[gate][block of H][block of K]``: tiles ``[H, K]``, or ``[K, H]`` when TRANSPOSE."""
    w = ()
    for g in tl.static_range(G):
        blocks = ()
        for j in tl.static_range(len(BLOCKS)):
            offs_h = columns(BLOCKS[j][0], BLOCKS[j][1])
            tiles = ()
            for k in tl.static_range(len(K_BLOCKS)):
                offs_k = columns(K_BLOCKS[k][0], K_BLOCKS[k][1])
                if TRANSPOSE:
                    ptrs = w_ptr + (g * H + offs_h)[None, :] * K + offs_k[:, None]
                    mask = (offs_h < H)[None, :] & (offs_k < K)[:, None]
                else:
                    ptrs = w_ptr + (g * H + offs_h)[:, None] * K + offs_k[None, :]
                    mask = (offs_h < H)[:, None] & (offs_k < K)[None, :]
                tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0),)
            blocks = blocks + (tiles,)
        w = w + (blocks,)
    return w


@triton.jit
def load_bias(
    b_ptr,  # [G*H]
    start,
    HAS_BIAS: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``b[gate][block]`` in fp32, one row each: spread when used, 16 times fewer registers."""
    b = ()
    for g in tl.static_range(G):
        blocks = ()
        for j in tl.static_range(len(BLOCKS)):
            cols = columns(start + BLOCKS[j][0], BLOCKS[j][1])
            if HAS_BIAS:
                row = tl.load(b_ptr + g * H + cols, mask=cols < H, other=0.0).to(tl.float32)
            else:
                row = tl.zeros_like(cols).to(tl.float32)
            blocks = blocks + (row[None, :],)
        b = b + (blocks,)
    return b


@triton.jit
def _spread(row, BLOCK_B: tl.constexpr, WIDTH: tl.constexpr):
    return tl.broadcast_to(row, [BLOCK_B, WIDTH])


@triton.jit
def products(
    u,  # [block of K], tiles [BLOCK_B, K]
    w,  # [gate][block of H][block of K], tiles [K, H]
    b,  # [gate][block of H], rows [1, H]
    PHASES: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``out[block of H][gate] = u W[gate] + b[gate]`` in fp32, for the gates of PHASES[PHASE].

    (A slice of a constexpr tuple cannot itself be passed on in Triton 3.6, hence tuple and index.)
    """
    out = ()
    for j in tl.static_range(len(BLOCKS)):
        block = ()
        for g in tl.static_range(len(PHASES[PHASE])):
            acc = _spread(b[PHASES[PHASE][g]][j], BLOCK_B, BLOCKS[j][1])
            for k in tl.static_range(len(u)):
                tile = w[PHASES[PHASE][g]][j][k]
                acc = tl.dot(u[k].to(tile.dtype), tile, acc, input_precision=INPUT_PRECISION)
            block = block + (acc,)
        out = out + (block,)
    return out


@triton.jit
def adjoint_products(
    grads,  # [block of H][tile]
    w,  # [gate][block of H][block of K], tiles [H, K]
    PHASES: tl.constexpr,
    FACTORS: tl.constexpr,  # for each gate of each phase the tile of ``grads``
    PHASE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``out[block of K] = sum over gates and blocks of grads W[gate]`` in fp32, for PHASES[PHASE].

    With one block the compiler makes one accumulator for all gates, with several one for each.
    """
    out = ()
    for k in tl.static_range(len(w[0][0])):
        for g in tl.static_range(len(PHASES[PHASE])):
            tile = w[PHASES[PHASE][g]][0][k]
            acc = tl.dot(
                grads[0][FACTORS[PHASE][g]].to(tile.dtype),
                tile,
                input_precision=INPUT_PRECISION,
            )
            for j in tl.static_range(1, len(grads)):
                tile = w[PHASES[PHASE][g]][j][k]
                acc = tl.dot(
                    grads[j][FACTORS[PHASE][g]].to(tile.dtype),
                    tile,
                    acc,
                    input_precision=INPUT_PRECISION,
                )
            if g == 0:
                total = acc
            else:
                total = total + acc
        out = out + (total,)
    return out
