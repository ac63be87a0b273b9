"""A GRU in NumPy, from the equations, beside the module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

import fusedrnn

from .lesson import DEVICE, Lesson, LessonError, Numbers, Setting, backend_of

T, B, I, H = 100, 4, 8, 32
#: Of outputs within [-1, 1], both fp32; measured 3e-7.
TOLERANCE = 1e-5


def gru(x: Any, h: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    """Outputs ``[T, B, H]`` of x ``[T, B, I]`` and h ``[B, H]``, weights as torch has them.

    Gates are r, z, n (Cho et al., 2014), with r behind the product as in cuDNN; z keeps.
    """
    import numpy as np

    def sigmoid(a: Any) -> Any:
        return 1 / (1 + np.exp(-a))

    output = []
    for x_t in x:
        i_r, i_z, i_n = np.split(x_t @ w_ih.T + b_ih, 3, axis=-1)
        h_r, h_z, h_n = np.split(h @ w_hh.T + b_hh, 3, axis=-1)
        r = sigmoid(i_r + h_r)
        z = sigmoid(i_z + h_z)
        n = np.tanh(i_n + r * h_n)
        h = (1 - z) * n + z * h
        output.append(h)
    return np.stack(output)


def measure(setting: Setting) -> Numbers:
    try:
        import numpy as np
    except ImportError as error:
        raise LessonError("this lesson needs numpy: pip install '.[bench]'") from error
    steps = 5 if setting.quick else T
    torch.manual_seed(setting.seed)
    module = fusedrnn.GRU(I, H).to(DEVICE)
    x, h_0 = torch.randn(steps, B, I), torch.randn(1, B, H)
    with torch.no_grad():
        theirs = module(x.to(DEVICE), h_0.to(DEVICE))[0].cpu().numpy()
        backend = backend_of(module, x.to(DEVICE))
    weights = [p.detach().cpu().numpy() for p in module.parameters()]
    ours = gru(x.numpy(), h_0[0].numpy(), *weights)
    apart = np.abs(ours - theirs).max(axis=(1, 2))
    return {
        "backends": {"gru": backend},
        "largest_difference": float(apart.max()),
        "difference": apart.tolist(),
        "numpy": ours[:, 0, 0].tolist(),
        "module": theirs[:, 0, 0].tolist(),
    }


def table(numbers: Numbers) -> Iterator[str]:
    """The difference is a few roundings, which are others elsewhere: its power of ten is said."""
    steps, off = len(numbers["difference"]), numbers["largest_difference"]
    bound = f"less than {10.0 ** (math.floor(math.log10(off)) + 1):.0e}" if off else "nothing"
    yield (
        f"GRU I={I} H={H}, {steps} steps: NumPy and the module differ by {bound} "
        f"(allowed {TOLERANCE:.0e})"
    )


def draw(figure: Any, numbers: Numbers) -> None:
    """A unit of both over time, and the largest difference of all units."""
    top, bottom = figure.subplots(2, sharex=True)
    steps = range(1, len(numbers["difference"]) + 1)
    top.plot(steps, numbers["module"], color="#555555", lw=3, label="module")
    top.plot(steps, numbers["numpy"], color="#2e86ab", lw=1.2, label="NumPy")
    top.set_ylabel("unit 0")
    top.legend(fontsize=8)
    bottom.plot(steps, numbers["difference"], color="#2e86ab")
    bottom.set_ylabel("largest difference")
    bottom.set_xlabel("step")


def fault(numbers: Numbers) -> str:
    off = numbers["largest_difference"]
    return "" if off <= TOLERANCE else f"NumPy's GRU is {off:.1e} from the module"


LESSON = Lesson(
    "a GRU of a dozen lines of NumPy, equal to the module within 1e-5", measure, table, draw, fault
)
