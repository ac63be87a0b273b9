"""The stepwise schedule through its launchers, against the reference and an fp64 truth.

Run as a script, in a process without ``TRITON_INTERPRET``, it compiles what the launchers launch
for a GPU that is not there, and prints what each binary needs.
"""

import json
import math
import os

import pytest
import torch
import triton
import triton.language as tl

from fusedrnn.kernels import cells, spec, stepwise, stepwise_launch
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.common import tanh
from fusedrnn.kernels.rows import Rows
from fusedrnn.loop import loop_bwd, loop_fwd
from fusedrnn.testing import CASES, Case, assert_budget, error_budget

CELLS = tuple(spec.SPECS)
#: One tile and part of one, several of rows, several of units, and rows that are of one unit.
SOME = (CASES[0], CASES[1], CASES[9], CASES[10], CASES[12])
THREE_UNIT_TILES = Case(3, 5, 2, 130)
HALF = (torch.float16, torch.bfloat16)
PAIRS = [(case, dtype) for case in SOME for dtype in (torch.float32, torch.float64)]
PAIRS += [(case, dtype) for case in SOME[2:4] for dtype in HALF]
REFERENCE = loop_fwd, loop_bwd
STEPWISE = stepwise_launch.stepwise_fwd, stepwise_launch.stepwise_bwd


def make(cell, case, D, dtype, device="cpu", bias=True):
    """gx, weights, initial states, cotangents of out and of final states, all random."""
    counts, (T, B, _, H) = spec.SPECS[cell], case

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    def uniform(*shape):
        return ((torch.rand(*shape, dtype=torch.float64) * 2 - 1) / H**0.5).to(device, dtype)

    G = counts.gates
    weights = [(uniform(G * H, H), uniform(G * H) if bias else None) for _ in range(D)]
    states, finals = (
        [randn(D, B, H) for _ in range(counts.states)] + [None] * (2 - counts.states)
        for _ in range(2)
    )
    return randn(D, T, B, G * H), weights, states, randn(T, B, D * H), finals


def double(tree):
    if isinstance(tree, torch.Tensor):
        return tree.double()
    return tree if tree is None else type(tree)(map(double, tree))


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    else:
        for branch in tree or ():
            yield from leaves(branch)


def run(schedule, cell, inputs, saved=(), save=True, **aux):
    """Forward, and backward of ``saved`` if that is given; every tensor filled, by name."""
    forward, backward = schedule
    gx, weights, (h_0, c_0), d_out, (d_h_n, d_c_n) = inputs
    counts, (D, T, B, _), H = spec.SPECS[cell], gx.shape, h_0.shape[-1]
    weights = [spec.Weights(w_hh, w_hh, None, b_hh) for w_hh, b_hh in weights]
    # conftest.py has new_empty fill them with NaN.
    filled = {"out": gx.new_empty(T, B, D * H), "h_n": h_0.new_empty(D, B, H)}
    filled["c_n"] = None if c_0 is None else h_0.new_empty(D, B, H)
    filled["gates"] = gx.new_empty(D, T, B, counts.saved * H) if save else None
    filled["cs"] = gx.new_empty(D, T, B, H) if save and c_0 is not None else None
    rows = Rows(*gx.shape[1:3])
    forward(cell, gx.clone(), weights, h_0, c_0, *filled.values(), rows, **aux)
    if save:
        grads = {"dgates": gx.new_empty(D, T, B, counts.grad_tiles * H)}
        grads["d_h_0"] = h_0.new_empty(D, B, H)
        grads["d_c_0"] = None if c_0 is None else h_0.new_empty(D, B, H)
        saved = saved or (filled["out"], filled["gates"], filled["cs"])
        backward(
            cell, d_out, None, d_h_n, d_c_n, weights, h_0, c_0, *saved, *grads.values(), rows, **aux
        )  # fmt: skip
        filled |= grads
    return {name: tensor for name, tensor in filled.items() if tensor is not None}


def check(cell, case, D, dtype, device, bias=True):
    """All go backwards from what the schedule saved: ReLU's slope is 0 or 1 by rounding alone."""
    inputs = make(cell, case, D, dtype, device, bias)
    got = run(STEPWISE, cell, inputs)
    saved = [got.get(name) for name in ("out", "gates", "cs")]
    ref = run(REFERENCE, cell, inputs, saved)
    truth = run(REFERENCE, cell, double(inputs), double(saved))
    assert got.keys() == ref.keys() == truth.keys()
    for name in truth:
        if dtype == torch.float64:
            # The truth has an error of its own here, about which the budget knows nothing.
            budget = error_budget(name, got[name], ref[name], truth[name])
            assert budget.rms < 2e-15, budget
        else:
            assert_budget(name, got[name], ref[name], truth[name])


@pytest.mark.parametrize(
    ("case", "dtype"), PAIRS, ids=lambda value: getattr(value, "id", str(value))
)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_reference(cell, case, D, dtype, device):
    check(cell, case, D, dtype, device)


@pytest.mark.parametrize("cell", CELLS)
def test_several_tiles_of_units(cell, device):
    """And more units than one program of the resident schedule holds, without a bias."""
    check(cell, THREE_UNIT_TILES, 2, torch.float32, device, bias=False)


@pytest.mark.parametrize("cell", CELLS)
def test_bitwise_deterministic(cell, device):
    inputs = make(cell, CASES[10], 2, torch.float32, device)
    first, second = run(STEPWISE, cell, inputs), run(STEPWISE, cell, inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_are_left_alone(cell, device):
    inputs = make(cell, CASES[1], 2, torch.float32, device)
    copies = [tensor.clone() for tensor in leaves(inputs)]
    run(STEPWISE, cell, inputs)
    assert all(map(torch.equal, leaves(inputs), copies))


@pytest.mark.parametrize("cell", CELLS)
def test_no_output_gradient_is_a_gradient_of_zero(cell, device):
    *rest, d_out, finals = make(cell, CASES[1], 2, torch.float32, device)
    none = run(STEPWISE, cell, (*rest, None, finals))
    zero = run(STEPWISE, cell, (*rest, torch.zeros_like(d_out), finals))
    for name in zero:
        assert torch.equal(none[name], zero[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_saved(cell, device):
    inputs = make(cell, CASES[1], 2, torch.float16, device)
    whole, bare = run(STEPWISE, cell, inputs), run(STEPWISE, cell, inputs, save=False)
    assert {"out", "h_n"} <= bare.keys() <= {"out", "h_n", "c_n"}
    for name in bare:
        assert torch.equal(bare[name], whole[name]), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_small_steps_are_not_rounded_away(cell, dtype, device):
    """Sixteen additions to 1, each of a quarter of a unit in the last place of 16 bits.

    To h or c in the first sequence, and to its gradient in the second, where the cell stands still.
    """
    T, tiny, one = 16, torch.finfo(dtype).eps / 4, 20.0  # the sigmoid and tanh of 20 are 1
    if cell == "lstm":  # c' = c + g
        name, G, start = "c", 4, (1.0, 0.0)
        rows = (one, one, tiny, one), (one, one, 0.0, one)
    else:  # h' = h + (1 - z) (n - h), from -1 to n = 1
        name, G, start = "h", 3, (-1.0, 0.0)
        rows = (0.0, math.log(2 / tiny), one), (0.0, one, one)
    kwargs = {"dtype": dtype, "device": device}
    states, finals = (
        [torch.tensor(values, **kwargs).view(1, 2, 1)] * (1 + (cell == "lstm")) + [None]
        for values in (start, (1.0, 1.0))
    )
    gx = torch.tensor(rows, **kwargs).expand(1, T, 2, G).contiguous()
    weights = [(torch.zeros(G, 1, **kwargs), None)]
    inputs = gx, weights, states[:2], torch.full((T, 2, 1), tiny, **kwargs), finals[:2]

    got, truth = run(STEPWISE, cell, inputs), run(REFERENCE, cell, double(inputs))
    for result, sequence, before in ((f"{name}_n", 0, start[0]), (f"d_{name}_0", 1, 1.0)):
        want = truth[result][0, sequence].item()
        error = abs(got[result][0, sequence].item() - want)
        assert error < abs(want - before) / 4, result


#: The batch of the test below, for its cell has no other way to know it.
ROWS = tl.constexpr(9)


@triton.jit
def masked(ctx, tiles):
    aux_ptr, t, offs_b, mask_b, h, cols = ctx
    out = ()
    for j in tl.static_range(len(tiles)):
        ptrs = aux_ptr + (t * ROWS + offs_b)[:, None] * h + cols[j][None, :]
        mask = tl.load(ptrs, mask=mask_b[:, None] & (cols[j] < h)[None, :], other=0.0)
        out = out + (tiles[j] * mask,)
    return out


@triton.jit
def masked_operand(phase: tl.constexpr, ctx, gx, gh, state):
    return masked(ctx, cells._operand_h(phase, ctx, gx, gh, state))


@triton.jit
def masked_fold(ctx, d_state, du):
    return cells._fold_h(ctx, d_state, masked(ctx, du))


def test_a_cells_own_constants_reach_it_at_the_right_time(device, monkeypatch):
    """h' = tanh(gx + W (m_t h)): m differs in every step, sequence and unit."""
    plain = cells.CELLS["rnn_tanh"]
    cell = plain._replace(operand=masked_operand, fold=masked_fold)
    monkeypatch.setitem(cells.CELLS, "masked", cell)
    monkeypatch.setitem(spec.SPECS, "masked", plain.spec)
    case = Case(4, ROWS.value, 1, 70)
    inputs = make("rnn_tanh", case, 2, torch.float32, device)
    mask = torch.rand(case.T, case.B, case.H, device=device)
    got = run(STEPWISE, "masked", inputs, aux=mask)

    def expected(dtype):
        gx, ((w, b), (w_r, b_r)), (h_0, _), d_out, (d_h_n, _) = double(inputs)
        gx, w, b, w_r, b_r, h_0, d_out, d_h_n, m = (
            tensor.to(dtype) for tensor in (gx, w, b, w_r, b_r, h_0, d_out, d_h_n, mask)
        )
        leaves = gx.requires_grad_(), h_0.requires_grad_()
        columns, finals = [], []
        for d, (weight, bias) in enumerate(((w, b), (w_r, b_r))):
            h, hs = h_0[d], {}
            for t in range(case.T) if d == 0 else reversed(range(case.T)):
                h = hs[t] = (gx[d, t] + (m[t] * h) @ weight.T + bias).tanh()
            columns.append(torch.stack([hs[t] for t in range(case.T)]))
            finals.append(h)
        out, h_n = torch.cat(columns, -1), torch.stack(finals)
        return out, h_n, *torch.autograd.grad((out, h_n), leaves, (d_out, d_h_n))

    names = "out", "h_n", "dgates", "d_h_0"
    for name, ref, truth in zip(
        names, expected(torch.float32), expected(torch.float64), strict=True
    ):
        assert_budget(name, got[name], ref.detach(), truth.detach())


@triton.jit
def tanh_kernel(x_ptr, y_ptr, n, block: tl.constexpr):
    offs = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, tanh(x), mask=offs < n)


def test_tanh_in_fp64(device):
    """All the digits near zero, where a quotient of exponentials has none, and far from it."""
    x = torch.cat((torch.logspace(-300, 2.5, 3000), torch.linspace(0.5, 0.7, 1000))).double()
    x = torch.cat((x, -x, torch.zeros(1, dtype=x.dtype))).to(device)
    y = torch.empty_like(x)
    tanh_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), 1024)
    assert ((y - x.tanh()).abs() <= 6e-16 * x.tanh().abs()).all()


@pytest.mark.parametrize("variable", ["", "FUSEDRNN_TRITON_36"])
def test_compiles_for_hopper(variable):
    """Through the launchers; nothing spills, rows have 64-bit offsets, T and B are no constants."""
    from compile_all import run_script

    if variable and variable not in os.environ:
        pytest.skip(f"{variable} names no folder with this Triton; `make test` does")
    found = [
        json.loads(line)
        for line in run_script("test_stepwise.py", os.environ.get(variable)).splitlines()
    ]
    faulty = [usage for usage in found if usage["spills"] or usage["narrow"]]
    assert not faulty
    launches = {"lstm": 2, "gru_reset_before": 3}  # different ones, forward and backward alike
    expected = 2 * sum(launches.values()) * len(COMPILED_DTYPES)
    assert len({usage["binary"] for usage in found}) == expected
    assert {usage["name"] for usage in found} == {"_stepwise_fwd_kernel", "_stepwise_bwd_kernel"}


COMPILED_DTYPES = (torch.float32, torch.float16, torch.float64)


def main() -> None:
    """Compiles the launchers' launches; prints one JSON object for each."""
    import compiling
    from launching import Driver

    from fusedrnn.kernels import offline

    triton.runtime.driver.set_active(Driver())
    compiled: list = []
    for kernel in (stepwise._stepwise_fwd_kernel, stepwise._stepwise_bwd_kernel):
        kernel.run = lambda *args, run=kernel.run, **kwargs: compiled.append(
            run(*args, **{**kwargs, "warmup": True})
        )
    for cell in ("lstm", "gru_reset_before"):
        for dtype in COMPILED_DTYPES:
            for case in (Case(2, 3, 1, 48), Case(1, 1, 1, 48)):  # other T and B: no other binary
                run(STEPWISE, cell, make(cell, case, 2, dtype))
    for number, binary in {id(binary): binary for binary in compiled}.items():
        usage = offline.figures(binary)
        usage["narrow"] = compiling.narrow_rows(binary, planning.stepwise_tiles(48).block_b)
        print(json.dumps({"name": binary.metadata.name, "binary": number, **usage}))  # noqa: T201


if __name__ == "__main__":
    main()
