"""The records of the planner: chips as torch describes them, failures, and kinds of products."""

from types import SimpleNamespace

import pytest
import torch
from test_plan import AMD, FP32, H100, problem

from fusedrnn.kernels.plan import cooperative, plan, plan_stack
from fusedrnn.kernels.problem import Chip, NoPlan, _chip_of, chip_of, give_up

GPU = {"name": "GPU", "multi_processor_count": 9, "shared_memory_per_block": 49_152}
TOLD = {"major": 9, "shared_memory_per_block_optin": 99_328, "clock_rate": 1_500_000}
TOLD_BY_AMD = {"major": 9, "warp_size": 64, "gcnArchName": "gfx942:sramecc+:xnack-"}


@pytest.mark.parametrize(
    ("found", "hip", "want"),
    [
        (TOLD, None, Chip("GPU", "sm_90", 9, 99_328, mhz=1500.0)),
        ({"major": 8}, None, Chip("GPU", "sm_80", 9, 49_152, mhz=1410.0)),
        (TOLD_BY_AMD, "6.4", Chip("GPU", "gfx942", 9, 49_152, 64)),
    ],
)
def test_a_chip_as_torch_describes_it(found, hip, want, monkeypatch):
    properties = SimpleNamespace(**{"minor": 0, "warp_size": 32} | GPU | found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert _chip_of.__wrapped__(torch.device("cuda")) == want


def test_kinds_of_products():
    dtypes = (torch.float16, torch.bfloat16, torch.float64, FP32)
    found = [problem(dtype=dtype).kind(H100) for dtype in dtypes]
    assert found == ["16-bit", "16-bit", "fp64", "tf32"]
    assert problem(dtype=FP32).kind(AMD) == "ieee"  # AMD's have no tf32


def test_what_failed_on_a_device_is_planned_no_more(monkeypatch):
    """A schedule, or the kernels of a cell, H and dtype."""
    devices, asked, forgotten = (torch.device("cpu"), torch.device("meta")), problem(), []
    monkeypatch.setattr("fusedrnn.kernels.problem.CACHES", [lambda: forgotten.append(1)])
    give_up(devices[0], (asked.cell, asked.hidden_size, asked.dtype), "no compiler")
    give_up(devices[1], "cooperative", "too many programs")
    assert len(forgotten) == 2  # what was decided before
    uncompiled, refusing = (H100._replace(failed=chip_of(device).failed) for device in devices)
    with pytest.raises(NoPlan, match=r"^no compiler$"):
        plan_stack(asked, uncompiled)
    assert plan_stack(asked._replace(hidden_size=32), uncompiled)
    with pytest.raises(NoPlan, match=r"^too many programs$"):
        cooperative(asked, refusing)
    assert plan(asked._replace(hidden_size=256), refusing).schedule == "stepwise"
    assert plan_stack(asked, refusing)


@pytest.mark.parametrize(("backend", "sms"), [("gloo", 132), ("cpu:gloo,cuda:nccl", 100)])
def test_a_process_group_keeps_sms(backend, sms, monkeypatch):
    """A collective that runs beside a cooperative launch has its SMs."""
    for name, value in (("is_initialized", True), ("get_backend", backend)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    chip = chip_of(torch.device("cpu"))
    assert chip.sms == sms
    chip = chip._replace(concurrent=True)
    for B in (16, 512):
        tiles = cooperative(problem(hidden_size=1024, batch=B), chip).forward
        assert 1024 // tiles.block_h * tiles.at_once <= sms


def test_a_description():
    text = plan(problem(), H100).describe()
    assert text.startswith("resident_nvidia: forward 8 rows x 64 units, 4 warps; backward")
    assert plan(problem(needs_grad=False), H100).backward is None
