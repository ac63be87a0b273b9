"""Runs the launches of schedule cooperative with each program in a process of its own."""

from functools import partial

import torch
from concurrency import run_concurrently, shared
from kernel_cases import Data, Shape, cooperative_plan, differences, rows_of, tensors

from fusedrnn.kernels import cooperative, launch
from fusedrnn.kernels.cells import CELLS

#: Polls until a test gives up on a lost program: half a minute without pauses.
PATIENCE = 1_000_000
#: Short pauses overlap the programs differently in each run; the seed names the pattern.
DELAY = 0.002


def prepared(cell: str, shape: Shape, dtype: torch.dtype = torch.float32) -> Data:
    """The tensors of a call in shared memory."""
    return shared(tensors(cell, shape, dtype))


def workspaces(cell: str, shape: Shape, data: Data) -> list[launch.Workspace]:
    """The memory of both launches, which the programs share."""
    h_0, plan, works = data.layers.h_0, cooperative_plan(shape), []
    for tiles, is_forward in ((plan.forward, True), (plan.backward, False)):
        tile = cooperative.tile_of(CELLS[cell], data.layers, tiles, is_forward)
        count = -(-shape.B // tile.block_b)
        work = launch.workspace(h_0, shape.L * shape.D, count, tile.block_b, tile.pitch)
        works.append(shared(work))
    return works


def launches(cell, shape, data, works, patience=PATIENCE):
    """The launches of forward and backward as calls without arguments, for a process each."""
    plan, rows = cooperative_plan(shape), rows_of(shape)

    def call(run, tensors, work):
        launch.PATIENCE, launch.workspace = patience, lambda *sizes: work
        run(cell, plan, *tensors, rows)

    return (
        partial(call, cooperative.forward, data[:1], works[0]),
        partial(call, cooperative.backward, data, works[1]),
    )


def run(cell, shape, data, *, works=None, patience=PATIENCE, delay=DELAY, **pauses) -> list[str]:
    """Runs both launches, which fill ``data``, and returns what failed."""
    works = works or workspaces(cell, shape, data)
    forward, backward = launches(cell, shape, data, works, patience)
    failed = run_concurrently([forward], shape.programs, delay=delay, **pauses)
    return failed or run_concurrently([backward], shape.programs, delay=delay, **pauses)


def check(cell, shape, dtype=torch.float32, **pauses) -> Data:
    data = prepared(cell, shape, dtype)
    assert not run(cell, shape, data, **pauses)
    found = differences(cell, shape, data)
    assert not found, found
    return data
