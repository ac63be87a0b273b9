"""Random tensors of one layer's launch, and what autograd makes of them in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from fusedrnn.kernels.rows import PREVIOUS, SKIPPED, ZERO, Rows, origins_of, packed_rows
from fusedrnn.kernels.spec import SPECS
from fusedrnn.kernels.tensors import Grads, Layers
from fusedrnn.reference import step_of_gx

FORMS = ("dense", "ragged", "packed")


def rows_of(form: str, T: int, B: int, D: int, device="cpu") -> Rows:
    """Rows with every step; with lengths (0 among them) and resets; or packed with resets."""
    if form == "dense":
        return Rows(T, B)
    reset = torch.rand(T, B) < 0.2
    if form == "ragged":
        lengths = torch.randint(0, T + 1, (B,))
        return Rows(T, B, origins_of(T, B, D, torch.device(device), lengths, reset))
    lengths = torch.randint(1, T + 1, (B,)).sort(descending=True).values
    sizes = (lengths > torch.arange(int(lengths[0])).unsqueeze(1)).sum(1)
    return packed_rows(sizes, D, torch.device(device), reset[: len(sizes)])


def make(cell: str, H: int, D: int, rows: Rows, dtype, *, device="cpu", bias=True):
    """The tensors of a launch of one layer, random where they are read and NaN where written."""
    spec, B, R = SPECS[cell], rows.B, rows.total
    G, S, N = spec.gates, spec.saved, spec.grad_tiles

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    def uniform(*shape: int) -> Tensor:
        return ((torch.rand(*shape, dtype=torch.float64) * 2 - 1) / H**0.5).to(device, dtype)

    def unwritten(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    has_c = spec.states == 2
    out = unwritten(R, D * H)
    layers = Layers(
        gx=randn(D, R, G * H),
        w_ih=None,
        b_ih=None,
        w_hh=tuple(uniform(G * H, H) for _ in range(D)),
        b_hh=tuple(uniform(G * H) for _ in range(D)) if bias else None,
        masks=None,
        h_0=randn(D, B, H),
        c_0=randn(D, B, H) if has_c else None,
        h_n=unwritten(D, B, H),
        c_n=unwritten(D, B, H) if has_c else None,
        out=(out,) * D,
        gates=unwritten(D, R, S * H) if S else None,
        cs=unwritten(D, R, H) if has_c else None,
        origins=rows.origins,
        starts=rows.starts,
    )
    grads = Grads(
        out=randn(R, D * H),
        cs=randn(D, R, H) if has_c else None,
        h_n=randn(D, B, H),
        c_n=randn(D, B, H) if has_c else None,
        gates=unwritten(D, R, N * H),
        h_0=unwritten(D, B, H),
        c_0=unwritten(D, B, H) if has_c else None,
    )
    return layers, grads


def results(layers: Layers, grads: Grads) -> dict[str, Tensor]:
    """What a schedule wrote, by name; of dgates the tiles of the input's pre-activations."""
    columns = layers.gx.shape[-1]
    found = {"out": layers.out[0], "h_n": layers.h_n, "c_n": layers.c_n, "cs": layers.cs}
    found |= {"dgates": grads.gates[..., :columns], "d_h_0": grads.h_0, "d_c_0": grads.c_0}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def expected(cell: str, layers: Layers, grads: Grads, rows: Rows, dtype) -> dict[str, Tensor]:
    """The same of plain torch in ``dtype``: a loop over steps, and autograd."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).detach().requires_grad_()

    gx, h_0, c_0 = leaf(layers.gx), leaf(layers.h_0), leaf(layers.c_0)
    D, B, H = layers.h_0.shape
    outs, every_c, finals = [], [], []
    for d in range(D):
        bias = None if layers.b_hh is None else layers.b_hh[d].to(dtype)
        weights = SimpleNamespace(w_hh=layers.w_hh[d].to(dtype), b_hh=bias, w_hr=None)
        first = h_0[d], None if c_0 is None else c_0[d]
        out, cs, final = _direction(cell, gx[d], first, weights, rows, d)
        outs.append(out)
        every_c.append(cs)
        finals.append(final)
    made = {"out": torch.cat(outs, -1), "h_n": torch.stack([h for h, _ in finals])}
    given = {"out": grads.out, "h_n": grads.h_n}
    if c_0 is not None:
        made |= {"c_n": torch.stack([c for _, c in finals]), "cs": torch.stack(every_c)}
        given |= {"c_n": grads.c_n, "cs": grads.cs}
    cotangents = [None if g is None else g.to(dtype) for g in given.values()]
    pairs = [pair for pair in zip(made.values(), cotangents, strict=True) if pair[1] is not None]
    leaves = [tensor for tensor in (gx, h_0, c_0) if tensor is not None]
    loss = sum((tensor * cotangent).sum() for tensor, cotangent in pairs)
    found = torch.autograd.grad(loss, leaves)
    names = ("dgates", "d_h_0", "d_c_0")
    return {name: t.detach() for name, t in made.items()} | dict(zip(names, found, strict=False))


def _direction(cell: str, gx: Tensor, state: tuple, weights: SimpleNamespace, rows: Rows, d: int):
    """Rows of out and of c, and the final state, of one direction."""
    h, c = state
    spans = rows.spans()
    hs: list = [None] * rows.T
    cs: list = [None] * rows.T
    for t in range(rows.T) if d == 0 else reversed(range(rows.T)):
        n = spans[t].stop - spans[t].start
        origins = torch.full((rows.B,), PREVIOUS)
        if rows.origins is not None:
            origins = rows.origins[d, t].cpu()
        origins = origins.to(gx.device).unsqueeze(-1)
        x = torch.cat((gx[spans[t]], gx.new_zeros(rows.B - n, gx.shape[-1])))
        h_in, c_in = (
            s if s is None else torch.where(origins == ZERO, torch.zeros_like(s), s) for s in (h, c)
        )
        h_out, c_out, _ = step_of_gx(cell, x, h_in, c_in, weights)
        there = origins != SKIPPED
        h = torch.where(there, h_out, h)
        hs[t] = torch.where(there, h, 0.0)[:n]
        if c is not None:
            c = torch.where(there, c_out, c)
            cs[t] = torch.where(there, c, 0.0)[:n]
    return torch.cat(hs), torch.cat(cs) if c is not None else None, (h, c)
