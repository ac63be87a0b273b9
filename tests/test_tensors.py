"""The tensors of a launch are as ``tensors.py`` describes them."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import Shape, cooperative_plan
from test_equivalence import build
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import layer
from fusedrnn.kernels import plan
from fusedrnn.kernels.spec import SPECS

T, B, H, LENGTHS = 4, 3, 5, torch.tensor([4, 2, 1])
NO_C = {"c_0", "c_n", "cs"}


def check(record, absent, **sizes):
    """Compares fields with the comments behind them, as ``# Z of [R, D*H]``."""
    lines = re.findall(r"^    (\w+): .*# (.*)", inspect.getsource(type(record)), re.MULTILINE)
    assert [name for name, _ in lines] == list(record._fields)
    assert {name for name, value in record._asdict().items() if value is None} == absent
    for (name, line), value in zip(lines, record, strict=True):
        shapes = [eval(f"({text},)", sizes) for text in re.findall(r"\[(.*?)\]", line)]
        is_tuple = line.startswith("Z of")
        assert isinstance(value, tuple) == (is_tuple and value is not None)
        tensors = [] if value is None else value if is_tuple else [value]
        assert len(tensors) in (0, sizes["Z"] if is_tuple else 1)
        assert all(tuple(tensor.shape) in shapes for tensor in tensors), name
        assert all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize(
    ("cell", "L", "D", "form", "absent"),
    [
        ("lstm", 2, 1, "dense", {"origins", "starts"}),
        ("gru", 1, 2, "lengths", {"masks", "starts"} | NO_C),
        ("rnn_tanh", 1, 1, "packed", {"masks", "b_ih", "b_hh"} | NO_C),
    ],
)
def test_tensors_have_the_documented_shapes(cell, L, D, form, absent, device, monkeypatch):
    given, R, spec = [], T * B, SPECS[cell]
    schedule = SimpleNamespace(forward=lambda *call: given.extend(call[2:-1]))
    schedule.backward = schedule.forward
    monkeypatch.setattr(layer, "_schedule", lambda name: schedule)
    options = {"dropout": 0.5 * (L > 1), "bias": form != "packed"}
    module = build(cell, L, D, torch.float32, I=H, H=H, **options).to(device)
    x = torch.randn(T, B, H, device=device)
    if form == "packed":
        x, R = pack_padded_sequence(x, LENGTHS), int(LENGTHS.sum())
    planned = (cooperative_plan(Shape(T, B, H, L=L)),)  # all layers in one launch
    with fusedrnn.use_backend("triton"), plan.forced(lambda problem, chip: planned):
        _, state = module(x, **({"lengths": LENGTHS} if form == "lengths" else {}))
        sum(tensor.sum() for tensor in state).backward()
    sizes = {"T": T, "B": B, "H": H, "I": H, "D": D, "R": R, "Z": L * D}
    sizes |= {"G": spec.gates, "S": spec.saved, "N": spec.grad_tiles}
    forward, backward, grads = given
    unread = {"w_ih", "b_ih", "masks"} if L == 1 else set()
    check(forward, absent | unread, **sizes)
    check(backward, absent | unread | {"gx", "b_ih", "b_hh", "h_n", "c_n"}, **sizes)
    check(grads, absent & {"c_n", "c_0"} | {"out", "cs"}, **sizes)
