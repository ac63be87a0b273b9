"""Files that are worth reading whenever the writer is killed, even in the middle of a line."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_json(path: Path, content: object) -> None:
    """Replaces the file by a whole new one: a reader sees the old or the new text, never a part."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def mend(path: Path) -> None:
    """Cuts off what a killed writer left of its last line, so that the next begins a new one."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that were written to their end; none where there is no file."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1].decode()
    return list(csv.DictReader(io.StringIO(whole, newline="")))


class Table:
    """A CSV file that is only added to. Every row is on disk before ``add`` returns."""

    def __init__(self, path: Path, columns: Sequence[str]):
        """Goes on with the file if there is one: it must have the same columns."""
        self.path = path
        mend(path)
        if not path.exists() or not path.stat().st_size:
            self.add(columns)

    def add(self, cells: Iterable[object]) -> None:
        line = io.StringIO(newline="")
        # A line break in a cell would let a part of a row look like a whole one.
        csv.writer(line).writerow(" ".join(str(cell).split()) for cell in cells)
        with open(self.path, "ab") as file:
            file.write(line.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
