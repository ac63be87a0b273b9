"""``python -m fusedrnn study``: its report says what the files beside it hold."""

import json
import re
from functools import cache

import pytest
from processes import python

from fusedrnn.kernels.sass import read_listing, run_tool, trace

# One process makes the reports for all tests.
pytestmark = pytest.mark.xdist_group("study")
CASES = {
    "resident_nvidia": ("--hidden", "64"),
    "resident": ("--hidden", "64", "--schedule", "resident"),
    "cooperative": ("--hidden", "256"),
    "stepwise": ("--hidden", "48", "--dtype", "fp64"),
}


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """By schedule: the report, a dict of its five paragraphs, and the folder."""

    @cache
    def report(schedule):
        folder = tmp_path_factory.mktemp(schedule)
        done = python("-m", "fusedrnn", "study", *CASES[schedule], "--out", folder)
        assert done.returncode == 0, done.stderr
        parts = {part[:1]: part for part in done.stdout.split("\n\n")}
        return parts, folder

    return report


def table(paragraph, name):
    """The numbers of a row."""
    (line,) = re.findall(rf"^   {name} +(\d.*)$", paragraph, re.MULTILINE)
    return [int(n) for n in re.findall(r"\d+", line)]


@pytest.mark.parametrize("schedule", CASES)
def test_the_report_names_plan_and_files(reports, schedule):
    parts, folder = reports(schedule)
    assert f"   {schedule}: forward" in parts["1"]
    assert all(f"why not {other}: " in parts["1"] for other in CASES if other != schedule)
    named = parts["5"].split("\n", 1)[1].split()
    assert sorted(named) == sorted(path.name for path in folder.iterdir())
    kernels = ("forward-0", "backward-2") if schedule == "stepwise" else ("forward", "backward")
    assert {f"{k}.{stage}" for k in kernels for stage in ("cubin", "ptx", "sass")} <= {*named}
    assert ("the host runs it" in parts["4"]) is (schedule == "stepwise")
    assert ("steptime.json" in named) is (schedule != "stepwise")


def test_numbers_are_those_of_the_binary(reports):
    parts, folder = reports("resident_nvidia")
    cubin = (folder / "forward.cubin").read_bytes()
    usage = run_tool(cubin, "cuobjdump", "-res-usage")
    warps, registers, spilled, shared, *_ = table(parts["2"], "forward")
    assert (warps, spilled) == (4, 0)
    assert registers == int(re.search(r"REG:(\d+)", usage)[1])
    assert shared == 2 * 8 * 64 * 2, "two tiles of h in bf16"
    listing = run_tool(cubin, "nvdisasm", "-c", "-hex", "-g")
    names = [one.name for one in trace(read_listing(listing))]
    assert table(parts["3"], "tensor core")[0] == sum(name.startswith("HMMA") for name in names)
    predicted = json.loads((folder / "steptime.json").read_text())
    assert predicted.keys() == {"forward", "backward"}
    assert f"predicted {predicted['forward']['cycles']:.0f} cycles" in parts["4"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_protocol_is_compiled_as_its_proof_has_it(reports, direction):
    """Fences of the SASS; ``compiling.exchange_faults`` reads the order of the PTX."""
    _, folder = reports("cooperative")
    sass = (folder / f"{direction}.sass").read_text()
    adds, polls = sass.count("REDG.E.ADD.STRONG.GPU"), sass.count(" LDG.E.STRONG.GPU")
    assert adds
    assert polls
    assert len(re.findall(r"MEMBAR\.\w+\.GPU(?s:.{1,200}?)REDG\.E\.ADD\.STRONG\.GPU", sass)) == adds
    assert len(re.findall(r" LDG\.E\.STRONG\.GPU[^\n]*\n[^\n]*CCTL\.IVALL", sass)) == polls
