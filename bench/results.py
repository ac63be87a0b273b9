"""What was measured; the CSV files here are the single source of tables and plots."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .cases import Workload


class FolderError(ValueError):
    """The folder for the results cannot be written; the message is one sentence."""


@dataclass(kw_only=True)
class Row:
    """One workload, cell and provider: a line of results.csv. None is an empty field.

    ``gate`` is ``"yardstick"``, ``"ok"``, ``"red"``, ``"refused"`` or ``"failed"``; only the first
    two have times. ``share`` is the largest error as a part of the allowed one. ``plan`` names the
    schedules of our kernels, and ``*_floor_ms`` is what they take at least: modelled, not measured.
    ``error`` is the largest of output and final states against fp64; ``*_device_ms`` replays a CUDA
    graph; ``kept_mb`` is what autograd keeps for backward. ``precision`` is how fp32 is multiplied.
    """

    workload: str
    lesson: str
    cell: str
    provider: str
    backend: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    layers: int
    directions: int
    gate: str
    share: float | None = None
    fw_ms: float | None = None
    fw_ms_p20: float | None = None
    fw_ms_p80: float | None = None
    fw_speedup: float | None = None
    fwbw_ms: float | None = None
    fwbw_ms_p20: float | None = None
    fwbw_ms_p80: float | None = None
    fwbw_speedup: float | None = None
    peak_mb: float | None = None
    steps: int | None = None
    final_loss: float | None = None
    loss_difference: float | None = None
    metric: str = ""
    test: float | None = None
    train_s: float | None = None
    plan: str = ""
    fw_floor_ms: float | None = None
    fwbw_floor_ms: float | None = None
    note: str = ""
    layout: str = "padded"
    error: float | None = None
    rounds: int | None = None
    fw_device_ms: float | None = None
    fw_device_speedup: float | None = None
    fwbw_device_ms: float | None = None
    fwbw_device_speedup: float | None = None
    kept_mb: float | None = None
    fw_device_ms_p20: float | None = None
    fw_device_ms_p80: float | None = None
    fwbw_device_ms_p20: float | None = None
    fwbw_device_ms_p80: float | None = None
    precision: str = ""

    @property
    def has_numbers(self) -> bool:
        return self.gate in ("yardstick", "ok")

    @classmethod
    def of(cls, workload: Workload, cell: str, provider: str, **values) -> Row:
        return cls(
            workload=workload.name,
            lesson=workload.lesson,
            cell=cell,
            provider=provider,
            dtype=workload.dtype,
            T=workload.T,
            B=workload.B,
            I=workload.I,
            H=workload.H,
            layers=workload.layers,
            directions=2 if workload.bidirectional else 1,
            layout="packed" if workload.ragged else "padded",
            **values,
        )


@dataclass(frozen=True)
class Loss:
    """One point of a loss curve: a line of losses.csv."""

    workload: str
    cell: str
    provider: str
    step: int
    loss: float


#: What is written, and where.
FILES: dict[type[Row] | type[Loss], str] = {Row: "results.csv", Loss: "losses.csv"}


def begin(folder: Path, environment: dict[str, object]) -> None:
    """Makes the folder and writes environment.json into it.

    Raises:
        FolderError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise FolderError(f"no results can be written to {folder}: {error.strerror}") from error


def other_columns(folder: Path) -> Path | None:
    """The file of a folder that has other columns than are written now, if one has."""
    for kind, name in FILES.items():
        path = folder / name
        head, whole, _ = path.read_text().partition("\n") if path.exists() else ("", "", "")
        if whole and head.split(",") != [f.name for f in fields(kind)]:
            return path
    return None


class Results:
    """The folder of results. Every line is on disk before the next is measured."""

    def __init__(self, folder: Path, environment: dict[str, object]):
        """Begins a folder anew.

        Raises:
            FolderError: it cannot be written.
        """
        self.folder = folder
        begin(folder, environment)
        try:
            for kind, name in FILES.items():
                with open(folder / name, "w", newline="") as file:
                    csv.writer(file).writerow(f.name for f in fields(kind))
        except OSError as error:
            raise FolderError(f"no results can be written to {folder}: {error.strerror}") from error

    def note(self, environment: dict[str, object]) -> None:
        """Writes environment.json anew."""
        begin(self.folder, environment)

    def add(self, rows: Iterable[Row], losses: Iterable[Loss] = ()) -> None:
        for name, lines in (("results.csv", rows), ("losses.csv", losses)):
            with open(self.folder / name, "a", newline="") as file:
                csv.writer(file).writerows(map(_cells, lines))
                file.flush()
                os.fsync(file.fileno())


def _cells(line: Row | Loss) -> list[object]:
    shown = (f"{v:.6g}" if isinstance(v, float) else v for v in asdict(line).values())
    return ["" if value is None else value for value in shown]
