"""Schedule cooperative, each program in a process of its own, against the reference."""

import pytest
import torch
import triton.language as tl
from concurrency import run_concurrently, shared
from cooperative_setup import DELAY, check, launches, prepared, run, workspaces
from kernel_cases import Shape, assert_tf32, cooperative_plan, differences, results
from mutants import rewritten

import fusedrnn
from fusedrnn.kernels import cooperative, exchange, plan

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processes share the CPU's memory"),
    # Each case is several processes: no two of them at once on two cores.
    pytest.mark.xdist_group("processes"),
    pytest.mark.usefixtures("exact_products"),
]

SLICES = Shape(3, 3, 20)
LAYERS = Shape(2, 3, 20, L=2, masks=True)
BOTH = ("lstm", "gru_reset_before")  # two states; two exchanges a step
CASES = {
    "three slices, the last one not full": (BOTH, Shape(4, 2, 41)),
    "directions": (BOTH, Shape(3, 3, 20, D=2, bias=False)),
    "two batch tiles": (("gru_reset_before",), Shape(2, 17, 20)),
    "two batch tiles in two rounds": (BOTH, Shape(2, 17, 20, at_once=1)),
    "layers with dropout": (("lstm", "gru", "gru_reset_before", "rnn_tanh"), LAYERS),
    "four layers": (("lstm",), Shape(4, 3, 16, L=4)),
    "one step": (("gru",), Shape(1, 1, 17)),
    "directions, ragged": (BOTH, Shape(4, 5, 20, D=2, rows="ragged")),
    "layers, ragged": (("lstm",), Shape(4, 5, 20, L=2, masks=True, rows="ragged")),
    "two batch tiles, packed": (BOTH, Shape(3, 18, 41, 32, rows="packed")),
    "layers, packed": (("gru",), Shape(4, 5, 20, L=2, masks=True, rows="packed")),
    "eight units": (("lstm", "gru", "rnn_tanh"), Shape(3, 3, 8, 8)),
    "half of the weights in shared memory": (BOTH, Shape(2, 3, 72, 32, halved=True)),
    "two chunks of columns": (("gru_reset_before", "rnn_relu"), Shape(2, 2, 72, 32)),
}
RUNS = [(cell, name) for name, (cells, _) in CASES.items() for cell in cells]


@pytest.mark.parametrize(("cell", "name"), RUNS)
def test_equals_the_reference(cell, name):
    check(cell, CASES[name][1], seed=len(name))


def test_half_precision():
    """Operands and what is exchanged are rounded to fp16; the state stays in fp32."""
    check("lstm", LAYERS, torch.float16)


def test_operands_are_rounded_to_tf32(monkeypatch):
    """Also those that a layer reads from the rows of another."""
    monkeypatch.undo()
    data = prepared("gru", LAYERS)
    assert not run("gru", LAYERS, data)
    assert_tf32("gru", LAYERS, data)


def copied(data):
    """The same tensors in other memory; the directions of a layer have one output."""
    layers, grads = data
    out = {id(o): o.clone() for o in layers.out}

    def copy(tree):
        if isinstance(tree, torch.Tensor):
            return tree.clone()
        return tree if tree is None else tuple(map(copy, tree))

    fresh = layers._make(map(copy, layers))._replace(out=tuple(out[id(o)] for o in layers.out))
    return shared(data._replace(layers=fresh, grads=grads._make(map(copy, grads))))


def test_no_pattern_of_delays_changes_a_bit():
    """The order of every sum is fixed: results under other pauses are equal bit for bit."""
    first = prepared("gru", LAYERS)
    second = copied(first)
    assert not run("gru", LAYERS, first, seed=1, delay=0.004)
    assert not run("gru", LAYERS, second, seed=2, delay=0.0)
    one, other = (results("gru", LAYERS, data) for data in (first, second))
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(("cell", "at_once"), [("lstm", False), ("gru_reset_before", True)])
def test_two_calls(cell, at_once):
    """Back to back, where a process may be in the second call while another is still in the first.

    And at the same time, as on two streams, each with a workspace of its own.
    """
    datas = [prepared(cell, SLICES) for _ in range(2)]
    works = [workspaces(cell, SLICES, data) for data in datas]
    calls = [launches(cell, SLICES, *pair) for pair in zip(datas, works, strict=True)]

    def one_after_the_other():
        for both in calls:
            for call in both:
                call()

    for each in zip(*calls, strict=True) if at_once else [[one_after_the_other]]:
        assert not run_concurrently(each, SLICES.programs, delay=DELAY)
    for data in datas:
        assert not differences(cell, SLICES, data)


publish, wait = exchange.publish, exchange.wait


def publish_but_the_second(counter_ptr):
    if int(tl.program_id(0).handle.data.item()) != 1:
        publish(counter_ptr)


def test_a_lost_partner_is_an_error_and_no_hang(monkeypatch):
    """The wait ends with one clear sentence, and the next call is right."""
    data = prepared("lstm", SLICES)
    with monkeypatch.context() as lost:
        lost.setattr(exchange, "publish", publish_but_the_second)
        failed = run("lstm", SLICES, data, patience=50)
    assert failed
    assert all("a program waited in vain for its partners" in text for text in failed)
    assert not run("lstm", SLICES, data)
    assert not differences("lstm", SLICES, data)


# The protocol, broken in every way that a slip would break it.

PUBLISH = "exchange.publish(counter)\n"


def rewrite(patch, module, kernel, old, new):
    patch.setattr(module, kernel, rewritten(getattr(module, kernel), old, new))


def break_nothing(patch):
    """The harness itself: without a mutation nothing is found."""


def break_wait_dropped(patch):
    patch.setattr(exchange, "wait", lambda *args: None)


def break_counter_target(patch):
    patch.setattr(exchange, "wait", lambda counter, target, *args: wait(counter, target - 1, *args))


def break_flag_before_h(patch):
    slot = "exchange.slot_of(slots, published + P - 1, TILE)"
    put = f"exchange.put({slot}, program.cols, state[0], TILE)\n"
    between = (
        "        if TILE.L > 1:  # the layer above reads it\n"
        "            steps.store_h(layers, program, step, places[0], left, TILE)\n"
        "        "
    )
    old, new = put + between + PUBLISH, PUBLISH + between + put
    rewrite(patch, cooperative, "_cooperative_fwd_kernel", old, new)


def break_flag_before_operand(patch):
    put = "exchange.put(slot, program.cols, CELL.operand(p, gh, state, squash), TILE)\n"
    old, new = put + " " * 16 + PUBLISH, PUBLISH + " " * 16 + put
    rewrite(patch, cooperative, "_cooperative_fwd_kernel", old, new)


def break_flag_before_dgates(patch):
    loop, late = "for i in tl.static_range(len(CELL.phases[p])):\n", "if TILE.L == 1:\n"
    publish = PUBLISH + " " * 4
    rewrite(patch, cooperative, "_publish", publish + late, late)
    rewrite(patch, cooperative, "_publish", loop, publish + loop)


def break_parity(patch):
    patch.setattr(exchange, "slot_of", lambda slots, publication, TILE: slots)


def break_wait_for_the_layer_below(patch):
    wait = "exchange.wait(counter_below, partners * (published + P), patience)"
    rewrite(patch, cooperative, "_cooperative_fwd_kernel", wait, "pass")


def break_wait_for_the_layer_above(patch):
    per_step = "tl.where(program.z < LAST, partners * P, 0)"
    rewrite(patch, cooperative, "_cooperative_bwd_kernel", per_step, "0")


@pytest.mark.parametrize(
    ("cell", "shape", "mutate", "slow"),
    [
        ("lstm", LAYERS, break_nothing, 1),
        ("lstm", LAYERS, break_wait_dropped, 1),
        ("lstm", LAYERS, break_counter_target, 1),
        ("lstm", SLICES, break_flag_before_h, 1),
        ("lstm", SLICES, break_flag_before_dgates, 1),
        ("lstm", SLICES, break_parity, 1),
        ("lstm", LAYERS, break_wait_for_the_layer_below, 1),
        ("lstm", LAYERS, break_wait_for_the_layer_above, 1),
        ("gru_reset_before", SLICES, break_nothing, 1),
        ("gru_reset_before", SLICES, break_flag_before_operand, 1),
        ("gru_reset_before", SLICES, break_flag_before_dgates, 1),
    ],
)
def test_a_broken_protocol_is_found(cell, shape, mutate, slow, monkeypatch):
    mutate(monkeypatch)
    # One program lags, so that a program that does not wait for it reads what is not there yet. On
    # a busy machine the others may lag as well, so a mutant has several chances.
    for _ in range(1 if mutate is break_nothing else 8):
        data = prepared(cell, shape)
        assert not run(cell, shape, data, delay=0.02, slow=slow)
        if found := bool(differences(cell, shape, data)):
            break
    assert found == (mutate is not break_nothing)


def test_counters_that_were_not_cleared_are_found():
    data = prepared("lstm", SLICES)
    used = workspaces("lstm", SLICES, data)
    assert not run("lstm", SLICES, data, works=used)
    data = prepared("lstm", SLICES)
    assert not run("lstm", SLICES, data, works=used, delay=0.01, slow=1)
    assert differences("lstm", SLICES, data)


def one_slice(problem, chip):
    """A wavefront with one program a layer, which the interpreter can run one after the other."""
    return (cooperative_plan(Shape(1, 1, problem.hidden_size, L=problem.layers)),)


@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([3, 0, 2])}], ids=["", "lengths"])
@pytest.mark.parametrize("module", [fusedrnn.LSTM(3, 16, 3, dropout=0.4), fusedrnn.GRU(3, 16, 2)])
def test_a_wavefront_through_the_module(module, options):
    """The stack gives the launch its layers, which allocates its workspace."""
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)  # of the dropout masks
        x = torch.randn(3, 3, 3, requires_grad=True)
        with fusedrnn.use_backend(backend), plan.forced(one_slice):
            output, _ = module(x, **options)
            gradients = torch.autograd.grad(output.sin().sum(), (x, *module.parameters()))
        found.append((output, *gradients))
    for kernels, loop in zip(*found, strict=True):
        torch.testing.assert_close(kernels, loop, atol=1e-5, rtol=1e-5)
