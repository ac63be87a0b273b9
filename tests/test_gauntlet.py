"""``python -m bench gpu`` as far as a CPU can tell: whatever ends it, what it had is on disk.

The device is the CPU, where Triton interprets; the stages are the real ones in tiny sizes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench.__main__ as main_module
from bench import correctness, gpu, sanitizer, stages
from bench.correctness import GROUPS, Group
from bench.disk import Table, mend, whole_rows, write_json
from bench.supervise import Signals, Stopped, supervise

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PYTHON = sys.executable
#: A run on a CPU with tests of its own, for a process that can be killed.
RUN = """
import sys, torch
from pathlib import Path
from bench import correctness, gpu, sanitizer
from bench.correctness import Group
folder, tests = Path(sys.argv[1]), sys.argv[2]
correctness.GROUPS = (Group("resident", (tests,), "", 0.5), Group("rest", (tests,), "", 0.5))
sanitizer.find = lambda: None
options = gpu.Options(minutes=float(sys.argv[3]), quick=True, only=gpu.parse_only(sys.argv[4]))
sys.exit(gpu.Run(options, folder, torch.device("cpu")).run())
"""
TESTS = """
import time, pytest
@pytest.mark.gpu
@pytest.mark.parametrize("number", range(20))
def test(number):
    time.sleep(0.05)
"""


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)


@pytest.fixture
def own_tests(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    (folder / "test_own.py").write_text(TESTS)
    return folder / "test_own.py"


def start(folder: Path, tests: Path, minutes: float, only: str) -> subprocess.Popen:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    # What other tests compile at the same moment is no concern of this run's.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder.parent / "inductor")
    environment.pop("FUSEDRNN_IMDB", None)  # reviews are generated
    command = [PYTHON, "-c", RUN, str(folder), str(tests), str(minutes), only]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def read_all(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Every file of a results folder; each must be whole."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text())
        if path.suffix == ".csv":
            found[path.name] = whole_rows(path)
            for row in found[path.name]:
                assert None not in row, f"{path.name}: more cells than columns"
                assert None not in row.values(), f"{path.name}: fewer cells than columns"
    return found


# Files


WRITER = """
import sys
from pathlib import Path
from bench.disk import Table, write_json
from bench.results import Results, Row
from bench.stages import Continued
from bench.cases import ONE_HOT
folder = Path(sys.argv[1])
write_json(folder / "environment.json", {"device": "none"})
table, results = Table(folder / "table.csv", ("number", "text")), Continued(folder)
print("ready", flush=True)
for number in range(10**9):
    table.add((number, "x" * 5000))
    write_json(folder / "status.json", {"number": number, "text": "x" * 20000})
    results.add([Row.of(ONE_HOT, "lstm", "p", backend="", gate="ok", note="y" * 9000)] * 2)
    results.note({"number": number, "text": "z" * 20000})
"""


def test_a_writer_killed_at_any_moment_leaves_whole_files(tmp_path):
    """Begun again in the same folder each time: what was torn is mended, nothing whole is lost."""
    generator, seen = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen(
            [PYTHON, "-c", WRITER, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0.0, 0.15))
        process.kill()
        process.communicate()
        found = read_all(tmp_path)
        assert len(found["table.csv"]) >= seen
        seen = len(found["table.csv"])
        assert {row["text"] for row in found["table.csv"]} <= {"x" * 5000}
        assert {row["note"] for row in found["results.csv"]} <= {"y" * 9000}
    assert seen > 6


def test_what_was_torn_is_cut_off_and_written_on(tmp_path):
    path = tmp_path / "table.csv"
    Table(path, ("a", "b")).add((1, 'a "quoted", text\nof two lines'))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert len(whole_rows(path)) <= 1
        assert not any(None in row.values() for row in whole_rows(path))
        Table(path, ("a", "b")).add((2, "next"))
        assert whole_rows(path)[-1] == {"a": "2", "b": "next"}
    path.write_bytes(b"a,b")
    mend(path)
    assert path.read_bytes() == b""
    assert whole_rows(tmp_path / "missing.csv") == []


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
    with pytest.raises(OSError, match="cut off"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


# Processes


def test_a_command_ends_at_its_limit_with_all_it_started(tmp_path):
    log, mark = tmp_path / "log", tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    command = [
        PYTHON,
        "-c",
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # as deaf as a hung kernel
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('begun', flush=True)\ntime.sleep(60)",
    ]
    with Signals() as signals:
        ended = supervise(command, log, 0.8, signals)
    assert ended.why == "stopped after 1 s"
    assert ended.code == -signal.SIGKILL
    assert log.read_text() == "begun\n"
    time.sleep(1.5)
    assert not mark.exists()


def test_a_command_ends_by_itself_by_a_complaint_or_by_a_signal(tmp_path):
    log = tmp_path / "log"
    wait = [PYTHON, "-c", "import time; time.sleep(60)"]
    with Signals() as signals:
        assert supervise([PYTHON, "-c", "raise SystemExit(5)"], log, 30, signals)[:2] == (5, "")
        assert supervise(wait, log, 30, signals, complaint=lambda: "hung").why == "hung"
        before = signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            supervise(wait, log, 30, signals)
    assert signal.getsignal(signal.SIGTERM) is not before


# The tests of the device


def test_every_test_of_the_device_is_in_one_group():
    def collected(words):
        command = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", *words]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        return [line for line in done.stdout.splitlines() if "::" in line]

    every = collected(["tests"])
    grouped = {g.name: collected([*g.files, "-k", g.keyword]) for g in GROUPS if g.keyword}
    (rest,) = (group for group in GROUPS if not group.keyword)
    grouped[rest.name] = [test for test in every if test.partition("::")[0] not in rest.ignored]
    assert all(grouped.values())
    together = [test for tests in grouped.values() for test in tests]
    assert sorted(together) == sorted(every)
    assert all("test_kernels.py" in test for test in grouped["cooperative"])
    assert tuple(grouped) == (*correctness.SCHEDULES, "rest")


def test_outcomes_are_on_disk_when_a_group_is_cut_off(tmp_path, own_tests):
    group = Group("resident", (str(own_tests),), "", 1.0)
    own_tests.write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_a(): pass\ndef test_b(): assert 1 == 2, 'not so'\n"
        "def test_c(): pytest.skip('no reason')\ndef test_d(): time.sleep(60)\n"
    )
    with Signals() as signals:
        verdict = correctness.run_group(group, tmp_path, 8, signals)
    assert verdict == (True, "stopped after 8 s: 1 passed, 1 failed, 1 skipped")
    rows = whole_rows(tmp_path / "tests.csv")
    assert [(row["group"], row["outcome"]) for row in rows] == [
        ("resident", "passed"), ("resident", "failed"), ("resident", "skipped"),
    ]  # fmt: skip
    assert "AssertionError" in rows[1]["message"]
    assert "test_d" in (tmp_path / "tests.txt").read_text()


@pytest.mark.parametrize(
    ("body", "failed", "text"),
    [
        ("def test(): pass", False, "1 passed"),
        ("def test(): assert False", True, "1 failed"),
        ("def test(): import time; time.sleep(60)", True, "hung: no test ended"),
        ("def test(): import os; os._exit(7)", True, "pytest left with code 7, see tests.txt"),
    ],
)
def test_the_verdict_of_a_group(body, failed, text, tmp_path, own_tests, monkeypatch):
    monkeypatch.setattr(correctness, "HANGS_AFTER", 5.0)
    own_tests.write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{body}\n")
    with Signals() as signals:
        group = Group("stepwise", (str(own_tests),), "", 1.0)
        assert correctness.run_group(group, tmp_path, 60, signals) == (failed, text)


# Runs


def options(only: str, minutes: float = 5.0, **rest) -> gpu.Options:
    return gpu.Options(minutes, gpu.parse_only(only), quick=True, **rest)


def test_a_schedule_that_fails_is_left_out(tmp_path, own_tests, interpreted, monkeypatch):
    """Noted, and the rest goes on; the sweep has a row that says why there is no time."""
    own_tests.write_text("import pytest\n@pytest.mark.gpu\ndef test(): assert False\n")
    red = Group("resident", (str(own_tests),), "", 0.5)
    monkeypatch.setattr(correctness, "GROUPS", (red,))
    run = gpu.Run(options("correctness,sweep", minutes=0.75), tmp_path, CPU)
    assert run.run() == 1
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["left_out"]) == ("done", ["resident"])
    assert status["stages"]["correctness"]["state"] == "failed"
    rows = read_all(tmp_path)["results.csv"]
    assert {row["note"] for row in rows if row["provider"] == "fusedrnn triton"} == {
        "schedule resident failed its tests",
        "backend 'triton': Triton's interpreter multiplies the bit patterns of bfloat16",
    }
    # auto, on the CPU without our kernels, takes part as before.
    gates = {row["gate"] for row in rows if row["provider"] == "fusedrnn"}
    assert "ok" in gates
    assert not gates & {"refused", "failed"}
    # Named again, a stage goes on in the folder, and knows what failed.
    again = gpu.Run(options("sweep"), tmp_path, CPU)
    again._begin()
    assert again.left_out == {"resident"}


@pytest.mark.slow
def test_a_whole_run_in_small(tmp_path, own_tests):
    process = start(tmp_path / "out", own_tests, 1.5, ",".join(gpu.NAMES))
    out = process.communicate(timeout=200)[0].decode()
    # The summary at the end says what was red; the whole output is far longer than a report shows.
    assert process.returncode == 0, out[-4000:]
    found = read_all(tmp_path / "out")
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["state"] == "done"
    assert [s["state"] for s in status["stages"].values()] == ["ok"] * 5
    assert "not found: looked in" in status["stages"]["sanitizer"]["text"]
    assert len(found["tests.csv"]) == 40
    assert {row["lesson"] for row in found["results.csv"]} >= {"imdb", "sine", "sweep"}
    ours = [row for row in found["results.csv"] if row["provider"] == "fusedrnn triton"]
    assert {row["gate"] for row in ours} <= {"ok", "refused"}
    assert any(row["gate"] == "ok" for row in ours)
    assert {row["outcome"] for row in found["autotable.csv"]} <= {"ok", "failed"}
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["nvidia_smi"]
    assert environment["options"]["minutes"] == 1.5
    assert "keras" in {**environment["peers"], **environment["absent"]}
    assert "generated reviews" in environment["data"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_leaves_whole_files(seed, tmp_path, own_tests):
    """And nobody goes on in its place: what it had started dies with it."""
    process = start(tmp_path / "out", own_tests, 1.0, "correctness,sweep,autotable")
    time.sleep(random.Random(seed).uniform(3.0, 20.0))
    process.kill()
    process.wait()  # not for the end of its output, which an orphan would hold open
    process.stdout.close()
    time.sleep(0.2)
    found = read_all(tmp_path / "out") if (tmp_path / "out").exists() else {}
    time.sleep(1.5)
    later = read_all(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert {name: len(rows) for name, rows in later.items()} == {
        name: len(rows) for name, rows in found.items()
    }


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_and_leaves_a_summary(signum, tmp_path, own_tests):
    process = start(tmp_path / "out", own_tests, 3.0, "correctness,sweep")
    status = tmp_path / "out" / "status.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "out" / "tests.csv").exists():
        time.sleep(0.1)
    process.send_signal(signum)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + signum
    found = json.loads(status.read_text())
    assert found["state"] == f"stopped by {signum.name}"
    assert found["stages"]["correctness"]["state"] == f"stopped by {signum.name}"
    assert "sweep" not in found["stages"]
    assert f"stopped by {signum.name}; results in" in out
    read_all(tmp_path / "out")


# The command


def test_a_dry_run_needs_no_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main_module.main(["gpu", "--dry-run", "--minutes", "9"]) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for stage in gpu.STAGES:
        assert f"\n{stage.name}: {530 * stage.share:.0f} s" in out
    names = [case.name for case in stages.cases_of("sweep")]
    assert all(name in out for name in names[:400])
    assert f"and {len(names) - 400} more" in out
    assert "memcheck lstm: cooperative, resident, stepwise" in out
    assert main_module.main(["gpu", "--dry-run", "--only", "sweep,lessons"]) == 0
    out = capsys.readouterr().out
    assert "\nsweep: 331 s" in out
    assert "memcheck" not in out
    with pytest.raises(gpu.OptionError, match="the stages are correctness, sanitizer"):
        gpu.parse_only("sweep,x")


def test_folders_are_plain_names_and_nothing_is_written_over(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    name = "NVIDIA H100 80GB HBM3 (x/y)"
    first = gpu.default_folder(name, "2026-01-02")
    assert first.name == "nvidia-h100-80gb-hbm3-x-y-2026-01-02"
    assert first.parent.name == "results"
    first.mkdir(parents=True)
    (first / "status.json").write_text("{}")
    assert gpu.default_folder(name, "2026-01-02").name == f"{first.name}-2"
    assert gpu.default_folder(name, "2026-01-02", goes_on=True) == first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(gpu.OptionError, match="has results already"):
        gpu.run(gpu.Options(), first)


# compute-sanitizer


FAKE = """#!{python}
import subprocess, sys
words = sys.argv[1:]
log, tool = words[words.index("--log-file") + 1], words[words.index("--tool") + 1]
code = {code}
race = tool == "racecheck"
summary = "RACECHECK SUMMARY: {n} hazards" if race else "ERROR SUMMARY: {n} errors"
kernel = "========= at _{named}_fwd_kernel\\n" if "{named}" else ""
if {n} >= 0:
    open(log, "w").write("========= COMPUTE-SANITIZER\\n" + kernel + "=== " + summary + "\\n")
print({said!r}, flush=True)
if code is None:
    code = subprocess.run(words[words.index(sys.executable):]).returncode
sys.exit(code)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    def make(code, n=0, said="", named=""):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        path = folder / "compute-sanitizer"
        path.write_text(FAKE.format(python=PYTHON, code=code, n=n, said=said, named=named))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return str(path)

    return make


def test_the_sanitizer_is_looked_for_and_its_absence_is_said(program, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if sanitizer.find() is None:  # a machine may have it in a usual place
        for place in ("nowhere", "cuda/bin", "cuda/compute-sanitizer"):
            assert str(tmp_path / place) in sanitizer.not_found()
    path = program(0)
    assert sanitizer.find() == path
    (tmp_path / "cuda").mkdir()
    os.replace(tmp_path / "bin", tmp_path / "cuda" / "bin")
    assert sanitizer.find() == str(tmp_path / "cuda" / "bin" / "compute-sanitizer")


@pytest.mark.parametrize(
    ("tool", "code", "n", "outcome", "errors"),
    [
        ("memcheck", 0, 0, "clean", "0"),
        ("racecheck", 0, 0, "clean", "0"),
        ("memcheck", 86, 3, "errors", "3"),
        ("racecheck", 0, 2, "errors", "2"),  # a hazard that was only a warning
        ("memcheck", 0, -1, "not run", ""),  # no summary: the tool said nothing
        ("memcheck", "__import__('time').sleep(60)", 0, "stopped", ""),
    ],
)
def test_what_the_sanitizer_says_is_a_row(tool, code, n, outcome, errors, program, tmp_path):
    batch = sanitizer.Batch(tool, "lstm", ("cooperative", "resident"))
    named = "resident" if outcome == "errors" else ""
    made = program(code, n, "cooperative lstm: right, 0.1\nresident lstm: right, 0.1", named)
    with Signals() as signals:
        found = sanitizer.run_batch(batch, made, tmp_path, 2, signals, "cpu")
    # What the report names is whose it is; where it names nobody, everybody's.
    assert found == ["clean" if outcome == "errors" else outcome, outcome]
    rows = whole_rows(tmp_path / "sanitizer.csv")
    assert [(row["tool"], row["outcome"]) for row in rows] == [(tool, o) for o in found]
    assert {row["errors"] for row in rows} == {errors}


def test_whoever_ends_the_process_is_told_from_whom_it_did_not_reach(program, tmp_path):
    batch = sanitizer.Batch("memcheck", "gru", ("cooperative", "resident", "stepwise"))
    with Signals() as signals:
        made = program(86, 1, "cooperative gru: right, 0.1", "resident")
        found = sanitizer.run_batch(batch, made, tmp_path, 60, signals, "cpu")
        assert found == ["clean", "errors", "not run"]
        made = program(86, 1, "cooperative gru: right, 0.1")
        found = sanitizer.run_batch(batch, made, tmp_path, 60, signals, "cpu")
        assert found == ["errors", "errors", "not run"]
        made = program(1, 0, "cooperative gru: wrong, 2.1\nresident gru: right, 0.1")
        found = sanitizer.run_batch(batch, made, tmp_path, 60, signals, "cpu")
        assert found == ["wrong", "clean", "not run"]


def test_both_tools_reach_the_schedules_that_wait_first():
    order = sanitizer.batches()
    assert [(b.tool, b.cell) for b in order[:2]] == [("memcheck", "lstm"), ("racecheck", "lstm")]
    assert {b.schedules for b in order} == {("cooperative", "resident", "stepwise")}
    assert sanitizer.batches(frozenset({"resident"}))[0].schedules == ("cooperative", "stepwise")
    assert sanitizer.batches(frozenset(correctness.SCHEDULES)) == []
    assert [sanitizer.share_of(place, 50.0) for place in range(3)] == [25.0, 50.0, 50.0]


def test_a_batch_of_the_sanitizer_runs_its_schedules(program, tmp_path, interpreted):
    """The real ones under a tool that finds nothing. Programs that wait need a GPU."""
    batch = sanitizer.Batch("memcheck", "gru", ("resident", "stepwise"))
    with Signals() as signals:
        found = sanitizer.run_batch(batch, program(None), tmp_path, 100, signals, "cpu")
    assert found == ["clean", "clean"]
    assert "resident gru: right, 0." in (tmp_path / "sanitizer.txt").read_text()


def test_the_small_case_runs_the_plan_it_names(monkeypatch, interpreted):
    from fusedrnn import launches

    ran = []
    original = launches.run_forward

    def spy(config, plan, *rest):
        ran.append(plan and plan.schedule)
        return original(config, plan, *rest)

    monkeypatch.setattr("fusedrnn.stack.run_forward", spy)
    assert sanitizer.main("stepwise,resident", "lstm", "cpu") == 0
    assert ran == ["stepwise", "resident"]
