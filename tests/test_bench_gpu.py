"""The steps of ``python -m bench gpu``: limits, crashes, resuming, and the summary."""

import sys
import time

import pytest

from bench import gpu
from bench.__main__ import main
from bench.gpu import Step, outcomes, run_steps, summary

PYTHON = (sys.executable, "-c")


def test_each_step_gets_its_outcome(tmp_path):
    steps = [
        Step("good", 1, (*PYTHON, "print('fine')")),
        Step("red", 1, (*PYTHON, "import sys; print('1 failed'); sys.exit(1)")),
        Step("crash", 1, (*PYTHON, "import os; os.abort()")),
        Step("absent", 1, ("no-such-program",)),
    ]
    run_steps(steps, tmp_path, 60)
    found = {name: (row["outcome"], row["last_line"]) for name, row in outcomes(tmp_path).items()}
    assert found == {
        "good": ("ok", "fine"),
        "red": ("red", "1 failed"),
        "crash": ("code -6", ""),
        "absent": ("not found", ""),
    }


def test_a_step_is_killed_at_its_limit_with_what_it_started(tmp_path):
    late = tmp_path / "late"
    child = f"import time; time.sleep(2.5); open({str(late)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    run_steps([Step("slow", 1, (*PYTHON, parent))], tmp_path, 1.0)
    assert time.monotonic() - started < 2.4
    assert outcomes(tmp_path)["slow"]["outcome"] == "timed out"
    time.sleep(2.0)
    assert not late.exists()


def test_what_succeeded_is_left_out_and_what_crashed_is_started_again(tmp_path):
    log = tmp_path / "starts"
    count = f"import os, sys; open({str(log)!r}, 'a').write('x')"
    crash = f"{count}; os.path.getsize({str(log)!r}) < 3 and os.abort()"
    for code, restarts in ((crash, True), (f"{count}; sys.exit(1)", False)):
        log.write_text("")
        for _ in range(2):
            run_steps([Step(code[-5:], 1, (*PYTHON, code), restarts)], tmp_path, 60)
        outcome = outcomes(tmp_path)[code[-5:]]["outcome"]
        assert (log.read_text(), outcome) == (("xxx", "ok") if restarts else ("xx", "red"))


def test_a_step_gets_the_folder_and_its_minutes(tmp_path):
    command = (*PYTHON, "import sys; print(sys.argv[1:])", "{out}/a", "{minutes}")
    run_steps([Step("told", 1, command)], tmp_path, 130)
    folder, minutes = eval(outcomes(tmp_path)["told"]["last_line"])
    assert folder == f"{tmp_path}/a"
    assert float(minutes) == pytest.approx(2.0, abs=0.05)  # 10 s less than its limit


def test_the_summary_has_red_gates_and_the_mean_gain(tmp_path):
    (tmp_path / "results.csv").write_text(
        "case,cell,pass,provider,gate,x,note\n"
        "a,lstm,forward,torch.nn,reference,1.0,\n"
        "a,lstm,forward,fusedrnn,ok,2.0,\n"
        "b,lstm,forward,fusedrnn,ok,8.0,\n"
        "c,gru,forward,fusedrnn,red,,2 tensors\n"
    )
    text = summary(tmp_path)
    assert "forward lstm: 4.00 times torch.nn's speed in 2 cases" in text
    assert "gate red: c gru 2 tensors" in text


def test_the_summary_names_red_tests_also_of_a_run_that_was_cut_off(tmp_path):
    printed = "tests/test_a.py::test_b[c] FAILED [ 5%]\\n[gw1] [ 9%] FAILED tests/test_a.py::test_d"
    code = f"import time; print('{printed}', flush=True); time.sleep(60)"
    run_steps([Step("tests", 1, (*PYTHON, code))], tmp_path, 1.5)
    lines = summary(tmp_path).splitlines()
    assert "  red test: tests/test_a.py::test_b[c]" in lines
    assert "  red test: tests/test_a.py::test_d" in lines


def test_dry_run_prints_every_step_and_needs_no_gpu(capsys):
    assert main(["gpu", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(step.name in printed for step in gpu.steps())
    assert sum(step.minutes for step in gpu.steps()) == pytest.approx(9, abs=0.6)


@pytest.mark.parametrize(("name", "code"), [("true", 0), ("no-such-program", 0), ("false", 1)])
def test_the_exit_code(monkeypatch, tmp_path, name, code):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(gpu, "steps", lambda: [Step("one", 1, (name,))])
    assert main(["gpu", "--out", str(tmp_path)]) == code
