"""Launches through Triton's real driver and launcher, to a GPU that is not there.

Each test runs in its own process, without the interpreter. The driver (``fake_cuda``) compares the
arguments that it gets with those of the kernel and records the launch; no kernel runs.
"""

import inspect
import math
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager

import fake_cuda
import pytest
import torch
from test_equivalence import build, states_for
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import layer
from fusedrnn.kernels import expected as judging
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.problem import KernelFailed, Problem
from fusedrnn.kernels.spec import SPECS

T, B, I = 3, 17, 3
#: Each schedule by a size and dtype that it takes.
SCHEDULES = {
    "resident_nvidia": (16, torch.float16),
    "resident": (16, torch.float32),
    "cooperative": (64, torch.float16),
    "stepwise": (16, torch.float64),
}
LENGTHS = torch.arange(B) % T + 1
RESET = torch.ones(T, B, dtype=torch.bool)
FORMS = {
    "batch first": ({"batch_first": True}, {}),
    "lengths": ({}, {"lengths": LENGTHS}),
    "reset": ({}, {"reset": RESET}),
    "packed": ({"bias": False}, {}),
    "two directions": ({"directions": 2}, {}),
    "two layers": ({"layers": 2, "dropout": 0.5}, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if fake_cuda.compiler_of() is None:
        pytest.skip("the driver of the fake GPU is in C, and there is no C compiler")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, whose driver torch has loaded")
    pytest.importorskip("triton.backends.nvidia")
    return tmp_path_factory.mktemp("fake_cuda")


def on_fake_gpu(**variables):
    """Runs a test with ``gpu`` in a process of its own, in an environment with these variables."""

    def decorate(test):
        @pytest.mark.xdist_group("fake_cuda")
        def run(folder, **arguments):
            code = f"from test_launching import *; {test.__name__}.inside(**{arguments!r})"
            own = {name: value.format(folder) for name, value in variables.items()}
            environment = fake_cuda.environment(folder) | own
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

        def inside(**arguments):
            gpu = fake_cuda.start()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                test(gpu, **arguments)

        run.__name__, run.__doc__, run.inside = test.__name__, test.__doc__, inside
        names = ["folder", *list(inspect.signature(test).parameters)[1:]]
        kind = inspect.Parameter.KEYWORD_ONLY
        run.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        return run

    return decorate


@contextmanager
def on(schedule):
    """Names the backend and the schedule of all layers."""

    def planner(problem, chip):
        choose = planning.SCHEDULES[schedule]
        if schedule == "cooperative" and problem.directions == 1:
            return (choose(problem, chip),)  # all layers as a wavefront
        return (choose(problem._replace(layers=1), chip),) * problem.layers

    with planning.forced(planner), fusedrnn.use_backend("triton"):
        yield


def module_of(schedule, cell="lstm", **options):
    H, dtype = SCHEDULES[schedule]
    return build(cell, dtype=dtype, I=I, H=H, **options)


def train(module, x, hx=None, **options):
    output, _ = module(x, hx, **options)
    output = output if isinstance(output, torch.Tensor) else output.data
    output.backward(torch.ones_like(output))
    return output


def sequence_of(module, T=T, B=B):
    return torch.randn(T, B, I).to(module.weight_hh_l0.dtype)


def expected(gpu, schedule, module, R=T * B):
    """Returns what each launch of a call must be, forward and backward, from the last layer up."""
    cell, H, D = module._cell, module.hidden_size, 1 + module.bidirectional
    spec, L = SPECS[cell], module.num_layers
    problem = Problem(cell, H, B, D, module.weight_hh_l0.dtype, "tf32", True, L)
    with on(schedule):
        (plan, *_) = planning.plan_stack(problem, gpu.chip)
    found, P = [], len(spec.phases)
    for direction, tiles in (("fwd", plan.forward), ("bwd", plan.backward)):
        rows, units = math.ceil(B / tiles.block_b), math.ceil(H / tiles.block_h)
        grid = {
            "resident_nvidia": (rows, D, 1),
            "resident": (rows, D, 1),
            "cooperative": (units, rows, plan.layers * D),
            "stepwise": (rows, units, D),
        }[schedule]
        sizes = [(T, B, R)]
        if schedule == "cooperative":
            sizes = [(T, B, R, 0, 1 << 24)]
        if schedule == "stepwise":  # one launch more, for the operand of h_0 or its gradient
            steps = [0, *(t for t in range(T) for _ in range(P))]
            if direction == "bwd":
                steps = [*(t for t in reversed(range(T)) for _ in range(P)), (1 << 32) - 1]
            sizes = [(step, T, B, R) for step in steps]
        name, threads = f"_{schedule.partition('_')[0]}_{direction}_kernel", 32 * tiles.num_warps
        launch = [(name, grid, threads, schedule == "cooperative", of) for of in sizes]
        found += launch * (L // plan.layers)
    return found


def recorded(gpu):
    launches = gpu.launches()
    assert {launch.stream for launch in launches} == {fake_cuda.STREAM}
    assert all(launch.shared <= gpu.chip.shared_bytes for launch in launches)
    return [(x.name, x.grid, x.threads, x.cooperative, x.sizes) for x in launches]


@pytest.mark.parametrize("schedule", SCHEDULES)
@on_fake_gpu()
def test_every_cell_and_form_of_input(gpu, schedule):
    """Launches: kernel, grid, threads, cooperation, T, B and R; the driver sees every pointer."""
    for cell in ("lstm", "gru_reset_before") if schedule == "stepwise" else SPECS:
        module = module_of(schedule, cell)
        with on(schedule):
            train(module, sequence_of(module))
        assert recorded(gpu) == expected(gpu, schedule, module)
    for form, (options, given) in FORMS.items():
        module, R = module_of(schedule, **options), T * B
        x = sequence_of(module)
        if form == "batch first":
            x = x.transpose(0, 1)
        if form == "packed":
            x, R = pack_padded_sequence(x, LENGTHS, enforce_sorted=False), int(LENGTHS.sum())
        with on(schedule):
            train(module, x, **given)
        assert recorded(gpu) == expected(gpu, schedule, module, R), form


def binaries():
    """Returns how many binaries of our kernels this process has."""
    kernels = [
        kernel
        for module in SCHEDULES
        for name, kernel in vars(layer._schedule(module)).items()
        if name.endswith("_kernel")
    ]
    return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())


@pytest.mark.parametrize("schedule", ["resident", "cooperative"])
@on_fake_gpu()
def test_no_call_compiles_again(gpu, schedule):
    """Not for other T, B, strides or offsets, where a row is no multiple of 16 bytes."""

    def off(tensor):
        """The same values, two bytes off."""
        room = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        return room.copy_(tensor)

    dtype = torch.float16
    module = build("lstm", 2, 2, dtype, I, 50)
    with on(schedule):
        train(module, sequence_of(module))
        count = binaries()
        assert count == 2
        for steps, batch in ((1, 1), (2, 5), (3, 8), (7, 16)):
            x, hx = sequence_of(module, steps, batch), states_for(module, batch)
            train(module, off(x), tuple(map(off, hx)))
        for weight in module.parameters():
            weight.data = off(weight.data)
        train(module, sequence_of(module).transpose(0, 1).contiguous().transpose(0, 1))
    assert binaries() == count


@on_fake_gpu()
def test_other_chips(gpu):
    """What the planner chooses fits the shared memory of the chip; an old chip is refused."""
    for arch in ("sm_86", "sm_120"):
        gpu.become(arch)
        module = build("lstm", 1, 1, torch.float16, I, 128)
        with fusedrnn.use_backend("triton"):
            train(module, sequence_of(module))
        problem = Problem("lstm", 128, B, 1, torch.float16, "ieee", True)
        (plan,) = planning.plan_stack(problem, gpu.chip)
        family = plan.schedule.partition("_")[0]
        assert [launch[0].split("_")[1] for launch in recorded(gpu)] == [family] * 2
    gpu.become("sm_75")
    text = str(fusedrnn.explain(module, sequence_of(module)))
    assert "not triton: Triton has no tensor-core products below sm_80" in text


def assert_auto_answers(H, cause):
    """One warning names the cause; results are the loop's, then torch's; a named backend raises."""
    judging.MARGIN = float("inf")  # worth a launch, though the call is short
    module, x = fusedrnn.LSTM(I, H), torch.randn(T, B, I)
    assert fusedrnn.explain(module, x).backend == "triton"
    with fusedrnn.use_backend("triton"), pytest.raises(KernelFailed, match=cause) as caught:
        module(x)
    assert "\n" not in str(caught.value)
    with pytest.warns(RuntimeWarning, match=f"kernels failed on cpu .*{cause}") as warned:
        output = train(module, x)
    assert len(warned) == 1
    with fusedrnn.use_backend("torch"):
        torch.testing.assert_close(output, module(x)[0])
    torch.testing.assert_close(train(module, x), output)
    found = fusedrnn.explain(module, x)
    assert found.backend == "aten"
    assert "not triton: they failed" in str(found)
    with fusedrnn.use_backend("triton"), pytest.raises(NotImplementedError, match=cause):
        module(x)


@on_fake_gpu(PATH="{}/nothing", CC="", TRITON_CACHE_DIR="{}/empty")
def test_without_a_c_compiler(gpu):
    """As in a container that was made to run, not to build."""
    del os.environ["CC"]
    assert_auto_answers(64, "RuntimeError: Failed to find C compiler")


@on_fake_gpu(TRITON_CACHE_DIR="/dev/null/cache")
def test_without_a_folder_for_binaries(gpu):
    assert_auto_answers(64, "NotADirectoryError: .*/dev/null/cache")


@on_fake_gpu()
def test_launches_that_fail(gpu):
    """Too much shared memory, a Triton that cannot be imported, a refusal, a broken context."""
    gpu.limit_shared(1000)
    assert_auto_answers(64, "OutOfResources: out of resource: shared memory")

    gpu.become("sm_80")
    layer._schedule.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fusedrnn.kernels.resident_nvidia", None)
        assert_auto_answers(32, "ModuleNotFoundError: .*resident")

    module = build("lstm", 1, 1, torch.float16, I, 256)
    x = sequence_of(module)
    with fusedrnn.use_backend("triton"):
        with gpu.failing("error", fake_cuda.ILLEGAL_ACCESS):
            with pytest.raises(RuntimeError, match="illegal memory access") as caught:
                module(x)
            assert type(caught.value) is RuntimeError
        refused = pytest.warns(RuntimeWarning, match="refused a cooperative launch .*too many")
        with gpu.failing("refusal", fake_cuda.REFUSED), refused:
            train(module, x)
        train(module, x)
    assert {launch.name.split("_")[1] for launch in gpu.launches()} == {"stepwise"}
