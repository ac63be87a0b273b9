"""README's tables of measurements are what the newest results folders say, or say that none is."""

import json
from dataclasses import replace

import pytest

from bench import readme
from bench.cases import sweep
from bench.providers import TORCH
from bench.readme import END, NO_CPU, NOTHING, TABLES, cpu_table, newest, write, written
from bench.readme import gpu_table as table
from bench.results import Results, Row

POINTS = {(w.H, w.B, w.dtype): w for w in sweep()}


def folder(results, name, device, date, speedup=2.0, **changes):
    """A results folder with LSTM at H = 64 and 256, and what must not get into the table."""
    env = {"device": device, "date": date, "torch": "2.11.0"}
    made = Results(results / name, env)
    for key, provider, gate in (
        ((64, 16, "bfloat16"), "fusedrnn triton", "ok"),
        ((64, 16, "bfloat16"), TORCH, "yardstick"),
        ((64, 64, "bfloat16"), "fusedrnn triton", "ok"),
        ((64, 16, "float16"), "fusedrnn triton", "ok"),
        ((256, 16, "bfloat16"), "fusedrnn triton", "red"),
    ):
        row = Row.of(POINTS[key], "lstm", provider, backend="triton", gate=gate)
        right = key == (64, 16, "bfloat16") and provider != TORCH
        row.fw_ms, row.fwbw_ms = (1.2345, 4.0) if right else (99.0, 99.0)
        row.fw_speedup, row.fwbw_speedup = (speedup, 3.0) if right else (77.0, 77.0)
        made.add([replace(row, **changes)])
    for other in ({"T": 64}, {"layers": 2}, {"bidirectional": True}, {"ragged": True}):
        w = replace(POINTS[64, 16, "bfloat16"], **other)
        row = Row.of(w, "lstm", "fusedrnn triton", backend="triton", gate="ok")
        row.fw_ms, row.fwbw_ms, row.fw_speedup, row.fwbw_speedup = 99.0, 99.0, 77.0, 77.0
        made.add([replace(row, **changes)])
    return results / name


def test_the_page_says_what_the_peers_results_say():
    for begin, table_of in readme.PAGE_TABLES.items():
        assert written(begin, readme.PAGE) == table_of()


def test_peers_stand_side_by_side(tmp_path):
    assert readme.peers_table(tmp_path) == readme.NO_PEERS
    folder = tmp_path / "cpu-2026-01-01-peers"
    folder.mkdir()
    env = {"device": "CPU, X", "threads": 2, "date": "2026-01-01T00:00:00", "torch": "2.13"}
    (folder / "environment.json").write_text(json.dumps(env))
    rows = ["torch.nn,ok,1,1", "keras,ok,0.5,", "jax,red,,", "onnxruntime,refused,,"]
    text = "".join(f"sine-10,lstm,{row}\n" for row in rows)
    head = "workload,cell,provider,gate,fw_speedup,fwbw_speedup\n"
    (folder / "results.csv").write_text(head + text)
    lines = readme.peers_table(tmp_path).splitlines()
    assert lines[0].endswith("| keras | jax | onnxruntime |")
    assert lines[2] == "| sine-10 lstm | 0.50 / - | red | - |"


def test_readme_says_what_the_results_say():
    """`make tables` writes it anew."""
    for begin, table_of in TABLES.items():
        assert table_of() == written(begin)


def test_without_results_it_is_one_sentence(tmp_path):
    assert table(tmp_path) == NOTHING
    folder(tmp_path, "local", "CPU, some", "2027-01-01 10:00 UTC")
    empty = folder(tmp_path, "cut-off", "A GPU", "2027-01-01 11:00 UTC")
    (empty / "results.csv").unlink()
    assert table(tmp_path) == NOTHING


def test_the_table_is_of_the_newest_folder(tmp_path):
    folder(tmp_path, "a-gpu-2026-02-01", "A GPU", "2026-02-01 10:00 UTC", speedup=1.0)
    last = folder(tmp_path, "a-gpu-2026-02-01-2", "A GPU", "2026-02-01 12:00 UTC")
    folder(tmp_path, "cpu-2027-01-01", "CPU, some", "2027-01-01 10:00 UTC", speedup=9.0)
    assert newest(tmp_path) == last
    lines = table(tmp_path).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(
        "| A GPU, 2026-02-01, torch 2.11.0, B = 16, bf16, T = 512: ms (times"
    )
    assert lines[2] == "| LSTM forward | 1.23 (2.00) | red | not measured |"
    assert lines[3] == "| LSTM with backward | 4 (3.00) | red | not measured |"
    assert lines[4] == "| GRU forward | not measured | not measured | not measured |"
    # A run that was cut off in the middle of a row, or went on in its folder.
    with open(last / "results.csv", "a") as file:
        file.write("H64-B16-bf16,sweep,lstm,fusedrnn tri")
    assert table(tmp_path).splitlines() == lines


def test_they_stand_between_their_comments(tmp_path):
    gpu, cpu = TABLES
    other = f"<!-- make beside -->\nkept\n{END}"
    path = tmp_path / "README.md"
    path.write_text(f"above\n{gpu}old\n{END}\n{other}{cpu}older\n{END}below\n")
    assert write(path, tmp_path) == f"{NOTHING}\n{NO_CPU}"
    assert path.read_text() == f"above\n{gpu}{NOTHING}{END}\n{other}{cpu}{NO_CPU}{END}below\n"
    assert (written(gpu, path), written(cpu, path)) == (NOTHING, NO_CPU)
    path.write_text("no comments\n")
    with pytest.raises(ValueError, match="has no line <!-- make tables: gpu -->"):
        write(path, tmp_path)
    assert path.read_text() == "no comments\n"


def test_the_cpus_table(tmp_path):
    """Geometric mean and least of the lessons alone; of the others the row that is meant."""
    for date, x in (("2026-01-01", "9"), ("2026-02-01", "4")):
        made = tmp_path / f"cpu-{date}"
        made.mkdir()
        env = {"device": "CPU, some", "threads": 2, "date": f"{date} 10:00 UTC", "torch": "2.13.0"}
        (made / "environment.json").write_text(json.dumps(env))
        rows = [
            "case,cell,what,backend,torch_ms,fusedrnn_ms,x",
            "imdb-one-hot,lstm,training,torch,1,1,1",
            f"sine-100,lstm,training,aten,1,1,{x}",
            "tokens T100 from tokens,lstm,training,torch,1,1,77",
            "tokens T100,lstm,training,torch,1,1,3",
            "decode T1,lstm,step,aten,1,1,66",
            "decode T1,lstm,step,stream,1,1,2.5",
        ]
        (made / "cpu.csv").write_text("\n".join(rows) + "\n")
        memory = "case,cell,torch_MiB,default_MiB,recompute_MiB,recompute_x_time"
        (made / "memory.csv").write_text(f"{memory}\nsine-100,lstm,8.1,2.2,0.9,1.25\n")
    said = cpu_table(tmp_path).splitlines()
    assert "CPU, some, 2 threads, 2026-02-01, torch 2.13.0" in said[0]
    assert "| the lessons, training | 2.00 (least 1.00) | - | - |" in said
    assert "| the lessons, forward | - | - | - |" in said
    assert "| `stream`, a step | 2.50 | - | - |" in said
    assert "| `TokenLSTM` beside one-hot rows, training | 3.00 | - | - |" in said
    assert said[-1] == "| sine-100 | 8.1, 2.2, 0.9 (1.25) |"


def test_the_sweep_has_every_point_of_the_table():
    assert {(w.H, w.B, w.dtype) for w in sweep()} >= {
        (H, readme.BATCH, readme.DTYPE) for H in readme.SIZES
    }
