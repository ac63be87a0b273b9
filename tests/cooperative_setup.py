"""What the tests of the cooperative schedule run: shapes, tensors, the launches and the truth."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from concurrency import run_concurrently, shared

from fusedrnn.kernels import cooperative_launch, exchange
from fusedrnn.kernels.model import batch_tiles
from fusedrnn.kernels.plan import Plan, Tiles
from fusedrnn.kernels.rows import SLACK, Rows, origins_of, packed_rows
from fusedrnn.kernels.spec import SPECS, Weights
from fusedrnn.loop import loop_bwd, loop_fwd
from fusedrnn.testing import assert_budget

#: Polls until a test gives up on a lost program: half a minute without pauses.
PATIENCE = 1_000_000
#: Short pauses overlap the programs differently in each run; the seed names the pattern.
DELAY = 0.002


class Shape(NamedTuple):
    """T steps, B sequences, H units in slices of ``block_h``, L layers, D directions.

    ``at_once`` batch tiles of 16 rows run in one launch. ``rows`` are "dense", "ragged" (with
    lengths and resets) or "packed". ``members``: equal parts of B with weights of their own.
    ``folded``: how many dots of a sum share an accumulator.
    """

    T: int
    B: int
    H: int
    block_h: int
    L: int = 1
    D: int = 1
    mask: bool = False
    at_once: int = 2
    rows: str = "dense"
    members: int = 1
    folded: int = 0

    @property
    def programs(self) -> int:
        """Of one launch."""
        tiles = min(batch_tiles(self.B, 16, self.members), self.at_once)
        return -(-self.H // self.block_h) * tiles * self.L * self.D


def rows_of(shape: Shape) -> Rows:
    """Every length from none to all, though packed none is 0, and resets in half of the steps."""
    T, B, D, cpu = shape.T, shape.B, shape.D, torch.device("cpu")
    reset = torch.rand(T, B, generator=torch.Generator().manual_seed(B)) < 0.5
    if shape.rows == "packed":
        lengths = T - torch.arange(B) * T // B
        return packed_rows((torch.arange(T)[:, None] < lengths).sum(1), D, cpu, reset)
    if shape.rows == "ragged":
        lengths = torch.arange(B) * 3 % (T + 1)
        return Rows(T, B, origins_of(T, B, D, cpu, lengths, reset))
    return Rows(T, B)


def plan_of(shape: Shape) -> Plan:
    chunks = ((0, 2, 16), (32, 2, 16))[: 1 + (shape.H > 32)]
    tiles = Tiles(
        16, ((0, shape.block_h),), 4, None, "ieee", 0, chunks, shape.at_once, shape.folded
    )
    return Plan("cooperative", tiles, tiles, (), members=shape.members)


def tensors(cell: str, shape: Shape, dtype=torch.float32) -> dict[str, Any]:
    """Everything a forward and a backward launch read, random, and all they write, NaN."""
    of, (T, B, H, _, L, D, mask, *_) = SPECS[cell], shape
    Z, rows, front = L * D, rows_of(shape), (shape.members,)[: shape.members > 1]
    steps = (T, B) if rows.sizes is None else (rows.total,)

    def randn(*sizes):
        return torch.randn(sizes, dtype=torch.float64).to(dtype)

    def nan(*sizes):
        return torch.full(sizes, torch.nan, dtype=dtype)

    weights = [
        Weights(randn(*front, of.gates * H, H) / H**0.5, randn(*front, of.gates * H, H) / H**0.5,
                randn(*front, of.gates * H), randn(*front, of.gates * H))
        for _ in range(Z)
    ]  # fmt: skip
    two = of.states == 2
    return {
        "gx": randn(D, *steps, of.gates * H),
        "weights": weights,
        "masks": [torch.rand(*steps, H).round().to(dtype) * 2 for _ in range(L - 1)] * mask,
        "h_0": randn(Z, B, H),
        "c_0": randn(Z, B, H) if two else None,
        "outs": [nan(*steps, D * H) for _ in range(L)],
        "h_n": nan(Z, B, H),
        "c_n": nan(Z, B, H) if two else None,
        "gates": nan(Z, *steps, of.saved * H),
        "cs": nan(Z, *steps, H) if two else None,
        "d_out": randn(*steps, D * H),
        "d_cs": randn(Z, *steps, H) if two and shape.rows != "dense" else None,
        "d_h_n": randn(Z, B, H),
        "d_c_n": randn(Z, B, H) if two else None,
        "dgates": nan(Z * rows.total + SLACK, of.grad_tiles * H)[:-SLACK].view(
            Z, *steps, of.grad_tiles * H
        ),
        "d_h_0": nan(Z, B, H),
        "d_c_0": nan(Z, B, H) if two else None,
    }


FORWARD = ("gx", "weights", "masks", "h_0", "c_0", "outs", "h_n", "c_n", "gates", "cs")
BACKWARD = (
    "d_out", "d_cs", "d_h_n", "d_c_n", "weights", "masks", "h_0", "c_0", "outs", "gates", "cs",
    "dgates", "d_h_0", "d_c_0",
)  # fmt: skip
RESULTS = ("outs", "h_n", "c_n", "gates", "cs", "dgates", "d_h_0", "d_c_0")


def workspace(cell: str, shape: Shape, like: torch.Tensor) -> exchange.Workspace:
    sizes = shape.L * shape.D, shape.B, shape.H
    return shared(exchange.workspace(cell, plan_of(shape).forward, like, *sizes, shape.members))


def launches(cell, shape, data, works, aux=None, patience=PATIENCE):
    """The two launches of ``data`` as calls without arguments."""
    plan, rows = plan_of(shape), rows_of(shape)

    def forward():
        arguments = [data[name] for name in FORWARD]
        cooperative_launch.cooperative_fwd(cell, plan, *arguments, rows, works[0], aux, patience)

    def backward():
        arguments = [data[name] for name in BACKWARD]
        cooperative_launch.cooperative_bwd(cell, plan, *arguments, rows, works[1], aux, patience)

    return forward, backward


def run(
    cell, shape, data, *, delay=DELAY, seed=0, slow=None, works=None, aux=None, **launch
) -> list[str]:
    """Both launches, each program in its process; fills ``data`` and returns the failures."""
    works = works or [workspace(cell, shape, data["gx"]) for _ in range(2)]
    forward, backward = launches(cell, shape, data, works, aux, **launch)
    pauses = {"delay": delay, "seed": seed, "slow": slow}
    failed = run_concurrently([forward], shape.programs, **pauses)
    return failed or run_concurrently([backward], shape.programs, **pauses)


def expected(cell: str, shape: Shape, data: dict, dtype: torch.dtype) -> dict[str, Any]:
    """The same by the reference in ``dtype``, layer by layer and member by member."""
    rows, each = rows_of(shape), shape.B // shape.members
    if shape.members == 1:
        return expected_of_one(cell, shape, data, dtype, rows)

    def part(tree, own):  # B is the last dimension but one of every tensor
        if isinstance(tree, torch.Tensor):
            return tree[..., own, :]
        return [part(each, own) for each in tree] if isinstance(tree, list) else tree

    found = []
    for n in range(shape.members):
        own = slice(n * each, (n + 1) * each)
        of_one = {name: part(value, own) for name, value in data.items() if name != "weights"}
        of_one["weights"] = [Weights(*(w[n] for w in z[:4])) for z in data["weights"]]
        origins = None if rows.origins is None else rows.origins[..., own].contiguous()
        one = shape._replace(B=each, members=1)
        found.append(expected_of_one(cell, one, of_one, dtype, Rows(shape.T, each, origins)))
    joined = {
        name: None if found[0][name] is None else torch.cat([f[name] for f in found], -2)
        for name in RESULTS
        if name != "outs"
    }
    outs = [torch.cat(parts, -2) for parts in zip(*(f["outs"] for f in found), strict=True)]
    return joined | {"outs": outs}


def expected_of_one(
    cell: str, shape: Shape, data: dict, dtype: torch.dtype, of_call: Rows
) -> dict[str, Any]:
    """``expected`` without members."""
    of, H, L, D = SPECS[cell], shape.H, shape.L, shape.D

    def cast(tree):
        if isinstance(tree, torch.Tensor):
            return tree.detach().clone().to(dtype)
        return type(tree)(map(cast, tree)) if isinstance(tree, list) else tree

    r = {name: cast(value) for name, value in data.items() if name != "weights"}
    weights = [Weights(*(w.to(dtype) for w in each[:4])) for each in data["weights"]]

    def rows(name, layer):
        return None if r[name] is None else r[name][layer * D : (layer + 1) * D]

    gx = r["gx"]
    for layer in range(L):
        if layer:
            x = r["outs"][layer - 1]
            x = x * r["masks"][layer - 1] if r["masks"] else x
            w = weights[layer]
            gx = (x @ w.w_ih.T + w.b_ih)[None]
        loop_fwd(
            cell, gx.clone(), weights[layer * D : (layer + 1) * D], rows("h_0", layer),
            rows("c_0", layer), r["outs"][layer],
            *(rows(name, layer) for name in ("h_n", "c_n", "gates", "cs")), of_call,
        )  # fmt: skip
    d_out = r["d_out"]
    for layer in reversed(range(L)):
        loop_bwd(
            cell, d_out, rows("d_cs", layer), rows("d_h_n", layer), rows("d_c_n", layer),
            weights[layer * D : (layer + 1) * D], rows("h_0", layer), rows("c_0", layer),
            r["outs"][layer],
            *(rows(name, layer) for name in ("gates", "cs", "dgates", "d_h_0", "d_c_0")),
            of_call,
        )  # fmt: skip
        if layer:
            d_out = r["dgates"][layer, ..., : of.gates * H] @ weights[layer].w_ih
            d_out = d_out * r["masks"][layer - 1] if r["masks"] else d_out
    return r


def flat(results: dict) -> dict[str, torch.Tensor]:
    named = {name: results[name] for name in RESULTS if results[name] is not None}
    for layer, out in enumerate(named.pop("outs")):
        named[f"out of layer {layer}"] = out
    return named


def differences(cell, shape, data) -> list[str]:
    """What of ``data`` exceeds the error budget, in words."""
    truth = flat(expected(cell, shape, data, torch.float64))
    ref = flat(expected(cell, shape, data, data["gx"].dtype))
    found = []
    for name, got in flat(data).items():
        try:
            assert_budget(name, got, ref[name], truth[name])
        except AssertionError as error:
            found.append(str(error))
    return found


def prepared(cell, shape, dtype=torch.float32):
    return shared(tensors(cell, shape, dtype))


def check(cell, shape, **options) -> dict[str, Any]:
    data = prepared(cell, shape)
    assert not run(cell, shape, data, **options)
    found = differences(cell, shape, data)
    assert not found, found
    return data
