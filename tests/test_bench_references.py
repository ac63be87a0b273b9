"""The published times and the names under which they are found."""

import pytest

from bench import references
from bench.cases import PUBLISHED

ROWS = references.read(references.PATH)


def test_every_row_names_its_source_and_has_the_sizes_of_its_case():
    cases = {case.name: case for case in PUBLISHED}
    assert {row["case"] for row in ROWS} == set(cases)
    for row in ROWS:
        assert all(row[name] for name in ("gpu", "library", "commit", "date", "source")), row
        assert float(row["forward_ms"]) > 0
        case = cases[row["case"]]
        sizes = {name: str(getattr(case, name)) for name in ("T", "B", "I", "H", "layers")}
        assert {name: row[name] for name in sizes} == sizes
        assert row["directions"] == str(1 + case.bidirectional)
        assert case.cells == (row["cell"],)


@pytest.mark.parametrize(
    ("published", "name", "same"),
    [
        ("V100", "Tesla V100-SXM2-16GB", True),
        ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", False),
        ("NVIDIA A10", "NVIDIA A100-SXM4-40GB", False),
        ("NVIDIA L40S", "NVIDIA L4", False),
    ],
)
def test_same_gpu(published, name, same):
    assert references.same_gpu(published, name) is same


def test_lines_give_the_range_on_the_same_gpu_and_nothing_else():
    *lines, note = references.lines(["kernelbench-35"], "NVIDIA H100 80GB HBM3")
    assert len(lines) == 1
    assert "16.9 - 27.2" in lines[0]
    assert "not measured here" in note
    assert list(references.lines(["kernelbench-35"], "NVIDIA H300")) == []
    assert len(list(references.lines(["kernelbench-35"]))) > 10
