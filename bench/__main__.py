"""``python -m bench``: fusedrnn beside torch.nn, from the same weights and on the same inputs."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import UserError, compare, cpu, distributed, gpu, plot, references, report, run, tune
from .cases import every_case
from .lessons import command as lesson

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
MAIN = tuple(SHARED)


class _Part:
    """A part of the main job as a command."""

    OPTIONS = MAIN
    run = staticmethod(run.main_job)

    def __init__(self, group: str, help: str):
        self.group, self.HELP = group, help

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(group=self.group)


class _Ragged:
    HELP = "sequences of different lengths: padded, packed, and with lengths"
    OPTIONS = ("device", "out", "seed", "quick")
    run = staticmethod(run.run_ragged)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        pass


COMMANDS: dict[str, Any] = {
    "imdb": _Part("imdb", "the part of the main job on reviews"),
    "sine": _Part("sine", "the part of the main job on a sine wave and a price"),
    "cpu": cpu, "ragged": _Ragged, "gpu": gpu, "lesson": lesson, "compare": compare,
    "plot": plot, "report": report, "references": references, "tune": tune,
    "distributed": distributed,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a wrong result, 2 for an error of the user."""
    parser = _parser()
    options = parser.parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__.partition(": ")[2],
        epilog="Without a command: results, speed and training on IMDB and the series.",
    )  # fmt: skip
    for name, settings in SHARED.items():
        parser.add_argument(f"--{name}", **settings)
    add = parser.add_argument_group("other cases").add_argument
    add("--cases", metavar="NAMES", help="time every provider on these cases or groups")
    add("--providers", metavar="NAMES", help="of --cases: these beside torch.nn, or all (default)")
    add("--cells", metavar="NAMES", help="of --cases: lstm,gru,rnn (default)")
    add("--gate-only", action="store_true", help="of --cases: compare results, measure no time")
    add("--resume", action="store_true", help="of --cases: continue the folder of --out")
    add("--list", action="store_true", help="print the cases")
    parser.set_defaults(run=_without_command, prog=parser.prog, command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        for option in getattr(module, "OPTIONS", ()):
            # An option before the command holds too, so there is no second default.
            sub.add_argument(f"--{option}", **SHARED[option] | {"default": argparse.SUPPRESS})
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, prog=sub.prog)
    return parser


def _without_command(options: argparse.Namespace) -> int:
    if options.list:
        for w in every_case():
            print(f"{w.name:<28} {w.group:<12} {w.shape} {w.dtype} {', '.join(w.cells)}")
        return 0
    return run.main_job(options) if options.cases is None else run.run_cases(options)


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not fit together, and settles the device."""
    of_cases = ("cases", "providers", "cells", "gate_only", "resume", "list")
    given = [name for name in of_cases if getattr(options, name)]
    if options.command and given:
        raise UserError(f"--{given[0].replace('_', '-')} cannot be used with {options.command}")
    if given and not (options.cases is not None or options.list):
        raise UserError(f"--{given[0].replace('_', '-')} needs --cases")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes must be a number above 0, not {options.minutes:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and torch finds none")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
