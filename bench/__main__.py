"""``python -m bench``: fusedrnn beside torch.nn, from the same weights and on the same inputs."""

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import UserError

#: Of every argument, where a command has it.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "names": {"nargs": "?", "metavar": "NAMES", "help": "of cases or groups, with commas"},
    "lesson": {"nargs": "?", "metavar": "NAME", "help": "without it, the list"},
    "rung": {"nargs": "?", "choices": [*"12345", "scan"], "help": "without it, the table"},
    "folder": {"type": Path, "metavar": "FOLDER", "help": "with a results.csv in it"},
    "files": {"nargs": "+", "type": Path, "metavar": "CSV", "help": "older ones, then new"},
    "--device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "default: auto"},
    "--imdb": {"metavar": "PATH", "help": "Keras' imdb.npz; also FUSEDRNN_IMDB"},
    "--download": {"action": "store_true", "help": "fetch imdb.npz (17 MB) if there is none"},
    "--out": {"type": Path, "metavar": "DIR", "help": "of the results; default in bench/results"},
    "--seed": {"type": int, "default": 0, "help": "of weights, data and dropout"},
    "--quick": {"action": "store_true", "help": "tiny sizes: tests the program, measures nothing"},
    "--minutes": {"type": float, "default": math.inf, "help": "begin no case after; of gpu, 9"},
    "--resume": {"action": "store_true", "help": "continue the folder of --out"},
    "--only": {"metavar": "NAMES", "help": "only these cases or steps, with commas"},
    "--providers": {"metavar": "NAMES", "help": "these beside torch.nn; default: all"},
    "--cells": {"metavar": "NAMES", "help": "default: lstm,gru,rnn"},
    "--gate-only": {"action": "store_true", "help": "compare results, measure no time"},
    "--dry-run": {"action": "store_true", "help": "print the steps; needs no GPU"},
    "--figure": {"type": Path, "metavar": "FILE", "help": "the picture, .png or .svg"},
    "--write": {"action": "store_true", "help": "put table and figure into docs/"},
    "--plot": {"action": "store_true", "help": "also draw speed.png and losses.png"},
    "--tolerance": {"type": float, "default": 1.1, "help": "factor; default 1.1"},
    "--gpu": {"metavar": "NAME", "help": "only this model, as torch names it"},
    "--processes": {"type": int, "default": 2, "metavar": "N", "help": "default 2"},
    "--cell": {"choices": ("lstm", "gru", "rnn"), "default": "lstm", "help": "default lstm"},
}
DATA = "--imdb --download --out --seed --quick"
CPU = f"{DATA} --minutes --resume"
RUN = f"--device {CPU}"
CASES = f"names --providers --cells --gate-only {RUN}"
#: Of each command its function, whose module is imported for it alone, its arguments, and help.
COMMANDS = {
    "demo": ("commands.demo", RUN, "results, speed and training; the default"),
    "imdb": ("commands.demo", RUN, "the part of the demo on reviews"),
    "sine": ("commands.demo", RUN, "the part of the demo on a sine and a price"),
    "cpu": ("commands.cpu", f"--only {CPU}", "all workloads on the CPU, in new processes"),
    "host": ("host.run", "", "the host's time from call to launch, and of cells; needs no GPU"),
    "ragged": ("commands.ragged", RUN, "different lengths: padded, packed, with lengths"),
    "cases": ("commands.on_cases", CASES, "all implementations on named cases, or their list"),
    "gpu": ("gpu.run", "--minutes --only --out --dry-run", "on a CUDA machine: gate, times, tests"),
    "ladder": ("ladder.run", f"rung --write {RUN}", "the kernels side by side, or one alone"),
    "lesson": ("lessons.command.run", f"lesson --figure {DATA}", "an experiment of a course"),
    "compare": ("compare.run", "files --tolerance", "what became slower, wrong or larger"),
    "report": ("report.run", "folder --plot", "the table of a results folder"),
    "references": ("references.run", "names --gpu", "times of the cases that others published"),
    "distributed": ("distributed.run", "--processes --cell", "DDP and fully_shard"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a wrong result, 2 for an error of the user, 3 of CUDA."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["demo", *argv]
    try:
        options = _parser(argv[0]).parse_args(argv)
        if not getattr(options, "minutes", 1) > 0:
            raise UserError(f"--minutes must be a number above 0, not {options.minutes:g}")
        if getattr(options, "device", "") == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda needs a GPU, and torch finds none")
        if getattr(options, "device", "") == "auto":
            options.device = "cuda" if torch.cuda.is_available() else "cpu"
        code = options.run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"python -m bench {argv[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `cases | head`; Python would report it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        if "CUDA error" not in str(error):
            raise
        traceback.print_exc()
        return 3


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("argument : invalid choice", "there is no command"))


def _parser(command: str) -> argparse.ArgumentParser:
    """Returns the parser, with the options of one command."""
    parser = Parser(
        prog="python -m bench", usage="%(prog)s [COMMAND] [OPTIONS]", add_help=False,
        description=__doc__.partition(": ")[2], epilog="COMMAND --help lists the options of each.",
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="", dest="command", prog=parser.prog)
    for name, (place, arguments, words) in COMMANDS.items():
        usage = " ".join(["%(prog)s", *re.findall(r"^\w+", arguments.upper()), "[OPTIONS]"])
        sub = commands.add_parser(name, help=words, description=words, usage=usage)
        if name == command:
            for argument in arguments.split():
                sub.add_argument(argument, **ARGUMENTS[argument])
            module, _, function = place.rpartition(".")
            sub.set_defaults(run=getattr(import_module(f".{module}", __package__), function))
    return parser


if __name__ == "__main__":
    sys.exit(main())
