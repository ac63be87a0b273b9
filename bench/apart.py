"""Runs a function in a process of its own, in which nothing else has run.

What a process did before decides how fast some calls are: malloc asks the system for whatever is
beyond 32 MiB anew in every call, unless earlier work left room in the heap. torch.nn's training of
imdb-one-hot by an LSTM takes 2.0 times our time without, and took 0.6 with it (docs/benchmarking.md
names the files). Users train one model in a process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def apart(function: Callable[..., Result], *args: object) -> Result:
    """``function(*args)``, which both must be picklable, with as many threads as here.

    Raises:
        BrokenProcessPool: the process died.
        BaseException: whatever the function raises.
    """
    # A fork of a server that has imported all and run nothing: 0.1 s, where an import takes 3.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), function, args).result()


def _with_threads(threads: int, function: Callable[..., Result], args: tuple) -> Result:
    torch.set_num_threads(threads)
    return function(*args)
