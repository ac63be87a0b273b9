"""Random tensors for the kernels of every schedule, and what the reference makes of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedrnn import layout
from fusedrnn.kernels.plan import Plan, Tiles
from fusedrnn.kernels.rows import SKIPPED, Rows
from fusedrnn.kernels.spec import SPECS
from fusedrnn.kernels.tensors import Grads, Layers, Weights
from fusedrnn.records import Sequences
from fusedrnn.reference import differentiable_stack
from fusedrnn.testing import assert_budget, error_budget

CPU = torch.device("cpu")


class Shape(NamedTuple):
    """T steps, B sequences, H units, L layers, D directions.

    ``rows`` are "dense", "ragged" (with lengths and resets) or "packed". In schedule cooperative a
    program owns ``block_h`` units (backward 16 or more), ``at_once`` batch tiles of 16 rows (8 rows
    with 8 units) run in one launch, and half of the weights may lie in shared memory.
    """

    T: int
    B: int
    H: int
    block_h: int = 16
    L: int = 1
    D: int = 1
    masks: bool = False
    rows: str = "dense"
    bias: bool = True
    at_once: int = 2
    halved: bool = False

    @property
    def programs(self) -> int:
        """The programs of a cooperative launch."""
        return -(-self.H // self.block_h) * min(-(-self.B // 16), self.at_once) * self.L * self.D


class Data(NamedTuple):
    """The tensors of a call: random where it reads, NaN where it writes."""

    layers: Layers
    grads: Grads


def resident_plan(H: int, block_b: int = 16, precision: str = "ieee") -> Plan:
    block_h = max(16, 1 << (H - 1).bit_length())
    tiles = Tiles(block_b, block_h, 4, None, precision, 0)
    return Plan("resident", tiles, tiles)


def cooperative_plan(shape: Shape) -> Plan:
    rows = 8 if shape.block_h == 8 else 16
    forward, backward = (
        Tiles(rows, units, 4, None, "tf32", 0, shape.at_once, shape.halved)
        for units in (shape.block_h, max(shape.block_h, 16))
    )
    return Plan("cooperative", forward, backward, shape.L)


def sequences_of(shape: Shape) -> Sequences:
    """Every length from none to all, but packed none is 0, and resets in half of the steps."""
    T, B = shape.T, shape.B
    reset = torch.rand(T, B, generator=torch.Generator().manual_seed(B)) < 0.5
    if shape.rows == "packed":
        lengths = T - torch.arange(B) * T // B
        sizes = (torch.arange(T).unsqueeze(1) < lengths).sum(1)
        return Sequences(reset=reset, batch_sizes=sizes)
    if shape.rows == "ragged":
        return Sequences(lengths=torch.arange(B) * 3 % (T + 1), reset=reset)
    return Sequences()


def rows_of(shape: Shape, device: torch.device = CPU) -> Rows:
    steps = torch.empty(shape.T, device=device)
    return layout.rows_of(steps, shape.B, shape.D, sequences_of(shape))


def tensors(
    cell: str, shape: Shape, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Data:
    """The tensors of a forward and a backward launch. Steps that are skipped hold NaN."""
    of, B, H, L, D = SPECS[cell], shape.B, shape.H, shape.L, shape.D
    G, Z, rows = of.gates, L * D, rows_of(shape, device)
    R, two = rows.total, of.states == 2

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64).to(device, dtype)

    def nan(*sizes: int) -> Tensor:
        return torch.full(sizes, torch.nan, dtype=dtype, device=device)

    skipped = torch.zeros(D, R, 1, dtype=torch.bool, device=device)
    if shape.rows == "ragged":
        skipped = (rows.origins == SKIPPED).view(D, R, 1)

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(skipped[0], torch.nan)

    outs = [nan(R, D * H) for _ in range(L)]
    masks = tuple(poisoned(2 * (randn(R, H) > 0).to(dtype)) for _ in range(Z))
    bias = tuple(randn(G * H) for _ in range(2 * Z)) if shape.bias else None
    layers = Layers(
        gx=poisoned(randn(D, R, G * H)),
        w_ih=tuple(randn(G * H, H) / H**0.5 for _ in range(Z)),
        b_ih=bias and bias[:Z],
        w_hh=tuple(randn(G * H, H) / H**0.5 for _ in range(Z)),
        b_hh=bias and bias[Z:],
        masks=masks if shape.masks else None,
        h_0=randn(Z, B, H),
        c_0=randn(Z, B, H) if two else None,
        h_n=nan(Z, B, H),
        c_n=nan(Z, B, H) if two else None,
        out=tuple(outs[z // D] for z in range(Z)),
        gates=nan(Z, R, of.saved * H) if of.saved else None,
        cs=nan(Z, R, H) if two else None,
        origins=rows.origins,
        starts=rows.starts,
    )
    N = of.grad_tiles
    grads = Grads(
        out=poisoned(randn(R, D * H)),
        cs=poisoned(randn(Z, R, H)) if two and shape.rows != "dense" else None,
        h_n=randn(Z, B, H),
        c_n=randn(Z, B, H) if two else None,
        gates=nan(Z, R, N * H),
        h_0=nan(Z, B, H),
        c_0=nan(Z, B, H) if two else None,
    )
    return Data(layers, grads)


def expected(cell: str, shape: Shape, data: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the reference and autograd make of the same numbers in ``dtype``.

    Layer 0 gets gx as its input, each direction its own columns, through a W_ih of zeros and ones.
    """
    layers, grads = data
    of, H, L, D, T = SPECS[cell], shape.H, shape.L, shape.D, shape.T

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.nan_to_num(0.0).detach().cpu().to(dtype).clone().requires_grad_()

    one = torch.eye(D * of.gates * H, dtype=dtype).chunk(D)
    weights = [
        Weights(
            one[z] if z < D else leaf(layers.w_ih[z]),
            leaf(layers.w_hh[z]),
            leaf(layers.b_ih[z]) if layers.b_ih and z >= D else None,
            leaf(layers.b_hh[z]) if layers.b_hh else None,
        )
        for z in range(L * D)
    ]
    gx, h_0, c_0 = leaf(layers.gx), leaf(layers.h_0), leaf(layers.c_0)
    x = torch.cat(gx.unbind(), -1)
    masks = [leaf(mask) for mask in (layers.masks or ())[1:]]
    if shape.rows != "packed":
        x, masks = (x.unflatten(0, (T, -1)), [m.unflatten(0, (T, -1)) for m in masks])
    by_layer = [weights[z : z + D] for z in range(0, len(weights), D)]
    out, h_n, c_n, cs = differentiable_stack(
        cell, x, h_0, c_0, by_layer, masks, sequences_of(shape)
    )
    cs = None if cs is None else cs.flatten(1, -2)
    found = {"out": out.reshape(-1, D * H), "h_n": h_n, "c_n": c_n, "cs": cs}
    given = {"out": grads.out, "h_n": grads.h_n, "c_n": grads.c_n, "cs": grads.cs}
    given = {name: leaf(grad) for name, grad in given.items() if grad is not None}
    leaves = {"d_gx": gx, "d_h_0": h_0, "d_c_0": c_0}
    for z, w in enumerate(weights):
        leaves |= {f"d_b_hh of {z}": w.b_hh, f"d_w_ih of {z}": w.w_ih if z >= D else None}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(
        [found[name] for name in given], list(leaves.values()), list(given.values())
    )
    found |= dict(zip(leaves, gradients, strict=True))
    return {name: value.detach() for name, value in found.items() if value is not None}


def results(cell: str, shape: Shape, data: Data) -> dict[str, Tensor]:
    """The tensors that the kernels wrote, by the names of ``expected``."""
    layers, grads = data
    of, H, D = SPECS[cell], shape.H, shape.D
    dgates = grads.gates.unflatten(-1, (-1, H))
    found = {"out": layers.out[-1], "h_n": layers.h_n, "c_n": layers.c_n, "cs": layers.cs}
    found |= {"d_gx": grads.gates[:D, :, : of.gates * H], "d_h_0": grads.h_0, "d_c_0": grads.c_0}
    for z, of_z in enumerate(dgates.double()):
        if layers.b_hh:
            found[f"d_b_hh of {z}"] = of_z[:, list(of.recurrent)].sum(0).flatten()
        if z >= D:
            x = layers.out[z - 1] * (layers.masks[z].nan_to_num(0.0) if layers.masks else 1.0)
            found[f"d_w_ih of {z}"] = of_z[:, : of.gates].flatten(1).T @ x.double()
    return {name: value.cpu() for name, value in found.items() if value is not None}


def differences(cell: str, shape: Shape, data: Data) -> list[str]:
    """The results that exceed the error budget, in words."""
    ref = expected(cell, shape, data, data.layers.h_0.dtype)
    truth, found = expected(cell, shape, data, torch.float64), []
    got = results(cell, shape, data)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        budget = error_budget(name, value, ref[name], truth[name])
        # In fp64 the truth is no more exact than the result, so the relative RMS alone is bounded.
        exact = value.dtype == torch.float64 and budget.rms <= budget.rms_allowed
        found += [] if budget.ok or exact else [str(budget)]
    return found


def assert_tf32(cell: str, shape: Shape, data: Data) -> None:
    """Checks that the operands of fp32 were rounded, and nothing more."""
    ref, truth = (expected(cell, shape, data, dtype) for dtype in (torch.float32, torch.float64))
    for name, value in results(cell, shape, data).items():
        assert_budget(name, value, ref[name], truth[name], eps=2**-11)
    assert differences(cell, shape, data)
