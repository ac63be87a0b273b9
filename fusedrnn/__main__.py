"""Commands of fusedrnn."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import check, dispatch, run, study
from .kernels.plan import CHIPS, SCHEDULES
from .kernels.spec import SPECS


def main(arguments: Sequence[str]) -> None:
    """Runs a command line (without ``python -m fusedrnn``); code 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("run", help="run a patched program", description=run.__doc__)
    one.set_defaults(command=_run, fail=one.error)
    one.add_argument("-m", dest="as_module", action="store_true", help="run a module by name")
    one.add_argument("target", metavar="script.py", help="the program, or with -m its name")
    one.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    one = commands.add_parser("study", help="show a layer's kernels", description=study.__doc__)
    one.set_defaults(command=lambda options: _print(study.run(options)), fail=one.error)
    add = one.add_argument
    add("--cell", choices=list(SPECS), default="lstm")
    add("--hidden", type=positive, required=True, metavar="H", help="units")
    add("--input", type=positive, metavar="I", help="columns; no kernel depends on them")
    add("--batch", type=positive, default=16, metavar="B", help="sequences (16)")
    add("--directions", type=int, choices=(1, 2), default=1)
    add("--bidirectional", dest="directions", action="store_const", const=2)
    add("--layers", type=positive, default=1, metavar="L", help="(1)")
    add("--dtype", choices=list(study.DTYPES), default="bf16", help="(bf16)")
    add("--precision", choices=dispatch.PRECISIONS, default="tf32", help="of fp32 products (tf32)")
    add("--arch", choices=list(CHIPS), default="sm_90", help="(sm_90)")
    add("--schedule", choices=list(SCHEDULES), help="instead of the one the plan chooses")
    add("--out", type=Path, metavar="DIR", help="(study/, and a folder named after the rest)")
    help = "check this machine; code 1 if something is wrong"
    one = commands.add_parser("check", help=help, description=check.__doc__)
    one.set_defaults(command=lambda _: _print(check.run()))
    options = parser.parse_args(arguments)
    options.command(options)


def _run(options: argparse.Namespace) -> None:
    if not options.as_module and not os.access(options.target, os.R_OK):
        options.fail(f"cannot read the file {options.target!r}")
    run.run(options.target, options.arguments, options.as_module)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def _print(report: Iterator[str]) -> None:
    """Prints a report as it grows; ends with code 1 if a text of it begins with ``WRONG``."""
    wrong = 0
    try:
        for text in report:
            wrong += text.startswith("WRONG")
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
    except BrokenPipeError:  # of `study ... | head`
        sys.stderr.close()  # where Python would report it once more
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
