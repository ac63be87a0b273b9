"""Bad input: the exception type of torch's module, and a sentence that names the argument.

Every case runs both modules. Cases that torch lets pass, or crashes on far from the cause, stand
apart with the type that its other modules raise.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn

zeros = torch.zeros


def wrap(name, h):
    """hx made of h alone, as the module wants it."""
    return (h, h.clone()) if name.startswith("LSTM") else h


def packed(*shapes, dtype=torch.float32):
    return pack_sequence([zeros(shape, dtype=dtype) for shape in shapes], enforce_sorted=False)


# Each entry: a name, the arguments of the call as a function of the module's name, and what the
# message must say. The modules are (3, 4, num_layers=2).
SEQUENCE = {
    "input a list": (lambda n: ([1, 2],), "input is a list; expected a tensor"),
    "input None": (lambda n: (None,), "input is a NoneType"),
    "input 0-D": (lambda n: (zeros(()),), "input is 0-D; expected 2-D or 3-D"),
    "input 1-D": (lambda n: (zeros(3),), "input is 1-D"),
    "input 4-D": (lambda n: (zeros(1, 2, 2, 3),), "input is 4-D"),
    "features": (lambda n: (zeros(5, 2, 7),), "input has 7 features .* input_size, 3"),
    "features unbatched": (lambda n: (zeros(5, 7),), "input has 7 features"),
    "dtype": (lambda n: (zeros(5, 2, 3).double(),), "input is torch.float64, the weights are"),
    "integer": (lambda n: (zeros(5, 2, 3).long(),), "input is torch.int64"),
    "device": (lambda n: (zeros(5, 2, 3, device="meta"),), r"params\[0\] is on cpu; expected meta"),
    "no step": (lambda n: (zeros(0, 2, 3),), "input has no time step"),
    "no step unbatched": (lambda n: (zeros(0, 3),), "no time step"),
    "no step no batch": (lambda n: (zeros(0, 0, 3),), "no time step"),
    "hx 2-D": (lambda n: (zeros(5, 2, 3), wrap(n, zeros(2, 4))), r"hx.* \(2, 4\); .* \(2, 2, 4\)"),
    "hx 4-D": (lambda n: (zeros(5, 2, 3), wrap(n, zeros(1, 2, 2, 4))), "expected"),
    "hx 3-D unbatched": (
        lambda n: (zeros(5, 3), wrap(n, zeros(2, 1, 4))),
        r"hx.* has shape \(2, 1, 4\); expected \(2, 4\)",
    ),
    "hx layers": (lambda n: (zeros(5, 2, 3), wrap(n, zeros(1, 2, 4))), r"expected \(2, 2, 4\)"),
    "hx batch": (lambda n: (zeros(5, 2, 3), wrap(n, zeros(2, 3, 4))), r"expected \(2, 2, 4\)"),
    "hx columns": (lambda n: (zeros(5, 2, 3), wrap(n, zeros(2, 2, 5))), r"expected \(2, 2, 4\)"),
    "hx dtype": (
        lambda n: (zeros(5, 2, 3), wrap(n, zeros(2, 2, 4).double())),
        "hx.* is torch.float64; expected torch.float32",
    ),
    "hx device": (
        lambda n: (zeros(5, 2, 3), wrap(n, zeros(2, 2, 4, device="meta"))),
        "hx.* is on meta; expected cpu",
    ),
    "hx a number": (lambda n: (zeros(5, 2, 3), 3), "hx is a int; expected a t"),
    "hx empty": (lambda n: (zeros(5, 2, 3), ()), "hx is a tuple"),
    "hx of one": (lambda n: (zeros(5, 2, 3), (zeros(2, 2, 4),)), "hx is a tuple"),
    "hx of three": (lambda n: (zeros(5, 2, 3), (zeros(2, 2, 4),) * 3), "hx is a tuple"),
    "hx with None": (lambda n: (zeros(5, 2, 3), (zeros(2, 2, 4), None)), "hx.* is a "),
    "packed data 3-D": (lambda n: (packed((3, 3, 3)),), "packed input's data is 3-D"),
    "packed hx columns": (
        lambda n: (packed((3, 3), (2, 3)), wrap(n, zeros(2, 2, 5))),
        r"expected \(2, 2, 4\)",
    ),
    "packed hx dtype": (
        lambda n: (packed((3, 3), (2, 3)), wrap(n, zeros(2, 2, 4).double())),
        "is torch.float64",
    ),
}

#: The modules are (3, 4).
CELL = {
    "input a list": (lambda n: ([1, 2],), "input is a list"),
    "input 0-D": (lambda n: (zeros(()),), "input is 0-D; expected 1-D or 2-D"),
    "input 3-D": (lambda n: (zeros(2, 2, 3),), "input is 3-D"),
    "features": (lambda n: (zeros(2, 5),), "input has 5 features"),
    "dtype": (lambda n: (zeros(2, 3).double(),), "is torch.float32; expected torch.float64"),
    "integer": (lambda n: (zeros(2, 3).long(),), "expected torch.int64"),
    "hx 3-D": (lambda n: (zeros(2, 3), wrap(n, zeros(1, 2, 4))), "hx.* is 3-D; expected 1-D or"),
    "hx 1-D": (lambda n: (zeros(2, 3), wrap(n, zeros(4))), r"expected \(2, 4\)"),
    "hx 2-D unbatched": (lambda n: (zeros(3), wrap(n, zeros(1, 4))), r"expected \(4,\)"),
    "hx batch": (lambda n: (zeros(2, 3), wrap(n, zeros(3, 4))), r"expected \(2, 4\)"),
    "hx columns": (lambda n: (zeros(2, 3), wrap(n, zeros(2, 5))), r"expected \(2, 4\)"),
    "hx dtype": (lambda n: (zeros(2, 3), wrap(n, zeros(2, 4).double())), "is torch.float64"),
    "hx device": (lambda n: (zeros(2, 3), wrap(n, zeros(2, 4, device="meta"))), "is on meta"),
    "hx a number": (lambda n: (zeros(2, 3), 3), "hx is a int"),
    "hx empty": (lambda n: (zeros(2, 3), ()), "hx is a tuple"),
    "hx of one": (lambda n: (zeros(2, 3), (zeros(2, 4),)), "hx is a tuple"),
    "hx of three": (lambda n: (zeros(2, 3), (zeros(2, 4),) * 3), "hx is a tuple"),
    "hx with None": (lambda n: (zeros(2, 3), (zeros(2, 4), None)), "hx.* is a "),
}


BAD_CONSTRUCTORS = [
    ("LSTM", (3,), {}),
    ("LSTM", (3, 4), {"no_such": 1}),
    ("LSTM", (3, 4), {"dropout": 1.5}),
    ("LSTM", (3, 4), {"dropout": -0.1}),
    ("LSTM", (3, 4), {"dropout": True}),
    ("LSTM", (3, 4), {"dropout": "a"}),
    ("LSTM", (3, 4), {"bias": 1}),
    ("LSTM", (3, 4), {"batch_first": 0}),
    ("LSTM", (3.0, 4), {}),
    ("LSTM", (3, 4.0), {}),
    ("LSTM", (0, 4), {}),
    ("LSTM", (3, 0), {}),
    ("LSTM", (3, 4, 0), {}),
    ("LSTM", (3, 4), {"proj_size": -1}),
    ("LSTM", (3, 4), {"proj_size": 4}),
    ("GRU", (3, 4), {"proj_size": 2}),
    ("GRU", (3, 4), {"proj_size": 0}),
    ("GRU", (3, 4, 1, True, False, 0.0, False, "cpu"), {}),
    ("RNN", (3, 4), {"proj_size": 2}),
    ("RNN", (3, 4), {"nonlinearity": "gelu"}),
    ("RNN", (3, 4, 1, "gelu"), {}),
    ("RNN", (3, 4, 1, "tanh"), {"nonlinearity": "relu"}),
    ("RNN", (3, 4, 1, True), {}),
    ("LSTMCell", (3,), {}),
    ("GRUCell", (3, 4, True, None, None, False), {}),
    ("RNNCell", (3, 4), {"num_layers": 2}),
]


def error_of(function, *args, **kwargs) -> Exception:
    """What the call raises, whatever it is."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def assert_same_error(theirs, ours, arguments, message):
    expected, raised = error_of(theirs, *arguments), error_of(ours, *arguments)
    assert type(raised) is type(expected), f"torch says {expected!r}, ours {raised!r}"
    assert re.search(message, str(raised))
    assert "\n" not in str(raised)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    BAD_CONSTRUCTORS,
    ids=[f"{name}-{args}-{kwargs}" for name, args, kwargs in BAD_CONSTRUCTORS],
)
def test_bad_constructor(name, args, kwargs):
    expected = error_of(getattr(nn, name), *args, **kwargs)
    raised = error_of(getattr(fusedrnn, name), *args, **kwargs)
    assert type(raised) is type(expected), f"torch says {expected!r}, ours {raised!r}"


def test_positional_proj_size_is_refused_at_once():
    # torch takes it, makes weights for it, and fails at the first call.
    for name, args in (("GRU", ()), ("RNN", ("tanh",))):
        with pytest.raises(ValueError, match="proj_size was given; only LSTM has a projection"):
            getattr(fusedrnn, name)(3, 4, 1, *args, True, False, 0.0, False, 2)


@pytest.mark.parametrize("case", SEQUENCE)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_bad_call_of_a_sequence_module(name, case):
    arguments, message = SEQUENCE[case]
    modules = getattr(nn, name)(3, 4, 2), getattr(fusedrnn, name)(3, 4, 2)
    assert_same_error(*modules, arguments(name), message)


@pytest.mark.parametrize("case", CELL)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_bad_call_of_a_cell(name, case):
    arguments, message = CELL[case]
    modules = getattr(nn, name)(3, 4), getattr(fusedrnn, name)(3, 4)
    assert_same_error(*modules, arguments(name), message)


@pytest.mark.parametrize("packed_input", [False, True])
def test_lone_tensor_for_lstm(packed_input):
    x = pack_sequence([zeros(5, 3), zeros(4, 3)]) if packed_input else zeros(5, 2, 3)
    modules = nn.LSTM(3, 4, 2), fusedrnn.LSTM(3, 4, 2)
    assert_same_error(*modules, (x, zeros(2, 2, 4)), r"hx is a tensor; .* \(h_0, c_0\)")
    cells = nn.LSTMCell(3, 4), fusedrnn.LSTMCell(3, 4)
    assert_same_error(*cells, (zeros(2, 3), zeros(2, 4)), r"hx is a tensor; .* \(h_0, c_0\)")


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_a_tuple_for_one_state(name):
    """Refused also where a call of these shapes is known."""
    modules = getattr(nn, name)(3, 4, 2), getattr(fusedrnn, name)(3, 4, 2)
    x, hx = zeros(5, 2, 3), zeros(2, 2, 4)
    for _ in range(2):
        assert_same_error(*modules, (x, (hx,)), r"hx is a tuple; expected a tensor, h_0")
        modules[1](x, hx)


def test_states_of_lstm_that_differ():
    modules = nn.LSTM(3, 4, 2), fusedrnn.LSTM(3, 4, 2)
    hx = zeros(2, 2, 4), zeros(2, 2, 5)
    assert_same_error(*modules, (zeros(5, 2, 3), hx), r"hx\[1\] has shape \(2, 2, 5\)")
    hx = zeros(2, 2, 4), zeros(2, 2, 4).double()
    assert_same_error(*modules, (zeros(5, 2, 3), hx), r"hx\[1\] is torch.float64")
    projected = nn.LSTM(3, 4, 2, proj_size=2), fusedrnn.LSTM(3, 4, 2, proj_size=2)
    hx = zeros(2, 2, 4), zeros(2, 2, 4)
    assert_same_error(*projected, (zeros(5, 2, 3), hx), r"hx\[0\] .* expected \(2, 2, 2\)")


def test_weights_that_differ_in_dtype():
    modules = nn.GRU(3, 4), fusedrnn.GRU(3, 4)
    for module in modules:
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.double())
    assert_same_error(*modules, (zeros(5, 2, 3),), r"params\[1\] is torch.float64")


def test_what_torch_lets_pass_for_packed_input():
    # nn.LSTM checks nothing here: it reads wrong numbers of features as other steps, and raises
    # far from the cause or not at all. These are the types that nn.GRU raises.
    module = fusedrnn.LSTM(3, 4, 2)
    with pytest.raises(RuntimeError, match="input has 7 features"):
        module(packed((3, 7)))
    with pytest.raises(RuntimeError, match="packed input's data is 1-D; expected 2-D"):
        module(packed((3,)))
    with pytest.raises(ValueError, match=r"input is torch\.float64"):
        module(packed((3, 3), dtype=torch.float64))
    # A batch too large in hx loses rows without a word, in nn.GRU too.
    with pytest.raises(RuntimeError, match=r"hx has shape \(2, 3, 4\); expected \(2, 2, 4\)"):
        fusedrnn.GRU(3, 4, 2)(packed((2, 3), (3, 3)), zeros(2, 3, 4))


def test_autocast_leaves_float64_to_the_error_torch_raises():
    x = zeros(5, 2, 3).double()
    with torch.autocast("cpu", torch.bfloat16), fusedrnn.use_backend("torch"):
        assert_same_error(
            nn.GRU(3, 4),
            fusedrnn.GRU(3, 4),
            (x,),
            r"params\[0\] is torch.bfloat16; expected torch.float64",
        )


class TestFunctional:
    def params(self, count=4):
        return list(nn.LSTM(3, 4, count // 4).parameters())

    @pytest.mark.parametrize("dropout", [-0.1, 1.5])
    def test_dropout(self, dropout):
        with pytest.raises(ValueError, match=f"dropout is {dropout}; expected a probability"):
            fusedrnn.lstm(zeros(5, 2, 3), None, self.params(), dropout=dropout)

    def test_number_of_params(self):
        with pytest.raises(ValueError, match="params has 4 tensors; expected 8, 4 for each"):
            fusedrnn.lstm(zeros(5, 2, 3), None, self.params(), num_layers=2)
        with pytest.raises(ValueError, match="params has 4 tensors; expected 2"):
            fusedrnn.lstm(zeros(5, 2, 3), None, self.params(), bias=False)
        with pytest.raises(ValueError, match="params has 0 tensors"):
            fusedrnn.lstm(zeros(5, 2, 3), None, [])

    def test_nonlinearity(self):
        with pytest.raises(ValueError, match="nonlinearity is 'gelu'; expected 'tanh' or 'relu'"):
            fusedrnn.rnn(zeros(5, 2, 3), None, [], nonlinearity="gelu")

    def test_packed_sequence_of_wrong_kind(self):
        broken = PackedSequence(zeros(3, 3, 1), torch.tensor([2, 1]))
        with pytest.raises(RuntimeError, match="data is 3-D; expected 2-D"):
            fusedrnn.lstm(broken, None, self.params())
