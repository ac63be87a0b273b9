"""``python -m fusedrnn check``: a page about this machine, to be read and pasted into a report."""

import copy
import platform
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from . import __version__, dispatch, modules
from .kernels import plan as planning
from .kernels.plan import CHIPS, Chip, NoPlan, Problem
from .testing import assert_budget, run_module

#: Each schedule with a hidden size and dtype that it takes on every chip of NVIDIA's.
SCHEDULES = {
    "resident_nvidia": (64, torch.float16),
    "resident": (32, torch.float32),
    "cooperative": (256, torch.float16),
    "stepwise": (64, torch.float32),
}
#: Common layers: module, I, H, dtype on a GPU, options.
LAYERS: tuple[tuple[str, int, int, torch.dtype, dict[str, Any]], ...] = (
    ("LSTM", 32, 64, torch.float32, {}),
    ("LSTM", 128, 128, torch.bfloat16, {}),
    ("GRU", 256, 256, torch.bfloat16, {}),
    ("LSTM", 256, 256, torch.float32, {"bidirectional": True}),
    ("LSTM", 512, 512, torch.bfloat16, {"num_layers": 2}),
)
T, B, I = 7, 3, 5


def run() -> Iterator[str]:
    """Yields lines; those that begin with ``WRONG`` tell of something that does not work."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else None
    yield from _versions(device)
    chip = planning.chip_of(device) if device else CHIPS["sm_90"]
    yield f"\nschedules, forward and backward, compiled for {chip.arch}"
    for schedule, (H, dtype) in SCHEDULES.items():
        problem = Problem("lstm", H, B, 1, dtype, "ieee", True)
        reason = chip.unsupported or ("not checked for AMD" if chip.warp_size == 64 else None)
        yield f"{schedule}: {reason}" if reason else compiled(schedule, chip, problem)
    yield "\ngates: all results and gradients of an LSTM beside torch.nn's, against fp64"
    for schedule in SCHEDULES:
        yield gate(schedule, device) if device else f"{schedule}: not checked, it needs a GPU"
    yield gate("torch", device or torch.device("cpu"))
    yield "\nwhat auto chooses for training with T=100, B=32"
    for name, I, H, dtype, options in LAYERS:
        how: Any = {"device": device, "dtype": dtype if device else torch.float32}
        module = getattr(modules, name)(I, H, **how, **options)
        yield str(dispatch.explain(module, torch.zeros(100, 32, I, **how))).replace("\n", "\n    ")


def _versions(device: torch.device | None) -> Iterator[str]:
    try:
        triton = import_module("triton").__version__
    except Exception as error:  # whatever a broken installation raises
        triton = f"not usable ({_first_line(error)})"
    yield f"fusedrnn {__version__}, torch {torch.__version__}, Triton {triton}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    if device is None:
        yield "no GPU: auto takes no kernel; on the CPU fusedrnn needs neither Triton nor CUDA"
        return
    chip = planning.chip_of(device)
    yield f"{device}: {chip.name}, {chip.arch}, {chip.sms} SMs, {chip.shared_bytes:,} bytes shared"
    cudnn = torch.backends.cudnn.version()
    yield f"CUDA {torch.version.cuda}, HIP {torch.version.hip}, cuDNN {cudnn}"


def compiled(schedule: str, chip: Chip, problem: Problem) -> str:
    """Compiles a plan, without a launch."""
    try:
        from .kernels.compile import compile_plan

        kernels = compile_plan(problem, planning.SCHEDULES[schedule](problem, chip), chip)
    except NoPlan as reason:
        return f"{schedule}: no, {reason}"
    except Exception as error:  # the cause is what the page is for
        return f"WRONG {schedule}: {_first_line(error)}"
    return f"{schedule}: yes, {len(kernels)} kernels"


def gate(schedule: str, device: torch.device) -> str:
    """Compares a forward and a backward with torch.nn, by a schedule or by backend ``"torch"``."""
    H, dtype = SCHEDULES.get(schedule, SCHEDULES["resident"])
    ours, truth = modules.LSTM(I, H, dtype=dtype), torch.nn.LSTM(I, H, dtype=torch.float64)
    truth.load_state_dict(ours.state_dict())
    reference, ours = copy.deepcopy(truth).to(device, dtype), ours.to(device)
    shapes = (T, B, I), (1, B, H), (1, B, H), (T, B, H), (1, B, H), (1, B, H)
    exact = [torch.randn(shape).to(dtype).double() for shape in shapes]

    def results(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        like = next(module.parameters())
        x, h_0, c_0, *arriving = (tensor.to(like) for tensor in exact)
        return run_module(module, x, (h_0, c_0), arriving)

    planned = planning.forced(lambda *given: (planning.SCHEDULES[schedule](*given),))
    backend = dispatch.use_backend("torch" if schedule == "torch" else "triton")
    try:
        with planned, backend, dispatch.use_precision("ieee"):
            got = results(ours)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            ref, exactly = results(reference), results(truth)
        for name in exactly:
            assert_budget(name, got[name], ref[name], exactly[name])
    except NotImplementedError as reason:
        return f"{schedule}: not checked, {reason}"
    except Exception as error:  # as above
        return f"WRONG {schedule}: {_first_line(error)}"
    return f"{schedule}: within the error budget"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"
