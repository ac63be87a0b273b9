"""Launches the kernels of schedule *cooperative* (``cooperative.py``), in rounds of batch tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cells import CELLS
from .cooperative import _cooperative_bwd_kernel, _cooperative_fwd_kernel
from .exchange import Workspace
from .launch import cooperative_options, in_rounds, kept, made_once, mask_of_each_layer
from .model import batch_tiles
from .plan import Plan, Tiles
from .rows import Rows
from .slices import accumulators
from .spec import SPECS, Weights

#: Polls of one wait before it traps: about 10 seconds, if one takes 0.65 us as modelled.
PATIENCE = 1 << 24


def cooperative_fwd(
    cell: str,
    plan: Plan,
    gx: torch.Tensor,
    weights: Sequence[Weights],
    masks: Sequence[torch.Tensor],
    h_0: torch.Tensor,
    c_0: torch.Tensor | None,
    outs: Sequence[torch.Tensor],
    h_n: torch.Tensor,
    c_n: torch.Tensor | None,
    gates: torch.Tensor | None,
    cs: torch.Tensor | None,
    rows: Rows,
    workspace: Workspace,
    aux: torch.Tensor | None = None,
    patience: int = PATIENCE,
) -> None:
    """Runs the layers of one launch and fills ``outs``, ``h_n``, ``c_n`` and what is saved.

    gx: ``[D, R, G*H]``, of the first layer; weights: one entry for each layer and direction (Z of
    them), each tensor with ``plan.members`` in front if they are several; masks: dropout factors
    ``[R, H]`` between the layers, L - 1 or none; h_0, c_0, h_n, c_n: ``[Z, B, H]``; outs:
    ``[R, D*H]`` for each layer; gates ``[Z, R, S*H]`` and cs ``[Z, R, H]``:
    None when not saved; rows: what R means; workspace: of ``exchange.workspace``, fresh for
    each call. All contiguous.
    """
    tiles = plan.forward
    (_, B, H), D, L = h_0.shape, gx.shape[0], len(outs)
    has_bias = weights[0].b_hh is not None

    def launch(grid: tuple[int, int, int], first_tile: int) -> None:
        _cooperative_fwd_kernel[grid](
            gx,
            # A pointer that the switches below leave unread is any tensor of that dtype.
            tuple(w.w_ih for w in weights),
            tuple(w.w_hh if w.b_ih is None else w.b_ih for w in weights),
            tuple(w.w_hh for w in weights),
            tuple(w.w_hh if w.b_hh is None else w.b_hh for w in weights),
            mask_of_each_layer(masks, gx, L),
            h_0,
            h_0 if c_0 is None else c_0,
            rows.origins,
            rows.starts,
            aux,
            tuple(outs[z // D] for z in range(L * D)),
            gx if gates is None else gates,
            gx if cs is None else cs,
            h_n,
            h_n if c_n is None else c_n,
            workspace.slots,
            workspace.counters,
            rows.T,
            B,
            rows.total,
            first_tile,
            patience,
            B // plan.members,
            **_fwd_arguments(cell, plan, L, D, H, has_bias, bool(masks), kept(gates, cs), rows),
        )

    in_rounds(launch, tiles, gx, batch_tiles(B, tiles.block_b, plan.members), H, L * D)


def cooperative_bwd(
    cell: str,
    plan: Plan,
    d_out: torch.Tensor | None,
    d_cs: torch.Tensor | None,
    d_h_n: torch.Tensor,
    d_c_n: torch.Tensor | None,
    weights: Sequence[Weights],
    masks: Sequence[torch.Tensor],
    h_0: torch.Tensor,
    c_0: torch.Tensor | None,
    outs: Sequence[torch.Tensor],
    gates: torch.Tensor,
    cs: torch.Tensor | None,
    dgates: torch.Tensor,
    d_h_0: torch.Tensor,
    d_c_0: torch.Tensor | None,
    rows: Rows,
    workspace: Workspace,
    aux: torch.Tensor | None = None,
    patience: int = PATIENCE,
) -> None:
    """Runs those layers backwards: fills ``dgates [Z, R, N*H]``, d_h_0, d_c_0 ``[Z, B, H]``.

    d_out: ``[R, D*H]`` of the last layer, d_cs: ``[Z, R, H]``, the gradient of every c; each None
    where no gradient arrives; dgates: with ``SLACK`` rows behind it, if the rows are packed; the
    rest as in ``cooperative_fwd``.
    """
    tiles = plan.backward
    assert tiles is not None
    (Z, B, H), L = h_0.shape, len(outs)

    def launch(grid: tuple[int, int, int], first_tile: int) -> None:
        _cooperative_bwd_kernel[grid](
            gates if d_out is None else d_out,
            gates if d_cs is None else d_cs,
            d_h_n,
            d_h_n if d_c_n is None else d_c_n,
            tuple(w.w_ih for w in weights),
            tuple(w.w_hh for w in weights),
            mask_of_each_layer(masks, gates, L),
            h_0,
            h_0 if c_0 is None else c_0,
            tuple(outs[z * L // Z] for z in range(Z)),
            gates,
            gates if cs is None else cs,
            rows.origins,
            rows.starts,
            aux,
            dgates,
            d_h_0,
            d_h_0 if d_c_0 is None else d_c_0,
            workspace.counters,
            rows.T,
            B,
            rows.total,
            first_tile,
            patience,
            B // plan.members,
            **_bwd_arguments(
                cell, plan, L, Z // L, H, d_out is not None, d_cs is not None, bool(masks), rows
            ),
        )

    in_rounds(launch, tiles, gates, batch_tiles(B, tiles.block_b, plan.members), H, Z)


def fwd_constants(
    cell: str, plan: Plan, L: int, D: int, H: int, has_bias: bool, has_mask: bool, save: int,
    rows: Rows,
) -> dict:  # fmt: skip
    """The compile-time arguments of the forward kernel; together with dtypes, one binary each."""
    return _constants(cell, plan.forward, plan.members, L, D, H, has_mask, rows) | {
        "OPERAND": CELLS[cell].operand,
        "FORWARD": CELLS[cell].forward,
        "SHARES_H": SPECS[cell].operands[0] == "h",
        "HAS_BIAS": has_bias,
        "SAVE": save,
    }


def bwd_constants(
    cell: str, plan: Plan, L: int, D: int, H: int, has_d_out: bool, has_d_cs: bool,
    has_mask: bool, rows: Rows,
) -> dict:  # fmt: skip
    """The compile-time arguments of the backward kernel."""
    spec = SPECS[cell]
    assert plan.backward is not None
    return _constants(cell, plan.backward, plan.members, L, D, H, has_mask, rows) | {
        "ADJOINT": CELLS[cell].adjoint,
        "FOLD": CELLS[cell].fold,
        "FIRST_TILE": spec.first_tiles,
        "TILES": tuple(tuple(spec.recurrent[g] for g in gates) for gates in spec.phases),
        "GRAD_TILES": spec.grad_tiles,
        "HAS_D_OUT": has_d_out,
        "HAS_D_CS": has_d_cs,
    }


def _bwd_options(plan: Plan) -> dict:
    assert plan.backward is not None
    return cooperative_options(plan.backward)


_fwd_arguments = made_once(fwd_constants, lambda plan: cooperative_options(plan.forward))
_bwd_arguments = made_once(bwd_constants, _bwd_options)


def _constants(
    cell: str, tiles: Tiles, members: int, L: int, D: int, H: int, has_mask: bool, rows: Rows
) -> dict:
    spec = SPECS[cell]
    return {
        "PHASES": spec.phases,
        "SAVED": tuple(range(spec.saved)),
        "STATES": spec.states,
        "L": L,
        "D": D,
        "H": H,
        "GATES": tuple(range(spec.gates)),
        "BLOCK_B": tiles.block_b,
        "BLOCKS": tiles.blocks,
        "K_CHUNKS": tiles.k_chunks,
        "HAS_MASK": has_mask,
        "MEMBERS": members > 1,
        "DOT": (tiles.input_precision, accumulators(tiles, max(spec.gates, len(tiles.k_chunks)))),
        **rows.switches,
    }
