"""The aims of a sweep on a GPU, on made-up rows."""

import csv

import pytest

from bench.acceptance import AIMS, AUTO, KERNELS, POINTS, judge, table
from bench.cases import sweep
from bench.results import Results, Row

WORKLOADS = {(w.dtype, w.H, w.B): w for w in sweep()}


def rows(folder, change=lambda row: None, points=POINTS):
    """A results.csv as the benchmark writes it: four times as fast, 1.2 times the floor."""
    made = Results(folder, {})
    for point in points:
        for provider in (AUTO, KERNELS, "torch.nn"):
            row = Row.of(WORKLOADS[point[1:]], point.cell, provider, backend="", gate="ok")
            row.fw_speedup, row.fwbw_speedup = (4.0, 5.0) if provider == AUTO else (0.1, 0.1)
            row.fw_ms, row.fwbw_ms, row.fw_floor_ms, row.fwbw_floor_ms = 1.2, 2.6, 1.0, 2.0
            change(row)
            made.add([row])
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def words(found):
    return [verdict.word for verdict in found]


def test_every_point_is_one_of_the_sweep():
    assert len(POINTS) == 2 * 3 * 7 * 4
    assert {point[1:] for point in POINTS} <= set(WORKLOADS)


def test_what_is_fast_enough(tmp_path):
    found = judge(rows(tmp_path))
    assert words(found) == ["held"] * 2 * len(AIMS)
    assert [v.figure for v in found] == pytest.approx([4, 5] * 3 + [1.2, 1.3])
    assert [v.points for v in found] == [56, 56, 84, 84, 168, 168, 42, 42]


@pytest.mark.parametrize(
    ("name", "where", "value", "missed"),
    [
        ("fw_speedup", lambda r: r.dtype == "bfloat16" and r.provider == AUTO, 2.9, [0]),
        ("fwbw_speedup", lambda r: r.cell == "gru" and r.provider == AUTO, 2.9, [3]),
        ("fw_speedup", lambda r: (r.H, r.B, r.cell, r.dtype, r.provider)
            == (192, 1, "lstm", "float16", AUTO), 0.99, [4]),
        ("fwbw_ms", lambda r: (r.H, r.B, r.provider) == (2048, 16, KERNELS), 3.01, [7]),
        ("fwbw_ms", lambda r: r.B != 16, 99.0, []),
        ("fw_speedup", lambda r: r.provider != AUTO, 0.01, []),
    ],
)  # fmt: skip
def test_what_is_not(name, where, value, missed, tmp_path):
    found = judge(rows(tmp_path, lambda row: where(row) and setattr(row, name, value)))
    assert [i for i, word in enumerate(words(found)) if word == "missed"] == missed
    assert {word for i, word in enumerate(words(found)) if i not in missed} == {"held"}


def test_what_is_red_or_missing_holds_no_aim(tmp_path):
    def change(row):
        if (row.cell, row.H, row.B) == ("gru", 512, 16):
            row.gate = "red"

    found = judge(rows(tmp_path / "red", change))
    assert words(found) == ["incomplete"] * 8
    assert [v.points - v.measured for v in found] == [1, 1, 3, 3, 3, 3, 3, 3]
    assert words(judge([])) == ["not measured"] * 8
    some = judge(rows(tmp_path / "cut", points=POINTS[:5]))
    assert words(some)[2:4] == ["not measured"] * 2  # GRU comes later


def test_other_shapes_do_not_count(tmp_path):
    found = rows(tmp_path)
    for name, other in (
        ("T", "64"), ("layers", "2"), ("directions", "2"), ("layout", "packed"), ("lesson", "toy")
    ):  # fmt: skip
        assert words(judge([row | {name: other} for row in found])) == ["not measured"] * 8
    slower = [row | {"fw_speedup": "0.5"} for row in found]
    assert words(judge(slower + found)) == ["held"] * 8  # the last of each point


def test_the_table(tmp_path):
    rows(tmp_path)
    lines = table(tmp_path).splitlines()
    assert len(lines) == 2 + 8
    assert lines[2] == "| geometric mean, bf16, forward | >= 3.0 | 4.00 | 56 of 56 | held |"
    assert lines[-1].endswith("floor, B = 16, with backward | <= 1.5 | 1.30 | 42 of 42 | held |")
