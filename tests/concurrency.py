"""Ring 2: a grid of programs that wait for each other, each program in a process of its own.

Triton's interpreter runs the programs of a grid one after another, so the first wait for a later
program would never end. Here every process calls the same launcher on the same tensors in shared
memory, and its interpreter runs one program of the grid only. Atomics of the interpreter are real
ones, so the protocol is really run, by programs that really overlap; random delays before stores,
atomics and loads past L1 make them overlap differently each time.
"""

import math
import multiprocessing
import random
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from triton._C.libtriton import ir
from triton.runtime import interpreter

builder = interpreter.interpreter_builder


def shared(tree: Any) -> Any:
    """Moves every tensor of a tuple, list or dict into shared memory, seen by all processes."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.contiguous().share_memory_(), tree)


def run_concurrently(
    launches: Sequence[Callable[[], None]],
    programs: int,
    *,
    delay: float = 0.0,
    seed: int = 0,
    slow: int | None = None,
) -> list[str]:
    """Makes all calls at once, each in ``programs`` processes that run one program of its grids.

    The launches call launchers on shared tensors. Every program pauses for a random time, up to
    ``delay`` seconds, before each store, atomic and load past L1; or the program ``slow`` alone
    does, always for so long. Returns what each failed program raised, nothing if all ended.
    """
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    processes = [
        context.Process(target=_run_one, args=(launch, n, programs, delay, seed, slow, failures))
        for launch in launches
        for n in range(programs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = []
    while not failures.empty():
        found.append(failures.get())
    crashed = sum(process.exitcode != 0 for process in processes)
    return found + [f"{crashed} processes crashed"] * bool(crashed)


def _run_one(launch, number, programs, delay, seed, slow, failures) -> None:
    torch.set_num_threads(1)
    # Otherwise device_assert is left out, as on a GPU without debug.
    builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    _run_program(number, programs)
    source = random.Random(1000 * seed + number)
    if slow is None and delay:
        _pause_before_memory(lambda: source.random() * delay)
    elif slow == number:
        _pause_before_memory(lambda: delay)
    try:
        launch()
    except BaseException:  # handed to the parent, which fails the test
        failures.put(traceback.format_exc())


def _run_program(number: int, programs: int) -> None:
    """Makes the interpreter run one program of every grid, where it would run all."""
    run_grid = interpreter.GridExecutor.__call__

    def run_one_of_grid(executor, *args, **kwargs):
        grid = executor.grid
        assert math.prod(grid) == programs, f"the grid is {grid}, not {programs} programs"
        x, rest = number % grid[0], number // grid[0]
        builder.set_grid_dim = lambda *_: setattr(builder, "grid_dim", grid)
        builder.set_grid_idx = lambda *_: setattr(
            builder, "grid_idx", (x, rest % grid[1], rest // grid[1])
        )
        executor.grid = (1, 1, 1)
        return run_grid(executor, *args, **kwargs)

    interpreter.GridExecutor.__call__ = run_one_of_grid


def _pause_before_memory(seconds: Callable[[], float]) -> None:
    for name in ("create_masked_store", "create_store", "create_atomic_rmw", "create_masked_load"):
        original = getattr(builder, name)

        def slowly(*args, _original=original, _is_load=name == "create_masked_load", **kwargs):
            if not _is_load or ir.CACHE_MODIFIER.CG in args:
                time.sleep(seconds())
            return _original(*args, **kwargs)

        setattr(builder, name, slowly)
