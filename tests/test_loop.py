"""The loop over time in plain torch, against one sequence at a time under autograd in fp64.

The oracle knows nothing of rows: it walks each sequence's own steps in the order of the direction
with the differentiable step of ``reference.py``. Every buffer given to the loop starts as NaN.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import loop, loop_cells, reference
from fusedrnn.kernels.rows import Rows, origins_of, packed_rows
from fusedrnn.kernels.spec import SPECS, Weights
from fusedrnn.loop import loop_bwd, loop_fwd
from fusedrnn.steps import Steps
from fusedrnn.testing import assert_budget

CPU = torch.device("cpu")
T, B, H, P = 7, 5, 6, 4
#: By falling length, as packed input has them; the fourth is as long as the fifth.
LENGTHS = (7, 5, 4, 2, 2)
LAYOUTS = ("dense", "packed", "packed-resets", "ragged", "ragged-resets", "resets")
NAN = float("nan")


def _case(
    cell: str, D: int, layout: str, *, dtype=torch.float64, proj=False, T=T, B=B, bias=True
) -> SimpleNamespace:
    """Random arguments, the rows of the layout, and per sequence what the oracle needs of them."""
    spec, p = SPECS[cell], P if proj else H

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).mul_(0.5).to(dtype)

    ragged, packed = layout.startswith("ragged"), layout.startswith("packed")
    lengths = torch.tensor(LENGTHS if ragged or packed else [T] * B)
    if ragged:  # in no order, and one of them without a step
        lengths = lengths[torch.tensor([2, 0, 4, 1, 3])]
        lengths[3] = 0
    reset = torch.rand(T, B) < 0.4 if layout.endswith("resets") else None
    if reset is not None:
        reset[0, 0] = True  # a sequence may begin anew at its first step
    if packed:
        sizes = (lengths > torch.arange(T).unsqueeze(1)).sum(1)
        rows = packed_rows(sizes, D, CPU, reset)
        if reset is None:
            rows = rows._replace(origins=None)
        row = [[int(sizes[:t].sum()) + b for b in range(B)] for t in range(T)]
    else:
        origins = None if layout == "dense" else origins_of(T, B, D, CPU, lengths, reset)
        rows = Rows(T, B, origins)
        row = [[t * B + b for b in range(B)] for t in range(T)]
    total, G = rows.total, spec.gates
    weights = []
    for _ in range(D):
        b_hh = rand(G * H) if bias else None
        weights.append(Weights(rand(0), rand(G * H, p), None, b_hh, rand(p, H) if proj else None))
    has_c = spec.states == 2
    case = SimpleNamespace(
        cell=cell, spec=spec, D=D, T=T, B=B, P=p, R=total, rows=rows, row=row, weights=weights,
        lengths=lengths.tolist(), reset=reset, dtype=dtype,
        gx=rand(D, total, G * H), h_0=rand(D, B, p), c_0=rand(D, B, H) if has_c else None,
        d_out=rand(total, D * p), d_cs=rand(D, total, H) if has_c else None,
        d_h_n=rand(D, B, p), d_c_n=rand(D, B, H) if has_c else None,
    )  # fmt: skip
    case.skipped = torch.zeros(total, dtype=torch.bool)
    if ragged:
        case.skipped = (torch.arange(T).unsqueeze(1) >= lengths).flatten()
    return case


def _run(case: SimpleNamespace, save: bool = True, backward: bool = True) -> dict[str, Tensor]:
    """The loop on buffers of NaN, with NaN in every row that no step has."""
    dtype, D, B, total = case.dtype, case.D, case.B, case.R

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, NAN, dtype=dtype)

    has_c = case.c_0 is not None
    poisoned = {}
    for name in ("gx", "d_out", "d_cs"):
        if (x := getattr(case, name)) is not None:
            poisoned[name] = x.clone()
            poisoned[name][..., case.skipped, :] = NAN
    gates = nan(D, total, case.spec.saved * H) if save else None
    cs = nan(D, total, H) if save and has_c else None
    got = {"out": nan(total, D * case.P), "h_n": nan(D, B, case.P)}
    if has_c:
        got["c_n"] = nan(D, B, H)
    initial = (case.h_0, case.c_0)
    final = (got["out"], got["h_n"], got.get("c_n"))
    loop_fwd(case.cell, poisoned.pop("gx"), case.weights, *initial, *final, gates, cs, case.rows)
    if not backward:
        return got
    got |= {"d_gates": nan(D, total, case.spec.grad_tiles * H), "d_h_0": nan(D, B, case.P)}
    if has_c:
        got["d_c_0"] = nan(D, B, H)
    given = (poisoned.get("d_out"), poisoned.get("d_cs"), case.d_h_n, case.d_c_n, case.weights)
    saved = (*initial, got["out"], gates, cs)
    states = (case.h_0, case.c_0, case.d_h_n, case.d_c_n, *poisoned.values(), got["out"], gates, cs)
    copies = [None if x is None else x.clone() for x in states]
    to = (got["d_gates"], got["d_h_0"], got.get("d_c_0"))
    loop_bwd(case.cell, *given, *saved, *to, case.rows)
    for x, copy in zip(states, copies, strict=True):
        if x is not None and copy is not None:
            torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    if has_c and cs is not None:
        got["cs"] = cs
    assert gates is not None
    got["gates"] = gates
    got["d_gx"] = got["d_gates"][..., : case.spec.gates * H]
    for d, w in enumerate(case.weights):
        if w.b_hh is not None:  # the gradients of the recurrent pre-activations
            tiles = got["d_gates"][d].split(H, 1)
            got[f"d_b_hh {d}"] = torch.cat([tiles[k].sum(0) for k in case.spec.recurrent])
    if case.skipped.any():
        for name in {"out", "cs", "gates", "d_gates"} & set(got):
            assert (got[name][..., case.skipped, :] == 0).all(), name
    return got


def _oracle(case: SimpleNamespace, dtype=torch.float64) -> dict[str, Tensor]:
    """One sequence after the other, one step after the other, and autograd."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).clone().requires_grad_()

    step = reference._CELLS[case.cell]
    weights = [Weights(*map(leaf, w)) for w in case.weights]
    gx, h_0, c_0 = leaf(case.gx), leaf(case.h_0), leaf(case.c_0)
    assert gx is not None
    assert h_0 is not None
    hs, cs, h_n, c_n = {}, {}, {}, {}
    for d, b in product(range(case.D), range(case.B)):
        h, c, order = h_0[d, b], None if c_0 is None else c_0[d, b], range(case.lengths[b])
        for t in order if d == 0 else order[::-1]:
            first = t if d == 0 else t + 1  # a reset parts this step from the one before it
            if case.reset is not None and first < case.lengths[b] and case.reset[first, b]:
                h, c = torch.zeros_like(h), None if c is None else torch.zeros_like(c)
            h, c, _ = step(gx[d, case.row[t][b]], h, c, weights[d])
            if weights[d].w_hr is not None:
                h = weights[d].w_hr @ h
            hs[d, case.row[t][b]], cs[d, case.row[t][b]] = h, c
        h_n[d, b], c_n[d, b] = h, c

    def table(values: dict, n: int, width: int) -> Tensor:
        zero = gx.new_zeros(width)
        rows = [values.get((d, r), zero) for d in range(case.D) for r in range(n)]
        return torch.stack(rows).view(case.D, n, width)

    out = table(hs, case.R, case.P)
    want = {"out": out.transpose(0, 1).flatten(1), "h_n": table(h_n, case.B, case.P)}
    ends = [(want["out"], case.d_out), (want["h_n"], case.d_h_n)]
    if c_0 is not None:
        want |= {"c_n": table(c_n, case.B, H), "cs": table(cs, case.R, H)}
        ends += [(want["c_n"], case.d_c_n), (want["cs"], case.d_cs)]
    ends = [(y, d_y.to(dtype)) for y, d_y in ends if d_y is not None]
    total = sum((y * d_y).sum() for y, d_y in ends)
    leaves = {"d_gx": gx, "d_h_0": h_0, "d_c_0": c_0}
    leaves |= {f"d_b_hh {d}": w.b_hh for d, w in enumerate(weights)}
    leaves = {name: x for name, x in leaves.items() if x is not None}
    want |= dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    return {name: x.detach() for name, x in want.items()}


def _check(case: SimpleNamespace, got: dict[str, Tensor]) -> None:
    for name, want in _oracle(case).items():
        torch.testing.assert_close(
            got[name], want, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", SPECS)
def test_agrees_with_one_sequence_at_a_time(cell, D, layout, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK", 11 * H)  # two or more steps, so chunks have borders
    case = _case(cell, D, layout)
    _check(case, _run(case))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_projection(layout):
    case = _case("lstm", 2, layout, proj=True)
    _check(case, _run(case))


@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 3), (4, 1)])
def test_one_step_and_one_sequence(cell, T, B):
    case = _case(cell, 2, "dense", T=T, B=B)
    _check(case, _run(case))


@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize("layout", ["packed", "ragged"])
def test_without_biases_and_gradients_of_the_steps(cell, layout):
    case = _case(cell, 2, layout, bias=False)
    case.d_out = case.d_cs = None
    _check(case, _run(case))


@pytest.mark.parametrize("layout", ["packed-resets", "ragged-resets"])
@pytest.mark.parametrize("cell", SPECS)
def test_saving_nothing_changes_nothing(cell, layout):
    """Not a bit; but of a GRU's products, which have other columns then."""
    case = _case(cell, 2, layout)
    saving = _run(case)
    closeness = 1e-14 if cell == "gru" else 0.0
    for name, x in _run(case, save=False, backward=False).items():
        torch.testing.assert_close(x, saving[name], rtol=closeness, atol=closeness)


@pytest.mark.parametrize("layout", ["packed-resets", "ragged-resets", "resets"])
@pytest.mark.parametrize("bad", [float("inf"), NAN])
@pytest.mark.parametrize("cell", SPECS)
def test_a_reset_stops_inf_and_nan(cell, layout, bad):
    """A broken step before a reset spoils nothing behind it, a broken gradient nothing before."""
    case = _case(cell, 1, layout)
    case.reset[:] = False
    case.reset[2] = True
    lengths = torch.tensor(case.lengths)
    if case.rows.sizes is None:
        case.rows = Rows(T, B, origins_of(T, B, 1, CPU, lengths, case.reset))
    else:
        case.rows = packed_rows(case.rows.sizes, 1, CPU, case.reset)
    rows = [case.row[t][b] for b in range(B) for t in range(case.lengths[b])]
    later = [case.row[t][b] for b in range(B) for t in range(2, case.lengths[b])]
    earlier = [case.row[t][b] for b in range(B) for t in range(min(2, case.lengths[b]))]
    good = _run(case)
    case.h_0[:] = bad
    got = _run(case)
    for name in ("out", "d_gates", *(("cs",) if case.c_0 is not None else ())):
        assert torch.equal(got[name][..., later, :], good[name][..., later, :]), name
    case = SimpleNamespace(**(vars(case) | {"h_0": torch.zeros_like(case.h_0)}))
    case.d_out = case.d_out.clone()
    good = _run(case)
    case.d_out[case.row[2][int(lengths.argmax())]] = bad
    got = _run(case)
    assert not torch.equal(got["d_gates"][:, rows], good["d_gates"][:, rows])
    assert torch.equal(got["d_gates"][:, earlier], good["d_gates"][:, earlier])
    assert torch.equal(got["d_h_0"], good["d_h_0"])


def test_dense_arrays_by_time_and_sequence():
    case = _case("lstm", 2, "dense")
    flat = _run(case)
    by_time = (case.D, T, B, -1)
    out, cs = torch.full((T, B, 2 * H), NAN).double(), torch.full((2, T, B, H), NAN).double()
    gates = torch.full((2, T, B, 4 * H), NAN).double()
    dgates, h, c = gates.clone(), torch.empty_like(case.h_0), torch.empty_like(case.c_0)
    given = (case.weights, case.h_0, case.c_0)
    loop_fwd("lstm", case.gx.clone().view(by_time), *given, out, h, c, gates, cs, case.rows)
    d_out, d_cs = case.d_out.view(T, B, -1), case.d_cs.view(by_time)
    arriving = (d_out, d_cs, case.d_h_n, case.d_c_n)
    loop_bwd("lstm", *arriving, *given, out, gates, cs, dgates, h, c, case.rows)
    assert torch.equal(out.flatten(0, 1), flat["out"])
    assert torch.equal(dgates.flatten(1, 2), flat["d_gates"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_masks_without_a_look_at_them(cell, layout, monkeypatch):
    """On CUDA every step is masked, since a look at the values would wait; so does this."""
    case = _case(cell, 2, layout)
    looked = _run(case)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for name, x in _run(case).items():
        assert torch.equal(x, looked[name]), name


@pytest.mark.parametrize("cell", [cell for cell, spec in SPECS.items() if spec.saved == spec.gates])
def test_the_input_part_may_stand_in_the_gates(cell):
    case = _case(cell, 2, "packed")
    apart = _run(case)
    together = {name: torch.full_like(apart[name], NAN) for name in apart}
    gates = case.gx.clone()
    cs = torch.full((2, case.R, H), NAN).double() if case.c_0 is not None else None
    final = (together["out"], together["h_n"], together.get("c_n"))
    loop_fwd(cell, gates, case.weights, case.h_0, case.c_0, *final, gates, cs, case.rows)
    assert torch.equal(gates, apart["gates"])
    assert torch.equal(together["out"], apart["out"])
    assert torch.equal(together["h_n"], apart["h_n"])


@pytest.mark.parametrize("d", [0, 1])
def test_parts_hold_all_rows_once_and_few_at_a_time(d):
    steps = Steps(_case("gru", 2, "packed").rows, d)
    parts = steps.cut(steps.whole, 6)
    found = sorted(parts, key=lambda part: part.times.start)
    assert found == (parts[::-1] if d == 0 else parts)
    assert [t for part in found for t in part.times] == list(range(T))
    assert [r for part in found for r in range(part.rows.start, part.rows.stop)] == list(range(20))
    assert all(len(part.times) == 1 or part.total <= 6 for part in found)
    assert all(sum(part.sizes) == part.total for part in found)
    assert len(found) == 4  # of 5, 5, 3 + 3, 2 + 1 + 1 rows


@pytest.mark.parametrize("up_to", [0, 64])
@pytest.mark.parametrize("layout", ["dense", "packed", "ragged-resets"])
@pytest.mark.parametrize("cell", SPECS)
def test_gates_that_nobody_saves_are_the_same(cell, layout, up_to, monkeypatch):
    """Where a GRU multiplies all tiles at once, and where it does not."""
    monkeypatch.setattr(loop_cells, "_ONE_PRODUCT", up_to)
    case = _case(cell, 2, layout)
    saved, unsaved = _run(case, backward=False), _run(case, save=False, backward=False)
    for name in ("out", "h_n", *(["c_n"] if case.c_0 is not None else [])):
        torch.testing.assert_close(unsaved[name], saved[name], rtol=1e-14, atol=1e-14)


def test_a_product_is_added_where_gx_lies(monkeypatch):
    """To the very tensor: to another view of the same memory torch copies it first."""
    places, addmm = [], torch.addmm

    def spy(gx, *factors, out):
        places.append(out is gx)
        return addmm(gx, *factors, out=out)

    monkeypatch.setattr(torch, "addmm", spy)
    _run(_case("lstm", 1, "dense"), backward=False)
    assert places == [True] * T


@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_segments_add_up(cell, layout, monkeypatch):
    """What is taken of each segment is all there is, whatever their size, once and in order."""
    case, whole, found = _case(cell, 2, layout), {}, {}
    whole = _run(case)
    monkeypatch.setattr(loop, "_rows_of_segment", lambda *_: 7)
    monkeypatch.setattr(loop, "CHUNK", 4 * H)
    backward = loop.loop_bwd

    def taking(*args):
        *given, dgates, d_h_0, d_c_0, rows = args

        def take(segment):
            found.setdefault(segment.d, []).append(segment.part.times)
            dgates[segment.d][segment.part.rows] = segment.dgates
            entering = torch.cat(segment.entering())
            assert entering.shape == (segment.part.total, case.P)

        return backward(*given, None, d_h_0, d_c_0, rows, take=take)

    monkeypatch.setitem(globals(), "loop_bwd", taking)
    parts = _run(case)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-14, atol=1e-14)
    assert len(found[0]) > 2
    for d, order in ((0, reversed(found[0])), (1, found[1])):
        assert [t for times in order for t in times] == list(range(T)), d


@pytest.mark.parametrize("cell", SPECS)
def test_no_sequences(cell):
    case = _case(cell, 2, "dense", B=0)
    assert all(x.isfinite().all() for x in _run(case).values())


def test_sequences_without_any_step_keep_their_state():
    case = _case("lstm", 2, "packed")
    case.B, case.lengths = B + 2, [*case.lengths, 0, 0]
    case.rows = packed_rows(case.rows.sizes, 2, CPU, None, B + 2)
    for name in ("h_0", "c_0", "d_h_n", "d_c_n"):
        setattr(case, name, torch.randn(2, B + 2, H, dtype=torch.float64))
    _check(case, _run(case))


@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_err_no_more_than_autograd(cell, dtype):
    case = _case(cell, 2, "packed-resets", dtype=dtype)
    got, ref, truth = _run(case), _oracle(case, dtype), _oracle(case)
    for name, want in truth.items():
        assert got[name].dtype == dtype
        assert_budget(name, got[name], ref[name], want)


def test_small_signals_keep_their_relative_precision():
    """What a tanh made of a sigmoid would lose: 1e-4 with an absolute error of 1e-7."""
    case = _case("lstm", 1, "dense", dtype=torch.float32, bias=False)
    for x in (case.gx, case.h_0, case.c_0):
        x *= 1e-5
    got, ref, truth = _run(case), _oracle(case, torch.float32), _oracle(case)
    for name in ("out", "cs"):
        assert_budget(name, got[name], ref[name], truth[name])


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_sums_over_many_rows_are_as_exact_as_torchs(kind, layout):
    """2400 to 3200 rows: one GEMM over all of them was up to 2.9 times the error budget."""
    torch.manual_seed(0)
    modules = [getattr(torch.nn, kind)(8, 8, 2, bidirectional=True).double() for _ in range(2)]
    modules += [getattr(fusedrnn, kind)(8, 8, 2, bidirectional=True)]
    modules[1].load_state_dict(modules[2].state_dict())
    modules[0].load_state_dict(modules[2].state_dict())
    modules[1].float()
    x, lengths = torch.randn(200, 16, 8), torch.randint(100, 201, (16,))
    found = []
    for module in modules:
        given = x.to(module.weight_hh_l0.dtype)
        if layout == "packed":
            given = pack_padded_sequence(given, lengths, enforce_sorted=False)
        with fusedrnn.use_backend("torch"):
            output = module(given)[0]
        data = output if layout == "dense" else output.data
        weights = dict(module.named_parameters())
        cotangent = torch.sin(torch.arange(data.numel())).view_as(data).to(data.dtype)
        grads = torch.autograd.grad(data, list(weights.values()), cotangent)
        found.append(dict(zip(weights, grads, strict=True)))
    truth, theirs, ours = found
    for name, want in truth.items():
        assert_budget(name, ours[name], theirs[name], want)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_gradient_of_h_0_of_one_sequence_is_as_exact_as_torchs(kind):
    """Whose products are of a vector, for which MKL adds term by term to what is there already: the
    GRU's dh z + dgates W_hh erred 4.6 times as much as torch.nn."""
    torch.manual_seed(0)
    theirs, ours = (getattr(library, kind)(256, 256) for library in (torch.nn, fusedrnn))
    truth = getattr(torch.nn, kind)(256, 256).double()
    for module in (theirs, truth):
        module.load_state_dict(ours.state_dict())
    x, h_0 = torch.randn(64, 1, 256), torch.randn(1, 1, 256)
    cotangent = torch.randn(64, 1, 256)
    found = []
    for module in (truth, theirs, ours):
        dtype = module.weight_hh_l0.dtype
        h = h_0.to(dtype).requires_grad_()
        with fusedrnn.use_backend("torch"):
            output = module(x.to(dtype), (h, torch.zeros_like(h)) if kind == "LSTM" else h)[0]
        found += torch.autograd.grad(output, h, cotangent.to(dtype))
    of_theirs, of_ours = ((grad - found[0]).square().mean().sqrt() for grad in found[1:])
    assert of_ours < 2 * of_theirs
