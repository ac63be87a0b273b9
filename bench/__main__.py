"""``python -m bench``: fusedrnn beside torch.nn, from the same weights and on the same inputs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import comparing, cpu, gpu, imdb, modelled, plots, protocol, ragged, text
from .archives import DataError
from .cases import CELLS, WORKLOADS, CaseError, Workload, cut_down, every_sweep, lessons, named
from .comparing import CompareError
from .imdb import Corpus
from .lessons import command
from .progress import Progress
from .protocol import ProviderError
from .providers import names_for
from .report import LEGEND, environment, header, table_head, table_line
from .results import FolderError, Results
from .run import Settings, measure

#: Lessons of their own kind, with a table of their own.
SHORT = ("ragged", "text")
DEFAULT_FOLDER = Path(__file__).parent / "results" / "local"


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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a red gate, 2 for what the user can put right."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] == "lesson":
        return command.main(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.list:
        for workload in (*WORKLOADS, *every_sweep()):
            print(f"{workload.name:<28} {workload.shape} {workload.dtype}")
        return 0
    try:
        if options.lesson == "gpu":
            return _gpu(options)
        _check(options)
        if options.lesson == "plot":
            print(plots.redraw(Path(options.files[0])))
            return 0
        if options.lesson == "compare":
            return comparing.run(*map(Path, options.files))
        if options.lesson == "model":
            modelled.write(options.out or DEFAULT_FOLDER)
            return 0
        if options.lesson == "cpu":
            out = options.out or DEFAULT_FOLDER
            corpus = _corpus(cpu.workloads(options.quick), options)
            return cpu.run(out, corpus, quick=options.quick, seed=options.seed)
        if options.lesson in SHORT:
            return _short(options)
        return run_cases(options) if options.cases else run_lessons(options)
    except USER_ERRORS as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="python -m bench lesson: the experiments of a course, each by its name. All cases "
        "stand in bench/cases.py, what the columns mean in docs/benchmarking.md.",
    )
    parser.set_defaults(prog=parser.prog)
    add = parser.add_argument
    add(
        "lesson",
        nargs="?",
        choices=("all", "imdb", "sine", *SHORT, "cpu", "gpu", "model", "plot", "compare"),
        default="all",
        help="what to run; all: every lesson, imdb and sine: those that are trained; ragged: "
        "sequences of unequal length beside torch.nn's two ways; text: a language model that "
        "learns and speaks, token by token; cpu: speed and memory beside torch.nn on the CPU; gpu: "
        "on a CUDA machine tests, compute-sanitizer, lessons, a sweep and autotuning; model: the "
        "floors of a step by arithmetic; plot: the pictures of a results folder; compare: what "
        "became slower, wrong or broke from one results.csv to another (default: all)",
    )
    add("files", nargs="*", help="of plot: FOLDER; of compare: OLD.csv NEW.csv")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--imdb", metavar="PATH", help="imdb.npz or aclImdb_v1.tar.gz; also FUSEDRNN_IMDB")
    add("--download", action="store_true", help="fetch imdb.npz (17 MB) if it is not at hand")
    add("--out", type=Path, metavar="DIR", help="where CSV and PNG go")
    add("--seed", type=int, default=0, help="of weights, order of examples and dropout")
    add("--quick", action="store_true", help="tiny sizes: tests the machinery, measures nothing")
    add("--cases", metavar="NAMES", help="every provider on lessons, sweep, smoke or named cases")
    add("--providers", metavar="NAMES", help="of --cases: these beside torch.nn, or all (default)")
    add("--list", action="store_true", help="print the cases")
    add("--minutes", type=float, help="time for gpu (default: 9) and --cases (default: no limit)")
    add("--only", metavar="STAGES", help=f"of gpu, with commas: {', '.join(gpu.NAMES)}")
    add("--dry-run", action="store_true", help="of gpu: say what would be run; needs no GPU")
    add("--keep-failing", action="store_true", help="of gpu: measure what failed its tests too")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.providers and not options.cases:
        raise UsageError("--providers is of --cases, and none are named")
    expected = {"plot": 1, "compare": 2}.get(options.lesson, 0)
    if len(options.files) != expected:
        raise UsageError(f"{options.lesson} takes {expected} paths, and got {len(options.files)}")


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


def _short(options: argparse.Namespace) -> int:
    """What needs no data."""
    out, device = options.out or DEFAULT_FOLDER, pick_device(options.device)
    if options.lesson == "ragged":
        return ragged.run(out, device, quick=options.quick, seed=options.seed)
    return text.run(out, quick=options.quick, seed=options.seed, device=device)


def run_lessons(options: argparse.Namespace) -> int:
    """The lessons: header, table and files."""
    started = time.monotonic()
    device = pick_device(options.device)
    workloads = lessons((options.lesson,), options.quick)
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
    return protocol.run(workloads, providers, settings, folder, corpus, options.minutes)


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


if __name__ == "__main__":
    sys.exit(main())
