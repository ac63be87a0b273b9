"""The gradients of a layer's weights and input: products and sums over all steps at once.

Every schedule leaves ``dgates``, the gradients of the pre-activations. Together with what entered
each step they make ``dW_ih, dW_hh, db_ih, db_hh`` and dx. No sum is atomic, so results are
reproducible bit for bit.
"""

from functools import cache

import torch
from torch import Tensor

from .kernels.rows import Rows
from .kernels.spec import SPECS, runs_of
from .kernels.tensors import Layers
from .layout import entering, rows_by_sequence

#: On the CPU a sum over rows is made of so many parts, each of at least so many rows, as long as
#: their results together have at most so many numbers.
_PARTS, _ROWS_OF_A_PART, _PARTS_SIZE = 8, 400, 1 << 20
_COPIED = 1 << 14  # numbers of h that are at most copied to be multiplied at once
#: On the CPU results with so few columns are computed as their transposes, which is faster in MKL.
_NARROW = range(2, 16)


def weight_grads(
    cell: str, z: int, x: Tensor, layers: Layers, dgates: Tensor, rows: Rows
) -> list[Tensor]:
    """Returns dW_ih, dW_hh and, with biases, db_ih, db_hh of number z of a launch.

    ``x`` is its input, ``[R, I]`` or dense ``[T, B, I]`` of any strides; ``dgates [R, N*H]``.
    """
    columns = layers.w_hh[z].shape[0]
    dgx, x_rows = dgates[:, :columns], rows_by_sequence(x, columns)
    if x_rows is None:
        x_rows = x.reshape(-1, x.shape[-1])
    else:  # dgx, the smaller factor, is reordered
        dgx = dgx.unflatten(0, x.shape[:2]).transpose(0, 1).flatten(0, 1)
    grads = [outer(dgx, x_rows), _recurrent_weight_grad(cell, z, layers, dgates, rows)]
    if layers.b_hh is not None:
        sums = dgates.sum(0)
        # The second is a copy, since an optimizer may change one in place.
        recurrent = torch.cat([sums[tiles] for tiles, _ in _runs(cell, layers.w_hh[z].shape[1])])
        grads += [sums[:columns], recurrent]
    return grads


def input_grad(dgates: Tensor, w_ih: tuple[Tensor, ...], out: Tensor) -> None:
    """Fills dx ``[R, I]``: the sum of ``dgx W_ih`` over the directions."""
    for d, weight in enumerate(w_ih):
        dgx = dgates[d, :, : weight.shape[0]]
        torch.addmm(out, dgx, weight, beta=float(d > 0), out=out)


@cache
def _runs(cell: str, H: int) -> list[tuple[slice, str]]:
    """Returns the columns of each run of recurrent gradients in ``dgates``, and its operand."""
    spec = SPECS[cell]
    pairs = zip(spec.phases, spec.operands, strict=True)
    runs = [(run, operand) for phase, operand in pairs for run in runs_of(phase, spec.recurrent)]
    return [(slice(tile * H, (tile + count) * H), operand) for (_, tile, count), operand in runs]


def _recurrent_weight_grad(cell: str, z: int, layers: Layers, dgates: Tensor, rows: Rows) -> Tensor:
    """Returns dW_hh, the sum over the pieces of ``_entering`` for each run of tiles."""
    H, pieces, products = layers.w_hh[z].shape[1], _entering(z, layers, rows), []
    for tiles, operand in _runs(cell, H):
        parts = [
            outer(dgates[own, tiles], layers.gates[z][own, :H] * h if operand == "r*h" else h)
            for own, h in pieces
        ]
        products.append(parts[0] if len(parts) == 1 else parts[0].add_(parts[1]))
    return products[0] if len(products) == 1 else torch.cat(products)


def _entering(z: int, layers: Layers, rows: Rows) -> list[tuple[slice, Tensor]]:
    """Returns the h that entered each row, as pairs of rows and their h.

    A sum that goes on from the terms of h_0, which are often large, would round all others to
    their size; so dense rows make two pairs, unless copying costs less than another product.
    """
    h_0, left = layers.h_0[z], layers.out[z].flatten(0, -2)
    B, H = h_0.shape
    d = z % (left.shape[1] // H)
    left, rest = left[:, d * H : (d + 1) * H], left.shape[0] - B
    if rows.origins is not None or left.numel() <= _COPIED:
        return [(slice(None), entering(rows, d, h_0, left))]
    if d == 0:
        return [(slice(B), h_0), (slice(B, None), left[:rest])]
    return [(slice(rest, None), h_0), (slice(rest), left[B:])]


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``left^T right``, ``[M, N]`` of ``[R, M]`` and ``[R, N]``, a sum over rows.

    On the CPU in parts: in fp32 one sum through thousands of rows leaves the error budget.
    """
    if left.is_cuda:
        return torch.mm(left.t(), right)
    (rows, height), width = left.shape, right.shape[1]
    parts = min(_PARTS, rows // _ROWS_OF_A_PART, _PARTS_SIZE // max(height * width, 1))
    is_narrow = width in _NARROW and height > width
    first, second = (right, left) if is_narrow else (left, right)
    product = torch.mm(first.t(), second) if parts < 2 else _in_parts(first, second, parts)
    return product.t().contiguous() if is_narrow else product


def _in_parts(left: Tensor, right: Tensor, parts: int) -> Tensor:
    """Returns ``left^T right`` as the sum of a product for each of ``parts`` equal runs of rows."""
    size = left.shape[0] // parts
    end = parts * size
    of_left, of_right = (x[:end].unflatten(0, (parts, size)) for x in (left, right))
    total = torch.bmm(of_left.mT, of_right).sum(0)
    return total if end == left.shape[0] else total.addmm_(left[end:].t(), right[end:])
