"""The results on disk, which are the only source of tables and plots, and what is made of them."""

import argparse
import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import fusedrnn

from . import UserError
from .providers import PROVIDERS, TORCH, rnn_fp32

#: Of results.csv: one line for each case, cell, pass and provider.
COLUMNS = (
    "case", "cell", "pass", "provider", "backend", "dtype", "precision", "layout",
    "T", "B", "I", "H", "layers", "directions", "gate", "share", "error",
    "ms", "p20", "p80", "x", "x_low", "x_high", "rounds", "device_ms",
    "kept_mb", "peak_mb", "plan", "note",
)  # fmt: skip
LOSSES = ("case", "cell", "provider", "step", "loss")
#: The columns of the two tables that runs print, and their widths.
MAIN = {"case": 19, "backend": 7, "error": 5, "forward": 16, "training": 16, "loss": 18}
CASES = {"case": 27, "provider": 20, "error": 9, "forward": 16, "training": 16}
LEGEND = """
Beside torch.nn, from the same weights. error: the largest one against fp64, as a part of what is
allowed, or why there is none (results.csv has a note). forward, training: how many times as fast as
torch.nn, and milliseconds. loss: after the same training, and torch.nn's."""


def environment(device: torch.device, data: str) -> dict[str, Any]:
    """Returns what a reader needs to judge or repeat the numbers."""
    cuda, cpu = device.type == "cuda", Path("/proc/cpuinfo")
    checkout = shlex.quote(str(Path(fusedrnn.__file__).parent))  # if it is one, and git is there
    failed, commit = subprocess.getstatusoutput(f"git -C {checkout} describe --always --dirty")
    model = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    name = f"CPU, {model[1] if model else platform.processor()}"
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else name,
        "data": data,
        "fusedrnn": fusedrnn.__version__,
        "torch": torch.__version__,
        "triton": installed.get("triton"),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "fp32": rnn_fp32() if cuda else "ieee",
        "peers": {p.package: installed.get(p.package) for p in PROVIDERS.values() if p.package},
        "commit": None if failed else commit,
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def head(env: dict[str, Any], trains: bool, quick: bool) -> str:
    """Returns the lines above the rows of a table."""
    software = [f"{n} {env[n]}" for n in ("fusedrnn", "torch", "triton", "cudnn") if env[n]]
    threads, widths = f"{env['threads']} of {env['cores']} CPU threads", MAIN if trains else CASES
    lines = [f"device   {env['device']}; {threads}; fp32 as {env['fp32']}"]
    lines += [f"versions {', '.join(software)}, commit {env['commit']}", f"data     {env['data']}"]
    lines += ["quick    tiny sizes: the times mean nothing"] * quick
    rule = "|".join("-" * (width + 2) for width in widths.values())
    return "\n".join([*lines, "", _line({name: name for name in widths}, widths), f"|{rule}|"])


def _line(cells: dict[str, str], widths: dict[str, int]) -> str:
    return f"| {' | '.join(cells[name].ljust(width) for name, width in widths.items())} |"


def lines(rows: dict, trainings: dict) -> Iterator[str]:
    """Yields the line of each provider of a case; of a case that is trained, fusedrnn's."""
    for provider in dict.fromkeys(provider for provider, _ in rows):
        passes = [row for (name, _), row in rows.items() if name == provider]
        widths = MAIN if trainings else CASES
        if trainings and provider == TORCH:
            continue
        gate = next((row["gate"] for row in passes if row["gate"] != "ok"), "")
        share = max(row.get("share", 0) for row in passes)
        cells = {"case": f"{passes[0]['case']} {passes[0]['cell']}", "provider": provider}
        cells |= {"backend": passes[-1].get("backend", "-"), "error": gate or f"{share:.2f}"}
        for mode in ("forward", "training"):
            row = rows.get((provider, mode), {})
            ms = row.get("ms", 0)
            time = f"{ms:{'.3g' if ms < 999 else '.0f'}} ms" if ms else "-"
            x = row.get("x") or 0
            cells[mode] = f"{x:.{2 if x < 10 else 0}f}x, {time}" if x else time
        losses = [trainings[p].final_loss for p in (provider, TORCH) if p in trainings]
        cells["loss"] = ", ".join(f"{loss:.3g}" for loss in losses)
        yield _line(cells, widths)


class Results:
    """A folder of results; every line is on disk before the next is measured."""

    def __init__(self, folder: Path, env: dict[str, Any], resume: bool = False):
        """Begins a folder, or continues it."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "environment.json").write_text(json.dumps(env, indent=2) + "\n")
            headers = {"results.csv": COLUMNS, "losses.csv": LOSSES, "begun.csv": COLUMNS[:2]}
            for name, columns in headers.items():
                if not (resume and (folder / name).exists()):
                    (folder / name).write_text(",".join(columns) + "\n")
        except OSError as error:
            raise UserError(f"no results can be written to {folder}: {error.strerror}") from error

    def add(self, rows: Iterable[dict[str, Any]], trainings: dict[str, Any] | None = None) -> None:
        """Appends rows, and the losses of a case's trainings by provider."""
        rows = list(rows)
        append(self.folder / "results.csv", COLUMNS, rows)
        for provider, training in (trainings or {}).items():
            keys = {"case": rows[0]["case"], "cell": rows[0]["cell"], "provider": provider}
            losses = [keys | {"step": n, "loss": x} for n, x in enumerate(training.losses)]
            append(self.folder / "losses.csv", LOSSES, losses)

    def done(self) -> set[tuple[str, str]]:
        """Returns the cases of the folder; those that ended a process get a row that says so."""
        have, begun = (
            {(row["case"], row["cell"]) for row in read(self.folder / name)}
            for name in ("results.csv", "begun.csv")
        )
        note = {"gate": "failed", "note": "its process ended"}
        self.add({"case": case, "cell": cell} | note for case, cell in sorted(begun - have))
        return have | begun


def append(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a CSV file and has them on disk before it returns."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(options: argparse.Namespace) -> int:
    """Prints torch.nn's time divided by each provider's, and draws the pictures of ``--plot``."""
    try:
        print(table(options.folder))
        if options.plot:
            print("\n".join(map(str, draw(options.folder))))
    except (ImportError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{options.folder} has no results that can be read: {error}") from error
    return 0


def table(folder: Path) -> str:
    import pandas

    frame = pandas.read_csv(folder / "results.csv")
    env = json.loads((folder / "environment.json").read_text())
    frame = frame[frame.provider != TORCH].dropna(subset=["x"])
    keys = {"index": ["case", "provider"], "columns": ["cell", "pass"], "values": "x"}
    wide = frame.pivot_table(**keys, sort=False).reset_index()
    wide.columns = [" ".join(name).strip() for name in wide.columns]
    caption = f"{env['device']}, {env['threads']} threads, torch {env['torch']}, {env['date']}"
    text = wide.to_markdown(index=False, floatfmt=".2f", missingval="-")
    return f"{text}\n\n{caption}: `{env['command']}`"


def draw(folder: Path) -> list[Path]:
    """Writes speed.png and, where something was trained, losses.png; returns the files."""
    import pandas

    rows = pandas.read_csv(folder / "results.csv").dropna(subset=["ms"])
    drawn = [_panels(rows, ["case", "cell", "pass"], _bars, folder / "speed.png")]
    losses = folder / "losses.csv"
    if losses.exists() and len(curves := pandas.read_csv(losses)):
        drawn.append(_panels(curves, ["case", "cell"], _curves, folder / "losses.png"))
    return drawn


def _bars(group, axis) -> None:
    """Draws the median ms of each provider, and lines from the 20th to the 80th percentile."""
    spread = [(group["ms"] - group["p20"]).clip(0), (group["p80"] - group["ms"]).clip(0)]
    group.plot.barh("provider", "ms", xerr=spread, ax=axis, legend=False, ylabel="")


def _curves(group, axis) -> None:
    """Draws the loss by step. The curves lie on each other, so they are dashed in turn."""
    wide = group.pivot(index="step", columns="provider", values="loss")
    wide.plot(ax=axis, style=["-", "--", ":"] * len(wide.columns), xlabel="").legend(fontsize=6)


def _panels(table, keys: list[str], paint: Callable[..., None], path: Path) -> Path:
    """Writes a picture with a panel for each group of rows, in lines of four."""
    from matplotlib.figure import Figure

    groups = list(table.groupby(keys, sort=False))
    height = -(-len(groups) // 4)
    figure = Figure(figsize=(13, 0.5 + 2.3 * height), layout="constrained")
    axes = figure.subplots(height, 4, squeeze=False).flat
    for (title, group), axis in zip(groups, axes, strict=False):
        paint(group, axis)
        axis.set_title(" ".join(title), fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes:  # those that are left
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    return path
