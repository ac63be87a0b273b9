"""The shipped table is of the planner's kernels as compiled, and the page shows it."""

import pytest
from processes import python

from bench import references
from fusedrnn.kernels import predict
from fusedrnn.kernels.expected import PREDICTED, read

FRESH = ("sm_90,lstm,16-bit,32,1,",)
SLOW = ("sm_80,gru,tf32,64,1,", "sm_86,rnn_tanh,16-bit,128,1,", "sm_90,lstm,16-bit,256,1,")
PRINT = "from fusedrnn.kernels.predict import *; print(predict({0!r}))"


def test_the_shipped_steps_are_of_the_planners_kernels():
    """A plan that changes makes lines of the table stale: `make predict` makes them again."""
    _, *lines = PREDICTED.read_text().splitlines()
    assert 100 < len(lines) < 200
    for start, line in zip(predict.grid(), lines, strict=True):
        assert line.startswith(start)
    # Else a step takes longer.
    assert all(line["fw_spills"] == line["bw_spills"] == 0 for line in read(PREDICTED))


@pytest.mark.parametrize("key", [*FRESH, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_a_shipped_step_is_that_of_a_fresh_binary(key):
    (start,) = (start for start in predict.grid() if start.startswith(key))
    done = python("-c", PRINT.format(start))
    assert done.stdout.strip() in PREDICTED.read_text().splitlines(), done.stderr


def test_published_times_of_kernelbench():
    rows = [row for row in references.read(references.PATH) if "H100" in row["gpu"]]
    for number, (*_, said) in predict.KERNELBENCH.items():
        times = [float(r["forward_ms"]) for r in rows if r["case"] == f"kernelbench-{number}"]
        assert said == f"{min(times)} to {max(times)}"


def test_the_page_shows_the_tables():
    page = predict.PAGE.read_text()
    assert [table for table in predict.tables() if table not in page] == []
