"""Every cell in every layout on every backend equals the same sequences run one by one.

The truth is torch.nn in fp64, one piece of one sequence at a time (``oracle.py``): outputs, states
and all gradients. Padding holds NaN, in the input and in the gradient that arrives.
"""

import copy
import pkgutil
from functools import partial

import pairs
import pytest
import torch
from mutants import ORIGIN_BUGS, resets_lost
from oracle import one_by_one
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import arguments
from fusedrnn.arguments import as_hx
from fusedrnn.kernels.rows import origins_of
from fusedrnn.testing import assert_budget

MODULES = {
    "lstm": lambda *a, **k: fusedrnn.LSTM(*a, **k),
    "gru": lambda *a, **k: fusedrnn.GRU(*a, **k),
    "gru_reset_before": lambda *a, **k: fusedrnn.GRU(*a, reset_after=False, **k),
    "rnn_tanh": lambda *a, **k: fusedrnn.RNN(*a, **k),
    "rnn_relu": lambda *a, **k: fusedrnn.RNN(*a, nonlinearity="relu", **k),
}
T, LENGTHS = 6, torch.tensor([4, 0, 6, 1, 5])
#: At the first step, in the middle, twice in a row, at the last step, and after the end.
RESET = torch.zeros(T, 5, dtype=torch.bool)
RESET[[0, 2, 3, 5], [0, 2, 2, 2]] = RESET[[4, 1, 5, 5], [4, 3, 0, 1]] = True
#: The options of a call in each layout; a packed or batch-first call gets its input in that form.
LAYOUTS = {
    "dense": {},
    "batch_first": {},
    "lengths": {"lengths": LENGTHS},
    "reset": {"reset": RESET},
    "both": {"lengths": LENGTHS, "reset": RESET},
    "packed": {"lengths": LENGTHS.clamp(min=1)},
}


def build(cell, layers=1, directions=1, dtype=torch.float64, I=3, H=5, **options):
    """Returns a fusedrnn module."""
    options |= {"num_layers": layers, "bidirectional": directions == 2}
    return MODULES[cell](I, H, dtype=dtype, **options)


def states_for(module, batch):
    """Returns random h_0 and, for an LSTM, c_0."""
    return tuple(pairs.leaves(pairs.states_for(module, batch)))


def with_nan_padding(x, lengths):
    if lengths is None:
        return x
    beyond = torch.arange(len(x)).unsqueeze(1) >= lengths
    return torch.where(beyond.unsqueeze(-1).to(x.device), torch.nan, x)


def runner(backend, form):
    """Returns ``run(module, x, hx)`` for time-major x in a layout."""
    options = LAYOUTS[form] if isinstance(form, str) else form
    lengths = options.get("lengths")

    def run(module, x, hx):
        with fusedrnn.use_backend(backend), fusedrnn.use_precision("ieee"):
            if form == "packed":
                packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
                output, final = module(packed, as_hx(hx))
                return pad_packed_sequence(output, total_length=len(x))[0], final
            if form == "batch_first":
                output, final = module(x.transpose(0, 1).contiguous(), as_hx(hx))
                return output.transpose(0, 1), final
            output, final = module(with_nan_padding(x, lengths), as_hx(hx), **options)
        if lengths is not None and output.requires_grad:
            output.register_hook(lambda grad: with_nan_padding(grad, lengths))
        return output, final

    return run


def oracle(form):
    options = LAYOUTS[form] if isinstance(form, str) else form
    return lambda module, x, hx: one_by_one(module, x, hx, **options)


def everything(run, module, x, hx, dtype):
    """Returns output, states and all gradients under one set of random cotangents, by name."""
    x = x.detach().to(dtype).requires_grad_()
    hx = tuple(state.detach().to(dtype).requires_grad_() for state in hx)
    results, named = pairs.leaves(run(module, x, hx)), dict(module.named_parameters())
    grads = pairs.gradients(results, (x, *hx, *named.values()))
    names = ["output", *("h_n", "c_n")[: len(hx)], "d_x", *("d_h_0", "d_c_0")[: len(hx)]]
    names += [f"d_{name}" for name in named]
    return {n: t.detach() for n, t in zip(names, (*results, *grads), strict=True)}


def check(module, form, backend, batch=5, steps=T, device="cpu"):
    """Compares in fp64 to the last digits, in other dtypes within the error budget."""
    dtype = module.weight_hh_l0.dtype
    given = torch.randn(steps, batch, module.input_size).to(dtype), states_for(module, batch)
    double = copy.deepcopy(module).double()
    truth = everything(oracle(form), double, *given, torch.float64)
    if dtype != torch.float64:
        ref = everything(oracle(form), module, *given, dtype)
    x, hx = given[0].to(device), tuple(state.to(device) for state in given[1])
    got = everything(runner(backend, form), module.to(device), x, hx, dtype)
    for name, want in truth.items():
        if dtype == torch.float64:
            found = got[name].cpu()
            torch.testing.assert_close(found, want, atol=1e-11, rtol=1e-10, msg=name)
        else:
            assert_budget(name, got[name].cpu(), ref[name], want)
    return got


every_cell = pytest.mark.parametrize("cell", MODULES)


@pytest.mark.parametrize("form", LAYOUTS)
@every_cell
def test_loop(cell, form):
    got = check(build(cell, 2, 2, batch_first=form == "batch_first"), form, "torch")
    if "lengths" in LAYOUTS[form]:
        beyond = torch.arange(T).unsqueeze(1) >= LAYOUTS[form]["lengths"]
        assert not got["output"][beyond].any()
        assert not got["d_x"][beyond].any()


@every_cell
def test_other_ways_of_the_loop(cell, monkeypatch):
    """In one direction, without biases, and with padding, as under a compiler."""
    check(build(cell), "both", "torch")
    check(build(cell, bias=False), "packed", "torch")
    if cell == "lstm":
        check(build(cell, 2, 2, proj_size=2), "both", "torch")
    keep_padding(monkeypatch)
    check(build(cell, 2, 2), "both", "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_cell
def test_loop_in_other_dtypes(cell, dtype):
    check(build(cell, 1, 2, dtype), "packed", "torch")


def keep_padding(monkeypatch):
    monkeypatch.setattr(arguments, "is_eager", lambda input: False)


@pytest.mark.parametrize(
    ("cell", "form"),
    [*((cell, "both") for cell in MODULES), ("lstm", "dense"), ("gru_reset_before", "packed")],
)
def test_resident_kernels(cell, form, device):
    """Both directions of one layer in fp32."""
    check(build(cell, 1, 2, torch.float32), form, "triton", device=device)


@pytest.mark.parametrize(
    ("cell", "form"), [("lstm", "packed"), ("gru", "both"), ("gru_reset_before", "packed")]
)
def test_stepwise_kernels(cell, form, device):
    """Stacked layers in fp64, which no other schedule takes."""
    check(build(cell, 2, 1), form, "triton", device=device)


def test_random_lengths_and_resets():
    """Draws cells, sizes, lengths and resets at random."""
    st = pytest.importorskip("hypothesis.strategies", reason="hypothesis draws the cases")
    from hypothesis import given, settings

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(data=st.data())
    def run(data):
        steps, batch = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
        form, row = {}, st.lists(st.booleans(), min_size=batch, max_size=batch)
        if data.draw(st.booleans()):
            lengths = st.lists(st.integers(0, steps), min_size=batch, max_size=batch)
            form["lengths"] = torch.tensor(data.draw(lengths))
        if data.draw(st.booleans()):
            resets = data.draw(st.lists(row, min_size=steps, max_size=steps))
            form["reset"] = torch.tensor(resets)
        torch.manual_seed(0)
        layers, directions = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
        bias = data.draw(st.booleans())
        module = build(data.draw(st.sampled_from(sorted(MODULES))), layers, directions, bias=bias)
        check(module, form, "torch", batch, steps)

    run()


@pytest.mark.parametrize(
    ("cell", "backend", "dtype"),
    [*((cell, "torch", torch.float32) for cell in MODULES), ("lstm", "triton", torch.float32),
     ("gru", "triton", torch.float64)],
)  # fmt: skip
def test_repeated_calls_and_those_that_save_nothing_give_the_same_bits(cell, backend, dtype):
    module = build(cell, 1, 2, dtype, H=16, bias=cell == "gru")
    given, run = (torch.randn(T, 5, 3).to(dtype), states_for(module, 5)), runner(backend, "both")
    first, second = (everything(run, module, *given, dtype) for _ in range(2))
    with torch.no_grad():
        bare = tree_leaves(run(module, *given))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], found) for name, found in zip(first, bare, strict=False))


# Planted bugs in the tables of rows: each must be found by the checks above.


@pytest.mark.parametrize("bug", ORIGIN_BUGS)
def test_bugs_in_the_table_are_found(bug, monkeypatch):
    keep_padding(monkeypatch)
    monkeypatch.setattr("fusedrnn.layout.origins_of", lambda *given: bug(origins_of(*given)))
    with pytest.raises(AssertionError):
        check(build("gru", 1, 2), "both", "torch")


#: By a function that is replaced: what replaces it, and the cell, directions and layout.
PLANTED = {
    "kernels.rows.origins_of": (
        lambda real, *given: resets_lost(real(*given)), "gru", 2, "both"
    ),
    "arguments.pack": (
        lambda real, *call: real(*call)._replace(sorted_indices=torch.arange(len(call[0]))),
        "lstm", 1, "lengths",
    ),
    "layer.without_padding": (lambda real, x, rows: x, "gru", 1, "both"),
    "grads.entering": (
        lambda real, rows, d, initial, left: torch.cat([initial, left[: -rows.B]]),
        "rnn_tanh", 1, "reset",
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLANTED)
def test_bugs_in_what_uses_the_table_are_found(place, monkeypatch):
    bug, cell, directions, form = PLANTED[place]
    real = pkgutil.resolve_name(f"fusedrnn.{place}")
    monkeypatch.setattr(f"fusedrnn.{place}", partial(bug, real))
    if place == "layer.without_padding":
        keep_padding(monkeypatch)
    with pytest.raises(AssertionError):
        check(build(cell, 1, directions), form, "torch")
