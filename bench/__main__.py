"""``python -m bench``: fusedrnn beside torch.nn, from the same weights and on the same inputs."""

import argparse
import math
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import UserError

#: Options of several commands, whose modules list those that they take.
SHARED: dict[str, dict[str, Any]] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "default: auto"},
    "imdb": {"metavar": "PATH", "help": "Keras' imdb.npz; also FUSEDRNN_IMDB"},
    "download": {"action": "store_true", "help": "fetch imdb.npz (17 MB) if there is none"},
    "out": {"type": Path, "metavar": "DIR", "help": "of the results; default bench/results/local"},
    "seed": {"type": int, "default": 0, "help": "of weights, data and dropout"},
    "quick": {"action": "store_true", "help": "tiny sizes: tests the program, measures nothing"},
    "minutes": {"type": float, "default": math.inf, "help": "begin no case after this time"},
    "resume": {"action": "store_true", "help": "continue the folder of --out"},
}
#: Of each command the module, which is imported when it is called, the function, and the help.
COMMANDS = {
    "demo": ("run.demo", "results, speed and training on reviews and series; the default"),
    "imdb": ("run.demo", "the part of the demo on reviews"),
    "sine": ("run.demo", "the part of the demo on a sine and a price"),
    "cpu": ("cpu.run", "all workloads on the CPU, in new processes (8 minutes)"),
    "ragged": ("run.ragged", "different lengths: padded, packed, with lengths"),
    "cases": ("peers.run", "all implementations on named cases; without names, their list"),
    "gpu": ("gpu.run", "on a CUDA machine: gate, times, tests, tuning"),
    "tune": ("tune.run", "find the fastest plans, as entries for kernels/plan.py"),
    "ladder": ("ladder.run", "the kernels side by side, or one alone: docs/kernels.md"),
    "lesson": ("lessons.command.run", "an experiment of a course; without a name, the list"),
    "compare": ("compare.run", "what became slower, wrong or larger between CSV files"),
    "report": ("pictures.run", "the table of a results folder; --plot draws it"),
    "references": ("references.run", "times of the named cases that others have published"),
    "distributed": ("distributed.run", "DDP and fully_shard beside one process"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a wrong result, 2 for an error of the user, 3 of CUDA."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["demo", *argv]
    options = _parser(argv[0]).parse_args(argv)
    try:
        _check(options)
        code = options.run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"python -m bench {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `cases | head`; Python would report it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        if "CUDA error" not in str(error):
            raise
        traceback.print_exc()
        return 3


def _parser(command: str) -> argparse.ArgumentParser:
    """Returns the parser, with the options of one command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", usage="python -m bench [COMMAND] [OPTIONS]",
        description=__doc__.partition(": ")[2], epilog="COMMAND --help lists the options of each.",
    )  # fmt: skip
    commands = parser.add_subparsers(
        title="commands", metavar="", dest="command", prog="python -m bench"
    )
    for name, (place, words) in COMMANDS.items():
        sub = commands.add_parser(name, help=words, description=words)
        if name == command:
            path, _, function = place.rpartition(".")
            module = import_module(f".{path}", __package__)
            for argument, details in getattr(module, "ARGUMENTS", {}).items():
                sub.add_argument(argument, **details)
            for option in getattr(module, "OPTIONS", ()):
                sub.add_argument(f"--{option}", **SHARED[option])
            sub.set_defaults(run=getattr(module, function))
    return parser


def _check(options: argparse.Namespace) -> None:
    """Settles the device."""
    if not getattr(options, "minutes", 1) > 0:
        raise UserError(f"--minutes must be a number above 0, not {options.minutes:g}")
    if "device" in options:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda needs a GPU, and torch finds none")
        if options.device == "auto":
            options.device = "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
