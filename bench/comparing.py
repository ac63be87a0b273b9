"""``python -m bench compare OLD.csv ... NEW.csv``: what became slower, wrong or larger.

Times of two runs cannot be compared: the machine was another one, or in another mood. Ratios to
torch.nn within each run can. Of a ratio the spread within its run is taken as wide as its two times
allow, from torch.nn's p20 over the provider's p80 to torch.nn's p80 over the provider's p20. From
run to run it moves farther than that: several OLD files show by how much, and one cannot.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .providers import TORCH

#: What a gate says of who has times, and of who is wrong or breaks.
PASSED, BROKEN = ("yardstick", "ok"), ("red", "failed")

#: What makes two rows the same case, in results.csv and in cpu.csv.
KEYS = ("workload", "cell", "provider", "dtype", "T", "B", "I", "H", "layers", "directions")
CPU_KEYS = ("case", "cell", "what")
TIMES = ("fw_ms", "fw_ms_p20", "fw_ms_p80", "fwbw_ms", "fwbw_ms_p20", "fwbw_ms_p80")
CPU_TIMES = tuple(
    f"{who}_ms{tail}" for who in ("torch", "fusedrnn") for tail in ("", "_p20", "_p80")
)
SIZES = ("kept_mb", "peak_mb")
#: Of one OLD file nobody knows how far its ratios move from run to run. Two runs of one code on one
#: machine (bench/results/cpu-2026-11-28) are up to 2.7 times apart: only what is farther is called
#: slower or faster then.
ONE_OLD = 3.0
#: Sizes are counted, and not timed; a smaller part more is nobody's business.
LARGER = 1.01
#: The keys of environment.json that say more in other words.
WORDS = {
    "data": "data", "fusedrnn": "version of fusedrnn", "torch": "version of torch",
    "triton": "version of Triton", "cuda": "version of CUDA", "cudnn": "version of cuDNN",
    "python": "version of Python", "threads": "CPU threads", "cores": "CPU cores",
    "fp32": "products of fp32 in RNNs", "matmul_fp32": "products of fp32 in matmuls",
    "peers": "version of", "absent": "absent", "options": "option",
}  # fmt: skip
#: Those with which the ratios move though the code stays.
CAUSES = ("device", "torch", "triton", "cuda", "cudnn", "threads", "cores", "fp32", "matmul_fp32")
Key = tuple[str, ...]


class CompareError(ValueError):
    """A file cannot be compared; the message is one sentence."""


class Ratio(NamedTuple):
    """torch.nn's time / the provider's: the middle, and the spread."""

    x: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.x:.2f} ({self.low:.2f}-{self.high:.2f})"


class Case(NamedTuple):
    """A row: its name in words, what the gate said, and what was measured, by what it is."""

    name: str
    gate: str
    backend: str
    ratios: dict[str, Ratio]
    sizes: dict[str, float]
    precision: str = ""  # of fp32, where the file says so


class File(NamedTuple):
    """A results.csv or a cpu.csv; of rows for one case the last counts."""

    path: Path
    kind: str
    cases: dict[Key, Case]

    @property
    def ratios(self) -> dict[Key, Ratio]:
        """By case and, last, what was timed: ``fw``, ``fwbw``, or of the device."""
        return {
            (*key, mode): ratio
            for key, case in self.cases.items()
            for mode, ratio in case.ratios.items()
        }


def read(path: Path) -> File:
    """A results.csv, of ``--cases`` and the lessons, or a cpu.csv, of ``python -m bench cpu``.

    Raises:
        CompareError: the file cannot be read, lacks a column, or has a time that is none.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CompareError(f"{path} cannot be read: {error}") from error
    is_cpu = "case" in columns and "workload" not in columns
    kind = "cpu.csv" if is_cpu else "results.csv"
    needed = (*CPU_KEYS, "backend", "gate", *CPU_TIMES) if is_cpu else (*KEYS, "gate", *TIMES)
    if missing := [name for name in needed if name not in columns]:
        raise CompareError(f"{path} is no {kind}: it has no column {', '.join(missing)}")
    return File(path, kind, _cpu_cases(path, rows) if is_cpu else _cases(path, rows))


def _cases(path: Path, rows: Sequence[dict[str, str]]) -> dict[Key, Case]:
    by_key = {tuple(row[name] for name in KEYS): row for row in rows}
    found = {}
    for key, row in by_key.items():
        yardstick = by_key.get((*key[:2], TORCH, *key[3:]))
        ratios: dict[str, Ratio] = {}
        if key[2] != TORCH and yardstick is not None:
            for mode in ("fw", "fwbw"):
                ratios |= _ratios_of(path, mode, yardstick, row)
        sizes = {} if key[2] == TORCH else {
            name: _number(path, row, name) for name in SIZES if row.get(name)
        }  # fmt: skip
        workload, cell, provider, dtype, T, B, I, H, layers, directions = key
        shape = f"T{T} B{B} I{I} H{H} layers {layers} directions {directions}"
        name = f"{workload} {cell} {provider} {dtype} {shape}"
        how = row.get("backend") or "", row.get("precision") or ""
        found[key] = Case(name, row["gate"], how[0], ratios, sizes, how[1])
    return found


def _ratios_of(
    path: Path, mode: str, yardstick: dict[str, str], row: dict[str, str]
) -> Iterator[tuple[str, Ratio]]:
    """Of the wall times, and of the device's where both have one.

    Of device times a file may have medians alone: the spread of the wall times stands in.
    """
    if not (row[f"{mode}_ms"] and yardstick[f"{mode}_ms"]):
        return
    wall = _ratio(path, f"{mode}_ms", yardstick, row, row.get(f"{mode}_speedup"))
    yield mode, wall
    name = f"{mode}_device_ms"
    if not (row.get(name) and yardstick.get(name)):
        return
    paired = row.get(f"{mode}_device_speedup")
    if row.get(f"{name}_p20") and yardstick.get(f"{name}_p20"):
        yield f"{mode} on the device", _ratio(path, name, yardstick, row, paired)
        return
    times = (_number(path, line, name) for line in (yardstick, row))
    x = _number(path, row, f"{mode}_device_speedup") if paired else _quotient(path, row, *times)
    spread = Ratio(x, x * wall.low / wall.x, x * wall.high / wall.x)
    yield f"{mode} on the device", spread


def _cpu_cases(path: Path, rows: Sequence[dict[str, str]]) -> dict[Key, Case]:
    found = {}
    for row in rows:
        # Two ways to decode stand side by side; which backend ran is otherwise a finding.
        way = ("stream",) if row["backend"] == "stream" else ()
        key = (*(row[name] for name in CPU_KEYS), *way)
        ratios = {}
        if row["torch_ms"] and row["fusedrnn_ms"]:
            theirs, ours = (
                {f"ms{tail}": row[f"{who}_ms{tail}"] for tail in ("", "_p20", "_p80")}
                | {"workload": row["case"], "cell": row["cell"], "provider": who}
                for who in ("torch", "fusedrnn")
            )
            ratios[""] = _ratio(path, "ms", theirs, ours, row.get("x"))
        found[key] = Case(" ".join(key), row["gate"], row["backend"], ratios, {})
    return found


def _ratio(
    path: Path, name: str, theirs: dict[str, str], ours: dict[str, str], paired: str | None
) -> Ratio:
    """``paired`` is the median of the ratios of each round, if the file has it."""
    first, this = (
        [_number(path, line, f"{name}{tail}") for tail in ("", "_p20", "_p80")]
        for line in (theirs, ours)
    )
    low, high = _quotient(path, ours, first[1], this[2]), _quotient(path, ours, first[2], this[1])
    return Ratio(float(paired) if paired else _quotient(path, ours, first[0], this[0]), low, high)


def _number(path: Path, row: dict[str, str], name: str) -> float:
    try:
        return float(row[name])
    except (TypeError, ValueError) as error:
        raise _no_time(path, row) from error


def _quotient(path: Path, row: dict[str, str], theirs: float, ours: float) -> float:
    if not ours > 0:
        raise _no_time(path, row)
    return theirs / ours


def _no_time(path: Path, row: dict[str, str]) -> CompareError:
    case = f"{row['workload']} {row['cell']} {row['provider']}"
    return CompareError(f"{path} has a time that is none, for {case}")


# Environments


def differences(paths: Sequence[Path]) -> Iterator[str]:
    """What environment.json beside each file says that is not said beside all of them.

    Raises:
        CompareError: one is no JSON.
    """
    folders = list(dict.fromkeys(path.parent for path in paths))
    if len(folders) < len(paths):
        yield "unknown  environment: several files lie beside one environment.json, which is of one"
    environments = {}
    for folder in folders:
        file = folder / "environment.json"
        if not file.exists():
            yield f"unknown  environment: there is no {file}"
            continue
        try:
            environments[folder] = _flat(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise CompareError(f"{file} cannot be read: {error}") from error
    said = list(environments.values())
    differing = [
        key
        for key in dict.fromkeys(key for one in said for key in one)
        if any(one.get(key) != said[0].get(key) for one in said)
    ]
    for key in differing:
        values = (f"{_worded(one.get(key))} in {at}" for at, one in environments.items())
        yield f"differs  {' '.join((WORDS.get(key[0], key[0]), *key[1:]))}: {', '.join(values)}"
    if causes := [WORDS.get(key[0], key[0]) for key in differing if key[0] in CAUSES]:
        yield f"differs  with {', '.join(causes)} the ratios may move, and the code stay as it was"


def _flat(environment: dict[str, object]) -> dict[Key, object]:
    """By key, or by key and name of what is inside."""
    flat: dict[Key, object] = {}
    for key, value in environment.items():
        inner = value if isinstance(value, dict) else None
        flat |= {(key,): value} if inner is None else {(key, str(n)): v for n, v in inner.items()}
    return flat


def _worded(value: object) -> str:
    return "nothing" if value is None else str(value)


# Verdicts


class Verdicts(NamedTuple):
    """The ratios that both have, by what became of them."""

    slower: list[Key]
    faster: list[Key]
    apart: list[Key]  # beyond the spreads, as two runs of one code may be as well
    within: list[Key]


def envelope(found: Sequence[Ratio]) -> Ratio:
    """Several runs as one: the middle one, and the spread of all."""
    middle = sorted(ratio.x for ratio in found)[len(found) // 2]
    return Ratio(middle, min(r.low for r in found), max(r.high for r in found))


def judge(old: dict[Key, Ratio], new: dict[Key, Ratio], runs: int) -> Verdicts:
    """``old`` are envelopes over ``runs`` files."""
    verdicts = Verdicts([], [], [], [])
    for key in old:
        if key not in new:
            continue
        before, after = old[key], new[key]
        beyond = after.high < before.low or after.low > before.high
        change = after.x / before.x
        if not beyond:
            verdicts.within.append(key)
        elif runs == 1 and 1 / ONE_OLD < change < ONE_OLD:
            verdicts.apart.append(key)
        else:
            (verdicts.slower if change < 1 else verdicts.faster).append(key)
    return verdicts


def run(old_paths: Sequence[Path], new_path: Path) -> int:
    """Prints how the environments differ, what changed, and what is in one file only.

    Returns:
        1 if anything became slower or larger, or passed the gate before and does not now; else 0.

    Raises:
        CompareError: a file cannot be compared.
    """
    olds, new = [read(path) for path in old_paths], read(new_path)
    for file in olds:
        if file.kind != new.kind:
            raise CompareError(
                f"{file.path} is a {file.kind} and {new.path} a {new.kind}: they share no case"
            )
    for line in differences([*old_paths, new_path]):
        print(line)
    broken, larger = list(_broken(olds, new)), list(_larger(olds, new))
    for line in (*broken, *larger):
        print(line)
    runs: dict[Key, list[Ratio]] = {}
    for file in olds:
        for key, ratio in file.ratios.items():
            runs.setdefault(key, []).append(ratio)
    before, after = {key: envelope(found) for key, found in runs.items()}, new.ratios
    verdicts = judge(before, after, len(olds))
    for word in ("slower", "faster", "apart"):
        for key in getattr(verdicts, word):
            print(f"{word:<8} {_name(olds, new, key)}: {before[key]} to {after[key]} times as fast "
                  "as torch.nn")  # fmt: skip
    for path, mine, theirs in (
        (" ".join(map(str, old_paths)), before, after), (new_path, after, before)
    ):  # fmt: skip
        for key in mine:
            if key not in theirs:
                print(f"only in {path}   {_name(olds, new, key)}")
    if verdicts.apart:
        print(
            "apart: the spreads within the runs do not meet, which happens between two runs of one "
            "code as well;\na second OLD file tells (docs/benchmarking.md)"
        )
    counts = ", ".join(f"{len(keys)} {word}" for word, keys in verdicts._asdict().items())
    print(f"{sum(map(len, verdicts))} ratios: {counts} spread")
    return 1 if verdicts.slower or broken or larger else 0


def _broken(olds: Sequence[File], new: File) -> Iterator[str]:
    for key, case in new.cases.items():
        before = [file.cases[key].gate for file in olds if key in file.cases]
        passed = [gate for gate in before if gate in PASSED]
        if case.gate in BROKEN and passed:
            yield f"{case.gate:<8} {case.name}: it was {passed[-1]}"


def _larger(olds: Sequence[File], new: File) -> Iterator[str]:
    for key, case in new.cases.items():
        for what, size in case.sizes.items():
            before = [
                found
                for file in olds
                if key in file.cases and (found := file.cases[key].sizes.get(what)) is not None
            ]
            if before and size > LARGER * max(before):
                yield f"larger   {case.name} {what}: {max(before):g} to {size:g} MB"


def _name(olds: Sequence[File], new: File, key: Key) -> str:
    """The case and what was timed; and backends and precisions, if others ran."""
    *case_key, mode = key
    found = [f.cases[tuple(case_key)] for f in (*olds, new) if tuple(case_key) in f.cases]
    name = f"{found[-1].name} {mode}".rstrip()
    for word, values in (
        ("by", [case.backend for case in found]),
        ("in", [case.precision for case in found]),
    ):
        said = list(dict.fromkeys(value for value in values if value))
        name += f" ({word} {', then '.join(said)})" if len(said) > 1 else ""
    return name
