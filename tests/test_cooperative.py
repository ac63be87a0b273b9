"""Ring 2: the cooperative schedule, each program in a process of its own, against the reference."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from concurrency import run_concurrently, shared
from cooperative_setup import (
    DELAY,
    Shape,
    check,
    differences,
    flat,
    launches,
    prepared,
    run,
    workspace,
)

from fusedrnn.kernels import cells, cooperative, cooperative_launch, exchange
from fusedrnn.kernels.common import pick
from fusedrnn.kernels.spec import SPECS
from fusedrnn.testing import assert_budget

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processes share the CPU's memory"),
    # Each case is several processes: no two of them at once on two cores.
    pytest.mark.xdist_group("processes"),
]

#: 2 to 4 programs each: slices, directions, batch tiles, layers, and slices that stick out.
SHAPES = {
    "two slices": Shape(4, 3, 32, 16),
    "three slices, the last one not full": Shape(5, 2, 41, 16),
    "four slices": Shape(3, 5, 50, 16),
    "two slices, two directions": Shape(4, 3, 20, 16, D=2),
    "two slices, two batch tiles": Shape(3, 17, 20, 16),
    "two slices, two batch tiles in two rounds": Shape(3, 17, 20, 16, at_once=1),
    "two slices, two layers": Shape(4, 3, 20, 16, L=2),
    "two slices, two layers with dropout": Shape(4, 3, 20, 16, L=2, mask=True),
    "one slice, four layers": Shape(5, 3, 16, 16, L=4, mask=True),
    "one step": Shape(1, 1, 17, 16),
    "two slices, ragged": Shape(6, 5, 20, 16, rows="ragged"),
    "two slices, two directions, ragged": Shape(6, 5, 20, 16, D=2, rows="ragged"),
    "two slices, two layers, ragged": Shape(6, 5, 20, 16, L=2, mask=True, rows="ragged"),
    "two slices, two batch tiles, packed": Shape(4, 18, 41, 32, rows="packed"),
    "two slices, two directions, packed": Shape(6, 5, 20, 16, D=2, rows="packed"),
    "two slices, an accumulator a dot": Shape(3, 2, 41, 32, folded=1),
    "two slices, an accumulator for two dots": Shape(3, 2, 41, 32, folded=2),
    "two slices, two layers, an accumulator for three": Shape(3, 2, 20, 16, L=2, folded=3),
    "two slices, two members": Shape(3, 6, 20, 16, members=2),
    "one slice, two members of two batch tiles": Shape(3, 34, 12, 16, at_once=4, members=2),
    "two slices, three members in rounds, ragged": Shape(
        4, 9, 20, 16, at_once=1, rows="ragged", members=3
    ),
    "two slices, two layers, two members, one by one": Shape(
        3, 6, 20, 16, L=2, mask=True, at_once=1, members=2
    ),
    "one slice, two directions, two members": Shape(4, 6, 12, 16, D=2, members=2),
    "two slices, two layers, packed": Shape(6, 5, 20, 16, L=2, mask=True, rows="packed"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_equals_the_reference(cell, name):
    """One cell with two states, and one with two exchanges a step."""
    check(cell, SHAPES[name], seed=len(name))


@pytest.mark.parametrize("cell", SPECS)
def test_every_cell(cell):
    check(cell, SHAPES["two slices, two layers with dropout"])
    check(cell, SHAPES["two slices, two directions"])


@pytest.mark.parametrize("seed", range(3))
def test_no_pattern_of_delays_changes_a_bit(seed):
    """The order of every sum is fixed: results under other pauses are equal bit for bit."""
    shape = SHAPES["two slices, two layers with dropout"]
    first = prepared("gru", shape)
    second = shared({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.items()})
    second["outs"] = shared([out.clone() for out in first["outs"]])
    assert not run("gru", shape, first, seed=seed, delay=0.004)
    assert not run("gru", shape, second, seed=seed + 10, delay=0.0)
    pairs = zip(flat(first).items(), flat(second).values(), strict=True)
    assert not [name for (name, one), other in pairs if not torch.equal(one, other)]


def test_half_precision():
    """Operands and what is handed round are rounded to fp16; the state stays in fp32."""
    shape = SHAPES["two slices, two layers"]
    data = prepared("lstm", shape, torch.float16)
    assert not run("lstm", shape, data)
    assert not differences("lstm", shape, data)


def test_calls_back_to_back():
    """A process may be in the second call while another is still in the first."""
    shape = SHAPES["two slices"]
    datas = [prepared("lstm", shape) for _ in range(3)]
    calls = [launches("lstm", shape, d, [workspace("lstm", shape, d["gx"])] * 2) for d in datas]

    def one_after_the_other():
        for forward, _ in calls:
            forward()

    assert not run_concurrently([one_after_the_other], shape.programs, delay=DELAY)
    for data in datas:
        assert not run_concurrently(
            [launches("lstm", shape, data, [None, workspace("lstm", shape, data["gx"])])[1]],
            shape.programs,
        )
        assert not differences("lstm", shape, data)


def test_calls_on_two_streams():
    """Two calls at the same time, each with a workspace of its own."""
    shape = SHAPES["two slices"]
    datas = [prepared("gru_reset_before", shape) for _ in range(2)]
    works = [[workspace("gru_reset_before", shape, d["gx"]) for _ in range(2)] for d in datas]
    for each in zip(
        *(launches("gru_reset_before", shape, *pair) for pair in zip(datas, works, strict=True)),
        strict=True,
    ):
        assert not run_concurrently(each, shape.programs, delay=DELAY)
    for data in datas:
        assert not differences("gru_reset_before", shape, data)


@triton.jit
def publish_but_the_second(counter_ptr):
    if tl.program_id(0) != 1:
        exchange.publish(counter_ptr)


def test_a_lost_partner_is_an_error_and_no_hang(monkeypatch):
    """The wait ends with one clear sentence, and the next call is none the worse for it."""
    shape = SHAPES["two slices"]
    data = prepared("lstm", shape)
    with monkeypatch.context() as lost:
        lost.setattr(cooperative, "publish", publish_but_the_second)
        failed = run("lstm", shape, data, patience=50)
    assert failed
    assert all("a program waited in vain for its partners" in text for text in failed)
    assert not run("lstm", shape, data)
    assert not differences("lstm", shape, data)


# The protocol, broken in every way that a slip of the hand would break it.


@triton.jit
def wait_for_nothing(counter_ptr, target, patience):
    pass


@triton.jit
def wait_for_all_but_one(counter_ptr, target, patience):
    exchange.wait(counter_ptr, target - 1, patience)


def rewritten(kernel: triton.JITFunction, old: str, new: str) -> triton.JITFunction:
    """A kernel with one passage of its source replaced."""
    source = inspect.getsource(kernel.fn)
    assert source.count(old) == 1
    namespace = dict(vars(cooperative))
    path = Path(tempfile.mkdtemp()) / "mutant.py"
    path.write_text(source.replace(old, new))
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace[kernel.fn.__name__]


STORE_H = (
    "        store_rows(out_ptr + row * (D * H) + pid_d * H, here, start, "
    "only(out, 0), 0, H, BLOCKS)\n"
)
STORE_DGATES = (
    "            store_rows(rows, here, start, grads, FIRST_TILE[P - 1 - p], H, BLOCKS)\n"
)
STORE_SLOT = "                store_rows(slots, mask_b, start, only((u,), 0), 0, H, BLOCKS)\n"
PUBLISH = "publish(counter_ptr)\n"


def break_nothing(patch):
    """The harness itself: without a mutation nothing is found."""


def break_wait_dropped(patch):
    patch.setattr(cooperative, "wait", wait_for_nothing)


def break_counter_target(patch):
    patch.setattr(cooperative, "wait", wait_for_all_but_one)


def break_flag_before_h(patch):
    late = rewritten(
        cooperative._cooperative_fwd_kernel,
        STORE_H + " " * 8 + PUBLISH,
        " " * 8 + PUBLISH + STORE_H,
    )
    patch.setattr(cooperative_launch, "_cooperative_fwd_kernel", late)


def break_flag_before_dgates(patch):
    late = rewritten(
        cooperative._cooperative_bwd_kernel,
        STORE_DGATES + " " * 12 + PUBLISH,
        " " * 12 + PUBLISH + STORE_DGATES,
    )
    patch.setattr(cooperative_launch, "_cooperative_bwd_kernel", late)


def break_flag_before_slot(patch):
    late = rewritten(
        cooperative._cooperative_fwd_kernel,
        STORE_SLOT + " " * 16 + PUBLISH,
        " " * 16 + PUBLISH + STORE_SLOT,
    )
    patch.setattr(cooperative_launch, "_cooperative_fwd_kernel", late)


def break_turns_of_slots(patch):
    one = rewritten(cooperative._cooperative_fwd_kernel, "pid_z * 2 + step % 2", "pid_z * 2")
    patch.setattr(cooperative_launch, "_cooperative_fwd_kernel", one)


MUTANTS = [break_wait_dropped, break_counter_target, break_flag_before_h, break_flag_before_dgates]


@pytest.mark.parametrize("mutate", [break_nothing, *MUTANTS])
def test_a_broken_protocol_is_found(mutate, monkeypatch):
    shape = SHAPES["two slices, two layers"]
    data = prepared("lstm", shape)
    mutate(monkeypatch)
    # One program lags, so that whoever does not wait for it reads what is not there yet.
    failed = run("lstm", shape, data, delay=0.01, slow=1)
    assert not failed
    assert bool(differences("lstm", shape, data)) == (mutate is not break_nothing)


@pytest.mark.parametrize(
    ("mutate", "is_found"),
    [
        (break_nothing, False),
        (break_flag_before_slot, True),
        (break_flag_before_dgates, True),
        # With h exchanged too, one slot does: whoever stores into it again has waited for an h that
        # everyone published after reading the slot. The next test has a cell without that wait.
        (break_turns_of_slots, False),
    ],
)
def test_a_broken_exchange_of_operands_is_found(mutate, is_found, monkeypatch):
    shape = SHAPES["two slices"]
    data = prepared("gru_reset_before", shape)
    mutate(monkeypatch)
    failed = run("gru_reset_before", shape, data, delay=0.02, slow=1)
    assert not failed
    assert bool(differences("gru_reset_before", shape, data)) == is_found


@pytest.mark.parametrize("mutate", [break_nothing, break_flag_before_slot, break_turns_of_slots])
def test_a_broken_exchange_of_operands_alone_is_found(mutate, dropped, monkeypatch):
    """Where h itself goes round nowhere, beside results of the same launch unbroken."""
    shape = SHAPES["two slices"]
    data = prepared(dropped, shape)
    broken = shared({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in data.items()})
    broken["outs"] = shared([out.clone() for out in data["outs"]])
    aux = shared((torch.rand(shape.B, shape.H) > 0.3) / 0.7)
    assert not run(dropped, shape, data, aux=aux)
    mutate(monkeypatch)
    assert not run(dropped, shape, broken, aux=aux, delay=0.05, slow=1)
    is_right = torch.equal(data["outs"][0], broken["outs"][0])
    assert is_right == (mutate is break_nothing)


def test_counters_that_were_not_cleared_are_found():
    shape = SHAPES["two slices"]
    used = [workspace("lstm", shape, torch.empty(0)) for _ in range(2)]
    assert not run("lstm", shape, prepared("lstm", shape), works=used)
    data = prepared("lstm", shape)
    assert not run("lstm", shape, data, works=used, delay=0.01, slow=1)
    assert differences("lstm", shape, data)


# A cell of which not h but an operand of its own is multiplied, as under recurrent dropout.


@triton.jit
def masked_operand(PHASE: tl.constexpr, ctx, gx, gh, state):
    aux_ptr, _, offs_b, mask_b, H, cols = ctx
    ptrs = aux_ptr + offs_b[:, None] * H + cols[0][None, :]
    mask = tl.load(ptrs, mask=mask_b[:, None] & (cols[0] < H)[None, :], other=0.0)
    return (pick(state, 0)[0] * mask,)


@triton.jit
def masked_fold(ctx, d_state, du):
    return ((d_state[0][0] + masked_operand(0, ctx, (), (), (du,))[0],),)


@pytest.fixture
def dropped(monkeypatch):
    """h' = tanh(gx + W (m * h) + b): the operand goes round through slots, and h through none."""
    like = cells.CELLS["rnn_tanh"]
    spec = SPECS["rnn_tanh"].__class__(1, 1, 0, ((0,),), ((0,),), (0,), operands=("m*h",))
    monkeypatch.setitem(SPECS, "dropped", spec)
    monkeypatch.setitem(
        cells.CELLS,
        "dropped",
        cells.Cell(spec, masked_operand, like.forward, like.adjoint, masked_fold),
    )
    return "dropped"


def test_an_operand_that_is_not_h(dropped):
    shape = SHAPES["three slices, the last one not full"]
    data = prepared(dropped, shape)
    aux = shared((torch.rand(shape.B, shape.H) > 0.3) / 0.7)
    assert not run(dropped, shape, data, aux=aux)

    results = {}
    for name, dtype in (("ref", torch.float32), ("truth", torch.float64)):
        gx, h_0 = (data[key][0].to(dtype).requires_grad_() for key in ("gx", "h_0"))
        w, h, hs = data["weights"][0], h_0, []
        for t in range(shape.T):
            h = torch.tanh(gx[t] + (aux.to(dtype) * h) @ w.w_hh.to(dtype).T + w.b_hh.to(dtype))
            hs.append(h)
        out = torch.stack(hs)
        cotangents = data["d_out"].to(dtype), data["d_h_n"][0].to(dtype)
        grads = torch.autograd.grad((out, h), (gx, h_0), cotangents)
        results[name] = out.detach(), *grads
    got = data["outs"][0], data["dgates"][0], data["d_h_0"][0]
    for name, *each in zip(("out", "d_gx", "d_h_0"), got, *results.values(), strict=True):
        assert_budget(name, *each)
