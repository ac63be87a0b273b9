"""``python -m fusedrnn check``: what it says of a machine without a GPU, and of a broken one."""

import sys

import pytest
import torch
from processes import python

from fusedrnn import check, layer
from fusedrnn.kernels.plan import CHIPS, Problem

PROBLEM = Problem("lstm", 32, 3, 1, torch.float32, "ieee", True)


def test_a_machine_without_a_gpu():
    done = python("-m", "fusedrnn", "check", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU" in done.stdout
    for schedule in check.SCHEDULES:
        assert f"\n{schedule}: yes, " in done.stdout
        assert f"\n{schedule}: not checked, it needs a GPU" in done.stdout
    assert "torch: within the error budget" in done.stdout
    assert done.stdout.count("backend: ") == len(check.LAYERS)


@pytest.mark.parametrize("schedule", ["resident", "stepwise", "torch"])
def test_gates(schedule, device, monkeypatch):
    """On a GPU or in the interpreter; they see a kernel that computes nothing, or fails."""
    assert check.gate(schedule, device) == f"{schedule}: within the error budget"
    if schedule != "torch":
        monkeypatch.setattr(layer._schedule(schedule), "forward", lambda *_: None)
        assert check.gate(schedule, device).startswith(f"WRONG {schedule}: ")
        monkeypatch.setattr(layer._schedule(schedule), "forward", None)
        assert "KernelFailed: " in check.gate(schedule, device)


def test_what_does_not_compile(monkeypatch):
    found = check.compiled("resident", CHIPS["sm_90"], PROBLEM._replace(hidden_size=999))
    assert found.startswith("resident: no, schedule resident holds W_hh in one program")
    monkeypatch.setitem(sys.modules, "fusedrnn.kernels.compile", None)
    found = check.compiled("resident", CHIPS["sm_90"], PROBLEM)
    assert found.startswith("WRONG resident: ModuleNotFoundError")


def test_a_chip_that_is_too_old(monkeypatch):
    monkeypatch.setattr(check, "CHIPS", {"sm_90": CHIPS["sm_90"]._replace(arch="sm_75")})
    assert "\n".join(check.run()).count("no tensor-core products below") == len(check.SCHEDULES)


def test_a_triton_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton not usable (ModuleNotFoundError" in next(iter(check.run()))
