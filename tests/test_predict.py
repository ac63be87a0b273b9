"""The shipped table is of the planner's kernels as compiled, and the page shows it."""

import pytest
from processes import ROOT, python

from bench import references
from fusedrnn.kernels import predict
from fusedrnn.kernels.expected import PREDICTED

FRESH = [("sm_90", "lstm", "16-bit", 32, 1)]
SLOW = [("sm_80", "gru", "tf32", 64, 1), ("sm_86", "rnn_tanh", "16-bit", 128, 1),
        ("sm_90", "lstm", "16-bit", 256, 1)]  # fmt: skip
PRINT = "from fusedrnn.kernels.predict import *; print(text(predict({0}, grid()[{0}])))"


def test_the_shipped_steps_are_of_the_planners_kernels():
    """A plan that changes makes lines of the table stale: `make predict` makes them again."""
    plans, lines = predict.grid(), predict.shipped()
    assert 100 < len(plans) < 200
    assert lines.keys() == plans.keys()
    for key, plan in plans.items():
        assert predict.planned(key, plan).items() <= lines[key].items()
        assert lines[key]["fw_spills"] == lines[key]["bw_spills"] == 0  # else it takes longer


@pytest.mark.parametrize("key", FRESH + [pytest.param(k, marks=pytest.mark.slow) for k in SLOW])
def test_a_shipped_step_is_that_of_a_fresh_binary(key):
    done = python("-c", PRINT.format(key))
    assert done.stdout.strip() in PREDICTED.read_text().splitlines(), done.stderr


def test_published_times_of_kernelbench():
    rows = [row for row in references.read(references.PATH) if "H100" in row["gpu"]]
    for number, (*_, said) in predict.KERNELBENCH.items():
        times = [float(r["forward_ms"]) for r in rows if r["case"] == f"kernelbench-{number}"]
        assert said == f"{min(times)} to {max(times)}"


def test_the_page_shows_the_tables():
    page = (ROOT / "docs" / "predicted.md").read_text().splitlines()
    assert [line for line in predict.tables() if line not in page] == []
