"""The table of measurements: it decides for exactly what was measured, within every limit."""

import csv

import pytest
import torch
from compiling import every_plan, measured_problems

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.kernels import measured
from fusedrnn.kernels.measured import COLUMNS, Cut, Measured, cells_of, read, shape_of
from fusedrnn.kernels.plan import (
    CHIPS,
    Problem,
    candidates,
    chip_of,
    modelled,
    plan,
    plan_stack,
)

CHIP = CHIPS["sm_90"]
SOURCE = Measured(512, 1.25, 1.5, 7.0, "a GPU", "2026-01-02")
SMALL = Problem("lstm", 64, 64, 16, 1, torch.bfloat16, "tf32", True)
LARGE = SMALL._replace(input_size=256, hidden_size=256)


def forget():
    for cached in (measured.table, plan, plan_stack, modelled):
        cached.cache_clear()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Installs a table with these choices for these problems on a chip."""
    path = tmp_path / "measured.csv"

    def install(*lines, chip=CHIP, source=SOURCE):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for problem, cut in lines:
                writer.writerow(cells_of(shape_of(problem, chip), cut, source))
        monkeypatch.setattr(measured, "PATH", path)
        forget()

    yield install
    monkeypatch.undo()
    forget()


def other_than_the_model(problem, chip=CHIP):
    best = modelled(problem, chip)
    return next(c for c in candidates(problem, chip) if c.cut != best.cut)


def test_what_is_installed_is_a_table_and_its_lines_are_of_candidates():
    installed = read(measured.PATH)
    for chip in CHIPS.values():
        for problem in measured_problems(chip):
            cut, source = installed[shape_of(problem, chip)]
            assert cut in {candidate.cut for candidate in candidates(problem, chip)}
            assert 0 < source.us <= source.model_us


def test_what_was_measured_is_compiled(table):
    want = other_than_the_model(SMALL)
    table((SMALL, want.cut))
    assert list(measured_problems(CHIP)) == [SMALL]
    assert list(measured_problems(CHIPS["sm_80"])) == []
    assert want.cut in {chosen.cut for _, chosen in every_plan(CHIP)}


@pytest.mark.parametrize("problem", [SMALL, LARGE, SMALL._replace(needs_grad=False)])
def test_a_measured_problem_gets_what_was_measured(problem, table):
    want = other_than_the_model(problem)
    table((problem, want.cut))
    got = plan(problem, CHIP)
    assert got.cut == want.cut
    assert got.measured == SOURCE
    assert plan_stack(problem, CHIP) == (got,)
    assert "1.25 us a step (torch.nn 7.00), measured at T = 512 on a GPU" in got.describe()
    assert "(modelled, not measured)" not in got.describe()
    # Floors belong to the tiles that run, not to those the model would have taken.
    assert got.floors == want.floors


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 17},
        {"hidden_size": 80},
        {"input_size": 65},
        {"cell": "gru"},
        {"dtype": torch.float16},
        {"directions": 2},
        {"needs_grad": False},
        {"ragged": True},
        {"members": 2},
        {"layer_by_layer": True},
    ],
    ids=str,
)
def test_any_other_problem_gets_the_model(change, table):
    table((SMALL, other_than_the_model(SMALL).cut))
    other = SMALL._replace(**change)
    assert plan(other, CHIP).measured is None
    assert plan(other, CHIP) == modelled(other, CHIP)


def test_precision_is_of_fp32_alone(table):
    wide = SMALL._replace(dtype=torch.float32)
    table(*((p, other_than_the_model(p).cut) for p in (SMALL, wide)))
    assert plan(SMALL._replace(precision="ieee"), CHIP).measured
    assert plan(wide, CHIP).measured
    assert plan(wide._replace(precision="ieee"), CHIP).measured is None


def test_a_family_is_an_architecture_with_its_sms(table):
    table((SMALL, other_than_the_model(SMALL).cut))
    assert plan(SMALL, CHIP._replace(name="NVIDIA H200")).measured
    assert plan(SMALL, CHIP._replace(sms=114)).measured is None
    assert plan(SMALL, CHIPS["sm_100"]).measured is None


def test_the_table_overrules_no_limit(table):
    """Where programs may not wait for each other, a measured wait is not run."""
    wait = plan(LARGE, CHIP)
    assert wait.schedule == "cooperative"
    table((LARGE, wait.cut))
    assert plan(LARGE, CHIP).measured
    for chip in (CHIP._replace(cooperates=False), chip_of(torch.device("cpu"))):
        got = plan(LARGE, chip)
        assert (got.schedule, got.measured) == ("stepwise", None)
    table((LARGE, wait.cut._replace(forward_units=12)))
    assert plan(LARGE, CHIP).measured is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_candidates_keep_the_limits_and_have_names_of_their_own(chip):
    for problem, _ in list(every_plan(chip))[::9]:
        if problem.layers > 1 or problem.members > 1:
            continue
        found = list(candidates(problem, chip))
        cuts = [candidate.cut for candidate in found]
        assert modelled(problem, chip).cut == cuts[0]
        assert len(set(cuts)) == len(cuts)
        for candidate in found:
            assert candidate.measured is None
            assert len(candidate.floors) == 1 + problem.needs_grad
            for tiles in (candidate.forward, candidate.backward):
                assert tiles is None or tiles.shared_bytes <= chip.shared_bytes


def test_candidates_differ_in_what_can_be_chosen():
    assert {(c.cut.forward_rows, c.cut.forward_warps, c.cut.projects)
            for c in candidates(SMALL, CHIP) if c.schedule == "resident"} == {
        (8, warps, projects) for warps in (4, 8) for projects in (True, False)
    }  # fmt: skip
    together = [c.cut for c in candidates(LARGE, CHIP) if c.schedule == "cooperative"]
    assert len({(c.forward_rows, c.forward_units) for c in together}) > 3
    assert len({(c.backward_rows, c.backward_units) for c in together}) > 3
    steps = [c.graph_steps for c in candidates(LARGE, CHIP) if c.schedule == "stepwise"]
    assert sorted(steps) == [0, 32]


def test_explain_shows_it_and_auto_follows_it(table, monkeypatch):
    """A backend is chosen by the measurement, where there is one for every launch."""
    monkeypatch.setattr(dispatch, "chip_of", lambda device: CHIP)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rnn, x = fusedrnn.LSTM(64, 64, dtype=torch.float16), torch.randn(3, 16, 64).half()
    problem = SMALL._replace(dtype=torch.float16)
    cut = other_than_the_model(problem).cut
    request = rnn._prepare(x).request._replace(device=torch.device("cuda"))
    for us, reason in ((1.25, None), (9.0, "a step took 9.00 us and torch.nn's 7.00 us, as meas")):
        table((problem, cut), source=SOURCE._replace(us=us))
        with fusedrnn.use_backend("triton"):
            told = str(fusedrnn.explain(rnn, x))
        assert f"{us:.2f} us a step (torch.nn 7.00), measured at T = 512 on a GPU" in told
        monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
        refusal = dispatch._triton_refusal(request, "auto")
        monkeypatch.setattr(dispatch, "_interpreting", lambda: True)
        assert refusal is None if reason is None else refusal.startswith(reason)


def test_lines_survive_being_written_and_read(tmp_path):
    cut = Cut("resident", 8, 64, 4, 0, 0, 0, True, 0)
    source = SOURCE._replace(us=1.0, torch_us=0.5)
    shape = shape_of(SMALL._replace(needs_grad=False), CHIP)
    path = tmp_path / "table.csv"
    head = ",".join(COLUMNS)
    path.write_text(f"{head}\n{','.join(cells_of(shape, cut, source))}\n")
    assert read(path) == {shape: (cut, source)}
    for broken in ("", "a,b\n", f"{head}\nsm_90-132,lstm,64\n", f"{head}\n{'x,' * 23}x\n"):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"the first line must be|:2 is no measurement"):
            read(path)
