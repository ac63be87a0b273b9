"""A GPU that is not there: Triton's real driver and launcher, on tensors of the CPU.

``environment`` makes what a process needs in which ``start`` is called before a kernel is.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
REFUSED, ILLEGAL_ACCESS, STREAM = 720, 700, 7
_INTEGER, _POINTER = (1 << 32) - 1, (1 << 64) - 1  # the bits that count


def environment(folder: Path) -> dict[str, str]:
    """Builds the driver in a folder; returns the environment of a process that uses it."""
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    library = folder / "libcuda.so.1"
    if not library.exists():
        compiler = compiler_of() or "cc"
        source = [f"-I{include}", str(HERE / "driver.c"), "-o", str(library)]
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", *source], check=True)
    paths = [str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    own = {
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    rest = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return rest | own


def compiler_of() -> str | None:
    """Returns the C compiler that Triton would use, which the driver needs too."""
    names = (os.environ.get("CC"), "clang", "gcc", "cc")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 48),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("cooperative", ctypes.c_int),
        ("stream", ctypes.c_uint64),
        ("params", ctypes.c_uint64 * 64),
    )


class Launch(NamedTuple):
    """One launch, as the driver got it."""

    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    cooperative: bool
    stream: int
    sizes: tuple[int, ...]  # the arguments that are integers


class Gpu:
    """The fake GPU of this process."""

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self._library = ctypes.CDLL("libcuda.so.1")
        self.become("sm_90")

    def become(self, arch: str) -> None:
        """Changes into another chip."""
        from fusedrnn.kernels.plan import CHIPS

        self.capability = int(arch.removeprefix("sm_"))
        self.chip = CHIPS.get(arch, CHIPS["sm_90"]._replace(name=arch, arch=arch))
        self.limit_shared(self.chip.shared_bytes)

    def limit_shared(self, count: int) -> None:
        """Limits the bytes of shared memory of a program, without telling the planner."""
        ctypes.c_uint.in_dll(self._library, "fake_shared").value = count

    def launches(self) -> list[Launch]:
        """Returns the launches since the last call of this method."""
        found, self._launches = self._launches, []
        return found

    @contextmanager
    def failing(self, name: str, error: int) -> Iterator[None]:
        """Within the context launches ("error"), or cooperative ones ("refusal"), fail."""
        variable = ctypes.c_uint.in_dll(self._library, f"fake_{name}")
        variable.value = error
        try:
            yield
        finally:
            variable.value = 0

    def launcher(self, launch: Callable) -> Callable:
        """Makes a launcher compare what the driver gets with the arguments of the kernel."""
        count = ctypes.c_uint.in_dll(self._library, "fake_params")
        last = _Launch.in_dll(self._library, "fake_last")

        def call(launcher: Any, *arguments: Any) -> None:
            given = flat(arguments[9:])
            count.value = len(given)
            launch(launcher, *arguments)
            name = last.name.decode()
            got = [value & mask for value, (_, mask) in zip(last.params, given, strict=False)]
            assert got == [value for value, _ in given], f"{name}: {got}, not {given}"
            sizes = tuple(value for value, mask in given if mask == _INTEGER)
            about = last.threads, last.shared, bool(last.cooperative), last.stream, sizes
            self._launches.append(Launch(name, tuple(last.grid), *about))

        return call


def start() -> Gpu:
    """Makes tensors of the CPU launch kernels on the fake GPU."""
    import torch
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

    from fusedrnn import dispatch
    from fusedrnn.kernels import expected, problem

    gpu = Gpu()
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    torch.cuda.current_device = lambda: gpu.capability  # Triton keeps the binaries of each apart
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: divmod(gpu.capability, 10)
    problem._chip_of = lambda device: gpu.chip
    dispatch._is_gpu = lambda device: True
    expected.Verdict.favours_ours = True  # also for tiny sizes
    CudaLauncher.__call__ = gpu.launcher(CudaLauncher.__call__)
    CudaDriver.is_active = staticmethod(lambda: True)  # Triton starts it at the first launch
    return gpu


def flat(arguments: Any) -> list[tuple[int, int]]:
    """Returns pointers and integers of a kernel, up to its constants, with the bits that count."""
    from fusedrnn.kernels.cells import Cell

    found: list[tuple[int, int]] = []
    for argument in arguments:
        if isinstance(argument, Cell):
            break
        if isinstance(argument, tuple):
            found += flat(argument)
        elif isinstance(argument, int):
            found.append((argument & _INTEGER, _INTEGER))
        elif argument is not None:
            found.append((argument.data_ptr(), _POINTER))
    return found
