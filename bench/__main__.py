"""``python -m bench``: fusedrnn beside torch.nn, from the same weights and on the same inputs."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import UserError, run
from .cases import every_case

#: Options of several commands; a command lists those that it has.
SHARED: dict[str, dict[str, Any]] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "default: auto"},
    "imdb": {"metavar": "PATH", "help": "imdb.npz or aclImdb_v1.tar.gz; also FUSEDRNN_IMDB"},
    "download": {"action": "store_true", "help": "fetch imdb.npz (17 MB) if there is none"},
    "out": {"type": Path, "metavar": "DIR", "help": "folder of the results"},
    "seed": {"type": int, "default": 0, "help": "of weights, data and dropout"},
    "quick": {"action": "store_true", "help": "tiny sizes: tests the program, measures nothing"},
    "minutes": {"type": float, "help": "begin no case after this time"},
}
#: Of each command the module, which is imported when it is called, the function, and the help.
COMMANDS = {
    "imdb": ("run.main_job", "the part of the main job on reviews"),
    "sine": ("run.main_job", "the part of the main job on a sine and a price"),
    "cpu": ("cpu.run", "all workloads on the CPU, in new processes (8 minutes)"),
    "ragged": ("run.ragged_job", "different lengths: padded, packed, with lengths"),
    "gpu": ("gpu.run", "on a CUDA machine: gate, times, tests, tuning"),
    "lesson": ("lessons.command.run", "an experiment of a course; without a name, the list"),
    "compare": ("compare.run", "what became slower, wrong or larger between CSV files"),
    "plot": ("plot.run", "draw a results folder"),
    "report": ("report.run", "a folder's table of speeds, printed or into a page"),
    "references": ("references.run", "times of the named cases that others have published"),
    "tune": ("tune.run", "find the fastest plans, as entries for kernels/plan.py"),
    "distributed": ("distributed.run", "DDP and fully_shard beside one process"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a wrong result, 2 for an error of the user."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser(argv).parse_args(argv)
    try:
        _check(options)
        code = options.run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `--list | head`; Python would report it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser with the options of the commands in ``argv``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__.partition(": ")[2],
        epilog="Without a command: results, speed and training on IMDB and the series.",
    )  # fmt: skip
    for name, settings in SHARED.items():
        parser.add_argument(f"--{name}", **settings)
    add = parser.add_argument_group("other cases").add_argument
    add(
        "--cases",
        metavar="NAMES",
        dest="names",
        help="time every provider on these cases or groups",
    )
    add("--providers", metavar="NAMES", help="of --cases: these beside torch.nn, or all (default)")
    add("--cells", metavar="NAMES", help="of --cases: lstm,gru,rnn (default)")
    add("--gate-only", action="store_true", help="of --cases: compare results, measure no time")
    add("--resume", action="store_true", help="continue the folder of --out")
    add("--list", action="store_true", help="print the cases")
    parser.set_defaults(run=_without_command, prog=parser.prog, command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (place, words) in COMMANDS.items():
        sub = commands.add_parser(name, help=words, description=words)
        if name in argv:
            path, _, function = place.rpartition(".")
            module = import_module(f".{path}", __package__)
            of_module = getattr(module, "OPTIONS", ())
            for option in SHARED if function == "main_job" else of_module:
                # An option before the command holds too, so there is no second default.
                sub.add_argument(f"--{option}", **SHARED[option] | {"default": argparse.SUPPRESS})
            if path != "run":
                module.add_arguments(sub)
            sub.set_defaults(run=getattr(module, function), prog=sub.prog)
    return parser


def _without_command(options: argparse.Namespace) -> int:
    if options.list:
        for w in every_case():
            print(f"{w.name:<28} {w.group:<12} {w.shape} {w.dtype} {', '.join(w.cells)}")
        return 0
    return run.main_job(options) if options.names is None else run.cases_job(options)


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not fit together, and settles the device."""
    alone = {"--cases": options.names, "--list": options.list}
    others = {"--providers": options.providers, "--cells": options.cells}
    others["--gate-only"] = options.gate_only
    for name, value in (alone | others).items():
        if value and options.command:
            raise UserError(f"{name} cannot be used with {options.command}")
        if value and name in others and options.names is None:
            raise UserError(f"{name} needs --cases")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes must be a number above 0, not {options.minutes:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and torch finds none")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
