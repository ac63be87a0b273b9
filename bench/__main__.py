"""``python -m bench``: fusedrnn beside torch.nn, from the same weights and on the same inputs."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import comparing, cpu, gpu, imdb, modelled, plots, protocol, ragged, text
from .archives import DataError
from .cases import CELLS, WORKLOADS, CaseError, Workload, cut_down, every_sweep, lessons, named
from .comparing import CompareError
from .disk import whole_rows
from .imdb import Corpus
from .lessons import command
from .progress import Progress
from .protocol import ProviderError
from .providers import names_for
from .report import LEGEND, environment, header, table_head, table_line
from .results import FolderError, Results
from .run import Settings, measure

DEFAULT_FOLDER = Path(__file__).parent / "results" / "local"
PROG = "python -m bench"
SMOKE = "all but the sweep in tiny sizes; 80 s on two cores, nearly all of it torch.compile's"


class UsageError(ValueError):
    """Arguments that do not go together; the message is one sentence."""


#: What the user can put right: one sentence, and exit code 2.
USER_ERRORS = (
    CaseError,
    CompareError,
    DataError,
    FolderError,
    plots.PlotError,
    ProviderError,
    UsageError,
    gpu.NoDeviceError,
    gpu.OptionError,
)


#: What several commands take; where none is named they stand before no command.
SHARED: dict[str, dict[str, Any]] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "default: auto"},
    "imdb": {"metavar": "PATH", "help": "imdb.npz or aclImdb_v1.tar.gz; also FUSEDRNN_IMDB"},
    "download": {"action": "store_true", "help": "fetch imdb.npz (17 MB) if it is not at hand"},
    "out": {"type": Path, "metavar": "DIR", "help": "where the results go"},
    "seed": {"type": int, "default": 0, "help": "of weights, order of examples and dropout"},
    "quick": {
        "action": "store_true", "help": "tiny sizes: tests the machinery, measures nothing",
    },
    "minutes": {"type": float, "help": "of gpu (default: 9) and --cases (default: no limit)"},
}  # fmt: skip
#: What goes without a command.
ALONE: dict[str, dict[str, Any]] = {
    "cases": {
        "metavar": "NAMES",
        "help": "every provider on lessons, sweep, smoke or named cases, with commas",
    },
    "providers": {
        "metavar": "NAMES", "help": "of --cases: these beside torch.nn, or all (default)",
    },
    "list": {"action": "store_true", "help": "print the cases"},
}  # fmt: skip
TRAINING = ("device", "imdb", "download", "out", "seed", "quick")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a red gate, 2 for what the user can put right."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `--list | head`: the reader has what it wants
        # What is still in the buffer would raise once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _main(argv: Sequence[str]) -> int:
    prog = PROG
    try:
        options = parse(argv)
        prog = options.prog
        check(options)
        return COMMANDS[options.command].run(options)
    except USER_ERRORS as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with those of other commands at their defaults.

    Raises:
        UsageError: a command was given an option that is not its own.
        SystemExit: the words cannot be understood (code 2), or ask for help.
    """
    options, unknown = _parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        if name == "providers":
            raise UsageError("--providers is of --cases, and none are named")
        if name in ALONE:
            raise UsageError(f"--{name} goes without a command, and {options.command} is one")
        raise UsageError(f"{options.command} takes no {unknown[0]}: {options.prog} --help")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="fusedrnn beside torch.nn, from the same weights and on the same inputs. "
        "Without a command it is all; COMMAND --help lists a command's options.",
        epilog="All cases stand in bench/cases.py, what the columns mean in docs/benchmarking.md.",
    )
    for name, settings in (SHARED | ALONE).items():
        parser.add_argument(f"--{name}", **settings)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, entry in COMMANDS.items():
        of = commands.add_parser(name, help=entry.help, description=entry.help)
        of.set_defaults(prog=of.prog)
        for option in entry.options:
            # What stands before the command holds.
            of.add_argument(f"--{option}", **SHARED[option] | {"default": argparse.SUPPRESS})
        entry.add(of)
    parser.set_defaults(prog=PROG, command="all", files=[])
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FOLDER")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="OLD.csv ... NEW.csv")


def _add_stages(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", metavar="STAGES", help=f"with commas between: {', '.join(gpu.NAMES)}")
    add("--dry-run", action="store_true", help="say what would be run; needs no GPU")
    add("--keep-failing", action="store_true", help="measure what failed its tests too")


def check(options: argparse.Namespace) -> None:
    """What can be wrong with options that are understood.

    Raises:
        UsageError: a sentence.
    """
    if options.command != "all" and (options.cases is not None or options.list):
        name = "cases" if options.cases is not None else "list"
        raise UsageError(f"--{name} goes without a command, and {options.command} is one")
    if options.providers is not None and options.cases is None:
        raise UsageError("--providers is of --cases, and none are named")
    minutes = options.minutes
    if minutes is not None and options.command != "gpu" and options.cases is None:
        raise UsageError("--minutes is of gpu and of --cases")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise UsageError(f"--minutes is a number above 0, and not {minutes:g}")
    count = len(options.files)
    if options.command == "plot" and count != 1:
        raise UsageError(f"it takes 1 folder, and got {count}")
    if options.command == "compare" and count < 2:
        raise UsageError(f"it takes 2 files or more, the new one last, and got {count}")


def _main_job(options: argparse.Namespace) -> int:
    if options.list:
        return _list()
    return run_lessons(options) if options.cases is None else run_cases(options)


def _list() -> int:
    sizes = {"lessons": "what the main job shows", "sweep": "every size; days on a CPU"}
    sizes["smoke"] = SMOKE
    for group, words in sizes.items():
        print(f"{group:<28} {len(named(group))} cases: {words}")
    for workload in (*WORKLOADS, *every_sweep()):
        print(f"{workload.name:<28} {workload.shape} {workload.dtype}")
    return 0


def _cpu(options: argparse.Namespace) -> int:
    out = options.out or DEFAULT_FOLDER
    corpus = _corpus(cpu.workloads(options.quick), options)
    beside = options.beside_thread
    return cpu.run(out, corpus, quick=options.quick, seed=options.seed, beside_thread=beside)


def _add_beside_thread(parser: argparse.ArgumentParser) -> None:
    words = "another thread of each timing process has computed before, as a server's or a loader's"
    parser.add_argument("--beside-thread", action="store_true", help=words)


def _model(options: argparse.Namespace) -> int:
    modelled.write(options.out or DEFAULT_FOLDER)
    return 0


def _plot(options: argparse.Namespace) -> int:
    print(plots.redraw(Path(options.files[0])))
    return 0


def _compare(options: argparse.Namespace) -> int:
    *old, new = map(Path, options.files)
    return comparing.run(old, new)


def _gpu(options: argparse.Namespace) -> int:
    wanted = gpu.Options(
        9 if options.minutes is None else options.minutes,
        gpu.parse_only(options.only),
        options.quick,
        options.seed,
        options.keep_failing,
    )
    if options.dry_run:
        print(gpu.describe(wanted))
        return 0
    return gpu.run(wanted, options.out)


def _ragged(options: argparse.Namespace) -> int:
    out, device = options.out or DEFAULT_FOLDER, pick_device(options.device)
    return ragged.run(out, device, quick=options.quick, seed=options.seed)


def _text(options: argparse.Namespace) -> int:
    out, device = options.out or DEFAULT_FOLDER, pick_device(options.device)
    return text.run(out, quick=options.quick, seed=options.seed, device=device)


def run_lessons(options: argparse.Namespace) -> int:
    """The lessons: header, table and files."""
    started = time.monotonic()
    device = pick_device(options.device)
    workloads = lessons((options.command,), options.quick)
    corpus = _corpus(workloads, options)
    settings = Settings(device, options.seed)
    if options.quick:
        settings = Settings(device, options.seed, seconds=0.0, least_rounds=2)
    env = environment(device, corpus.source if corpus else "sine and price series, computed")
    results = Results(options.out or DEFAULT_FOLDER, env)
    cut = "\nquick    tiny sizes: none of these numbers means anything" if options.quick else ""
    print(f"{header(env)}{cut}\n\n{table_head()}", flush=True)

    progress = Progress(_steps(workloads, device))
    complaints = []
    for workload in workloads:
        for cell in CELLS:
            measured = measure(workload, cell, settings, corpus, progress)
            results.add(measured.rows, measured.losses)
            complaints += measured.complaints
            for row in measured.rows:
                progress.say(table_line(row))
    progress.close()
    print(f"\n{LEGEND}")
    for workload in workloads:
        steps = workload.steps_on(device)
        trained = f"{steps} training steps" if steps else "not trained"
        print(f"{workload.name}: {workload.shape}, {trained}")
    print(f"\n{time.monotonic() - started:.0f} s; {plots.draw(results.folder)}")
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if complaints else 0


def run_cases(options: argparse.Namespace) -> int:
    """Every provider on the named cases; see ``bench/protocol.py``."""
    workloads = named(options.cases)
    device = pick_device(options.device)
    providers = protocol.chosen(options.providers, device)
    settings = Settings(device, options.seed)
    if options.quick or options.cases == "smoke":
        workloads = tuple(map(cut_down, workloads))
        settings = Settings(device, options.seed, seconds=0.0, least_rounds=2)
        print("quick    tiny sizes: none of these numbers means anything")
    corpus, folder = _corpus(workloads, options), options.out or DEFAULT_FOLDER
    code = protocol.run(workloads, providers, settings, folder, corpus, options.minutes)
    if not whole_rows(folder / "results.csv"):
        print(f"{PROG}: nothing was measured: --minutes ended before a case did", file=sys.stderr)
    return code


def pick_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        gpu.NoDeviceError: CUDA was named and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise gpu.NoDeviceError("--device cuda needs a GPU, and torch sees none")
    has_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if has_gpu else "cpu")


def _corpus(workloads: Sequence[Workload], options: argparse.Namespace) -> Corpus | None:
    if not any(w.vocabulary for w in workloads):
        return None
    # Twice what is used: the reviews of a split are drawn from more, as from the real file.
    needed = 2 * max(max(w.train, w.test) for w in workloads)
    return imdb.load(
        options.imdb, download=options.download, seed=options.seed, reviews=min(needed, 25_000)
    )


def _steps(workloads: Sequence[Workload], device: torch.device) -> int:
    """Training steps of the whole run, which is what the progress bar counts."""
    return sum(
        len(CELLS)
        * w.steps_on(device)
        * sum(w.train_reference or name != "fusedrnn torch" for name in names_for(w, device))
        for w in workloads
    )


class Command(NamedTuple):
    """What stands behind ``python -m bench``: a line of help, the options, and what it runs."""

    help: str
    options: tuple[str, ...]  # of SHARED
    run: Callable[[argparse.Namespace], int]
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None  # of its own options


COMMANDS = {
    "all": Command("the main job: gate, speed and training on every workload", TRAINING, _main_job),
    "imdb": Command("of it the reviews", TRAINING, run_lessons),
    "sine": Command("of it the series: sines and a price", TRAINING, run_lessons),
    "lesson": Command(
        "an experiment of a course, by its name; without one they are listed",
        ("imdb", "download", "out", "seed", "quick"), command.execute, command.add_arguments,
    ),
    "ragged": Command(
        "sequences of unequal length beside torch.nn's two ways",
        ("device", "out", "seed", "quick"), _ragged,
    ),
    "text": Command(
        "a language model that learns and speaks, token by token",
        ("device", "out", "seed", "quick"), _text,
    ),
    "cpu": Command(
        "speed and memory beside torch.nn on the CPU",
        ("imdb", "download", "out", "seed", "quick"), _cpu, _add_beside_thread,
    ),
    "gpu": Command(
        "on a CUDA machine: tests, compute-sanitizer, lessons, sweep, autotuning",
        ("out", "seed", "quick", "minutes"), _gpu, _add_stages,
    ),
    "model": Command("the floors of a step by arithmetic", ("out",), _model),
    "plot": Command("the pictures of a results folder", (), _plot, _add_folder),
    "compare": Command(
        "what became slower, wrong or larger from older CSV files to a new one",
        (), _compare, _add_files,
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
