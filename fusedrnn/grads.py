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
from .layout import entering, previous_rows, rows_by_sequence

#: On the CPU a sum over rows is made of so many parts, each of at least so many rows, as long as
#: their results together have at most so many numbers.
_PARTS, _ROWS_OF_A_PART, _PARTS_SIZE = 8, 400, 1 << 20
_LITTLE = 1 << 24  # multiplications up to which one product of all tiles of a GRU is faster
_COPIED = 1 << 14  # numbers of h that are at most copied to be multiplied at once
#: On the CPU results with so few columns are computed as their transposes, which is faster in MKL.
_NARROW = range(2, 16)


def weight_grads(
    cell: str, z: int, x: Tensor, layers: Layers, dgates: Tensor, rows: Rows
) -> list[Tensor]:
    """Returns dW_ih, dW_hh and, with biases, db_ih, db_hh of number z of a launch.

    ``x`` is its input, ``[R, I]`` or dense ``[T, B, I]`` of any strides; ``dgates [R, N*H]``.
    """
    columns, H = layers.w_hh[z].shape
    dgx, by_sequence = dgates[:, :columns], rows_by_sequence(x, columns)
    if by_sequence is None:
        grads = [outer(dgx, x.reshape(-1, x.shape[-1]))]
    else:  # dgx, the smaller factor, is reordered
        grads = [outer(dgx.unflatten(0, x.shape[:2]).transpose(0, 1).flatten(0, 1), by_sequence)]
    grads.append(_recurrent_weight_grad(cell, z, layers, dgates, rows))
    if layers.b_ih is not None:
        sums, runs = dgates.sum(0), _runs(cell)
        grads += [sums[:columns].clone(), torch.cat([sums[a * H : b * H] for a, b, _ in runs])]
    return grads


def input_grad(dgates: Tensor, w_ih: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Fills and returns dx ``[R, I]``: the sum of ``dgx W_ih`` over the directions."""
    for d, weight in enumerate(w_ih):
        dgx = dgates[d, :, : len(weight)]
        torch.addmm(out, dgx, weight, beta=float(d > 0), out=out)
    return out


@cache
def _runs(cell: str) -> list[tuple[int, int, str]]:
    """Returns the first tile of each run of recurrent gradients, its end, and its operand."""
    spec = SPECS[cell]
    pairs = zip(spec.phases, spec.operands, strict=True)
    runs = [(run, operand) for phase, operand in pairs for run in runs_of(phase, spec.recurrent)]
    return [(tile, tile + count, operand) for (_, tile, count), operand in runs]


def _recurrent_weight_grad(cell: str, z: int, layers: Layers, dgates: Tensor, rows: Rows) -> Tensor:
    """Returns dW_hh; of little on the CPU by one product of all tiles."""
    H, pieces = layers.w_hh[z].shape[1], _entering(z, layers, rows)

    def product(tiles: slice, operand: str) -> Tensor:
        found = []
        for own, h in pieces:
            right = layers.gates[z][own, :H] * h if operand == "r*h" else h
            found.append(outer(dgates[own, tiles], right))
        return found[0] if len(found) == 1 else found[0].add_(found[1])

    runs = [(slice(first * H, end * H), operand) for first, end, operand in _runs(cell)]
    if len(runs) == 1:
        return product(*runs[0])
    if len(SPECS[cell].phases) == 1 and not dgates.is_cuda and dgates.numel() * H <= _LITTLE:
        total = product(slice(None), "h")
        return torch.cat([total[tiles] for tiles, _ in runs])
    return torch.cat([product(*run) for run in runs])


def _entering(z: int, layers: Layers, rows: Rows) -> list[tuple[slice, Tensor]]:
    """Returns the h that entered each row, as pairs of rows and their h.

    A sum that goes on from the terms of h_0, which are often large, would round all others to
    their size; so dense rows make two pairs, unless copying costs less than another product.
    """
    H, B, d = layers.h_0.shape[2], rows.B, z % (layers.out[z].shape[1] // layers.h_0.shape[2])
    h_0, left = layers.h_0[z], layers.out[z][:, d * H : (d + 1) * H]
    if rows.origins is not None:
        return [(slice(None), entering(previous_rows(rows, d, left.device), h_0, left))]
    rest = max(left.shape[0] - B, 0)
    first = (slice(0, B), h_0) if d == 0 else (slice(rest, None), h_0)
    others = (slice(B, None), left[:rest]) if d == 0 else (slice(0, rest), left[B:])
    if left.numel() <= _COPIED and rest:
        return [(slice(None), torch.cat([h_0, left[:rest]] if d == 0 else [left[B:], h_0]))]
    return [first, others] if rest else [first]


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``left^T right``, ``[M, N]`` of ``[R, M]`` and ``[R, N]``, a sum over rows.

    On the CPU in parts: in fp32 one sum through thousands of rows leaves the error budget.
    """
    rows, size = left.shape[0], left.shape[1] * right.shape[1]
    parts = min(_PARTS, rows // _ROWS_OF_A_PART, _PARTS_SIZE // max(size, 1))
    is_narrow = right.shape[1] in _NARROW and left.shape[1] > right.shape[1]
    if left.is_cuda or (parts < 2 and not is_narrow):
        return torch.mm(left.t(), right)
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
