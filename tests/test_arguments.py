"""Bad input: the exception type of torch's module, and a sentence that names the argument.

Every case runs both modules. Cases that torch lets pass, or fails on far from the cause, are
separate, with the type that its other modules raise.
"""

import re

import pytest
import torch
from pairs import LENGTHS, RESET, packed
from torch import Tensor, nn, zeros
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn


def arguments(name, input, hx):
    """Returns those of a call; an LSTM gets a tensor for both states, and no hx is none."""
    if hx is None:
        return (input,)
    return input, (hx, hx.clone()) if name.startswith("LSTM") and isinstance(hx, Tensor) else hx


def zero_packed(*shapes, dtype=torch.float32):
    return pack_sequence([zeros(shape, dtype=dtype) for shape in shapes], enforce_sorted=False)


X, H = zeros(5, 2, 3), zeros(2, 2, 4)
#: Input and hx of a call of ``(3, 4, num_layers=2)``, and our message.
SEQUENCE = {
    "input a list": ([1, 2], None, "input is a list; expected a tensor"),
    "input 0-D": (zeros(()), None, "input is 0-D; expected 2-D or 3-D"),
    "features": (zeros(5, 2, 7), None, "input has 7 features .* input_size, 3"),
    "dtype": (X.double(), None, "input is torch.float64, the weights are"),
    "device": (X.to("meta"), None, r"params\[0\] is on cpu; expected meta"),
    "no step": (zeros(0, 2, 3), None, "larger than 0 in RNN: input has no time step"),
    "hx 3-D unbatched": (X[:, 0], H[:, :1], r"hx.* shape \(2, 1, 4\); expected \(2, 4\)"),
    "hx columns": (X, zeros(2, 2, 5), r"expected \(2, 2, 4\)"),
    "hx dtype": (X, H.double(), "hx.* is torch.float64; expected torch.float32"),
    "hx device": (X, H.to("meta"), "hx.* is on meta; expected cpu"),
    "hx a number": (X, 3, "hx is a int; expected a t"),
    "hx of one": (X, (H,), "hx is a tuple"),
    "hx of three": (X, (H, H, H), "hx is a tuple"),
    "hx with None": (X, (H, None), "hx.* is a "),
    "packed data 3-D": (zero_packed((3, 3, 3)), None, "packed input's data is 3-D"),
}
#: Input and hx of a call of a cell ``(3, 4)``; the messages are torch's.
CELL = {
    "input a list": ([1, 2], None),
    "input 3-D": (zeros(2, 2, 3), None),
    "features": (zeros(2, 5), None),
    "dtype": (X[0].double(), None),
    "hx 3-D": (X[0], H[:1]),
    "hx columns": (X[0], zeros(2, 5)),
    "hx a number": (X[0], 3),
    "hx of one": (X[0], (H[0],)),
    "hx with None": (X[0], (H[0], None)),
}

#: Those of RNNBase by examples, and all of ours.
BAD_CONSTRUCTORS = [
    ("LSTM", (3, 4), {"no_such": 1}),
    ("LSTM", (3, 4), {"dropout": 1.5}),
    ("LSTM", (3.0, 4), {}),
    ("GRU", (3, 4), {"proj_size": 2}),
    ("GRU", (3, 4, 1, True, False, 0.0, False, "cpu"), {}),
    ("RNN", (3, 4), {"proj_size": 2}),
    ("RNN", (3, 4), {"nonlinearity": "gelu"}),
    ("RNN", (3, 4, 1, "gelu"), {}),
    ("RNN", (3, 4, 1, "tanh"), {"nonlinearity": "relu"}),
    ("GRUCell", (3, 4, True, None, None, False), {}),
    ("RNNCell", (3, 4), {"num_layers": 2}),
]


def error_of(function, *args, **kwargs) -> Exception:
    """Returns the error that a call raises."""
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


@pytest.mark.parametrize(("name", "args", "kwargs"), BAD_CONSTRUCTORS)
def test_bad_constructor(name, args, kwargs):
    """Texts of ValueErrors are torch's, too, which PyTorch's own tests match."""
    expected = error_of(getattr(nn, name), *args, **kwargs)
    raised = error_of(getattr(fusedrnn, name), *args, **kwargs)
    assert type(raised) is type(expected), f"torch says {expected!r}, ours {raised!r}"
    assert str(raised) == str(expected) or isinstance(raised, TypeError)


@pytest.mark.parametrize(("name", "args"), [("GRU", ()), ("RNN", ("tanh",))])
def test_a_projection_by_position_which_torch_lets_pass(name, args):
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        getattr(fusedrnn, name)(3, 4, 1, *args, True, False, 0.0, False, 2)


def test_a_cell_of_an_unknown_nonlinearity():
    cells = (library.RNNCell(3, 4, nonlinearity="gelu") for library in (nn, fusedrnn))
    assert_same_error(*cells, (zeros(2, 3),), "Unknown nonlinearity")


@pytest.mark.parametrize("case", SEQUENCE)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_bad_call_of_a_sequence_module(name, case):
    *given, message = SEQUENCE[case]
    modules = getattr(nn, name)(3, 4, 2), getattr(fusedrnn, name)(3, 4, 2)
    assert_same_error(*modules, arguments(name, *given), message)


@pytest.mark.parametrize("case", CELL)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_bad_call_of_a_cell(name, case):
    theirs, ours = getattr(nn, name)(3, 4), getattr(fusedrnn, name)(3, 4)
    given = arguments(name, *CELL[case])
    expected, raised = error_of(theirs, *given), error_of(ours, *given)
    assert (type(raised), str(raised)) == (type(expected), str(expected))
    with fusedrnn.use_backend("torch"):
        raised = error_of(ours, *given)
    assert isinstance(raised, (ValueError, RuntimeError, TypeError, AttributeError))
    assert not isinstance(raised, NotImplementedError)


def test_tuples_and_single_states():
    modules = nn.LSTM(3, 4, 2), fusedrnn.LSTM(3, 4, 2)
    for given in (X, pack_sequence([X[:3, 0], X[:2, 0]])):
        assert_same_error(*modules, (given, H), r"hx is a tensor; .* \(h_0, c_0\)")
    assert_same_error(*modules, (X, (H, zeros(2, 2, 5))), r"hx\[1\] has shape \(2, 2, 5\)")
    projected = nn.LSTM(3, 4, 2, proj_size=2), fusedrnn.LSTM(3, 4, 2, proj_size=2)
    assert_same_error(*projected, (X, (H, H)), r"hx\[0\] .* expected \(2, 2, 2\)")
    modules = nn.GRU(3, 4, 2), fusedrnn.GRU(3, 4, 2)
    for _ in range(2):  # the second time of a shape that is known
        assert_same_error(*modules, (X, (H,)), r"hx is a tuple; expected a tensor, h_0")
        modules[1](X, H)


#: By name of a weight of ``LSTM(3, 4, 2, bidirectional)`` a replacement and our message.
WEIGHTS = {
    "weight_hh_l0": (zeros(1, 3000), r"\(1, 3000\); expected \(16, 4\)"),
    "weight_ih_l0": (zeros(15, 3), r"\(15, 3\); expected \(4 \* hidden_size, input_size\)"),
    "weight_ih_l0_reverse": (zeros(16, 5), r"\(16, 5\); expected \(16, 3\)"),
    "weight_ih_l1": (zeros(16, 4), r"\(16, 4\); expected \(16, 8\)"),
    "bias_ih_l1_reverse": (zeros(4), r"\(4,\); expected \(16,\)"),
    "bias_hh_l0": (zeros(16, 1), r"\(16, 1\); expected \(16,\)"),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_another_shape(name, backend):
    """In the first call of a shape and in every later one."""
    module, x = fusedrnn.LSTM(3, 4, 2, bidirectional=True), zeros(5, 2, 3)
    weight, message = WEIGHTS[name]
    with fusedrnn.use_backend(backend):
        for _ in range(2):
            right = getattr(module, name)
            setattr(module, name, nn.Parameter(weight))
            with pytest.raises(RuntimeError, match=f"^{name} has shape {message}$"):
                module(x)
            setattr(module, name, right)
            module(x)


def test_weights_and_options_of_functions():
    params = list(nn.LSTM(3, 4).parameters())
    for function, given, options, error, message in (
        (fusedrnn.lstm, [*params[:3], None], {}, TypeError, "bias_hh_l0 is a NoneType; expected a"),
        (fusedrnn.lstm, [*params, params[3]], {}, RuntimeError, r"weight_hr_l0 has shape \(16,\)"),
        (fusedrnn.lstm, params, {"num_layers": 2}, ValueError, "4 tensors; expected 8, 4 for each"),
        (fusedrnn.gru, params, {"bias": False}, ValueError, "params has 4 tensors; expected 2"),
        (fusedrnn.lstm, [], {}, ValueError, "params has 0 tensors"),
        (fusedrnn.lstm, params, {"dropout": 1.5}, ValueError, r"is 1\.5; expected a probability"),
        (fusedrnn.rnn, params, {"nonlinearity": "gelu"}, ValueError, "Unknown nonlinearity 'gelu'"),
        (fusedrnn.gru, params, {"no_such": 1}, TypeError, "no_such"),
    ):
        with pytest.raises(error, match=message):
            function(zeros(5, 2, 3), None, given, **options)
    modules = nn.GRU(3, 4), fusedrnn.GRU(3, 4)
    for module in modules:
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.double())
    assert_same_error(*modules, (zeros(5, 2, 3),), r"params\[1\] is torch.float64")


def test_packed_input_that_torch_lets_pass():
    """nn.LSTM reads wrong numbers of features as other steps. These are the types of nn.GRU."""
    too_long = PackedSequence(zeros(4, 3), torch.tensor([2, 1]))
    for input, error, message in (
        (zero_packed((3, 7)), RuntimeError, "input has 7 features"),
        (zero_packed((3,)), RuntimeError, "packed input's data is 1-D; expected 2-D"),
        (zero_packed((3, 3), dtype=torch.float64), ValueError, r"input is torch\.float64"),
        (too_long, RuntimeError, "has 4 rows; expected 3, the sum of its batch_sizes"),
    ):
        with pytest.raises(error, match=message):
            fusedrnn.LSTM(3, 4, 2)(input)
    with pytest.raises(RuntimeError, match=r"hx has shape \(2, 3, 4\); expected \(2, 2, 4\)"):
        fusedrnn.GRU(3, 4, 2)(zero_packed((2, 3), (3, 3)), zeros(2, 3, 4))


BAD = {
    "lengths a number": ({"lengths": 3}, TypeError, "lengths is a int; expected a tensor or a"),
    "lengths a text": ({"lengths": "ab"}, TypeError, "lengths is a str"),
    "lengths bytes": ({"lengths": b"abc"}, TypeError, "lengths is a bytes"),
    "lengths a dict": ({"lengths": {0: 1}}, TypeError, "lengths is a dict"),
    "lengths with None": ({"lengths": [4, None, 1]}, ValueError, r"lengths\[1\] is None"),
    "lengths of floats": ({"lengths": LENGTHS.double()}, ValueError, "lengths is torch.float64"),
    "lengths of bools": ({"lengths": LENGTHS > 1}, ValueError, "lengths is torch.bool"),
    "lengths too few": ({"lengths": [4, 1]}, ValueError, r"has shape \(2,\); expected \(3,\)"),
    "lengths negative": ({"lengths": LENGTHS - 2}, ValueError, "lengths has -1"),
    "lengths too large": ({"lengths": LENGTHS + 1}, ValueError, "has 5; the input has 4 steps"),
    "reset of integers": ({"reset": RESET.int()}, ValueError, "reset is torch.int32"),
    "reset no tensor": ({"reset": [True]}, ValueError, "reset is a list"),
    "reset transposed": ({"reset": RESET.t()}, ValueError, r"shape \(3, 4\); expected \(4, 3\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lengths_and_resets(case):
    options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        fusedrnn.GRU(3, 4)(zeros(4, 3, 3), **options)


def test_input_with_lengths_of_its_own_takes_no_others():
    for name, value in (("lengths", torch.tensor([1, 1])), ("reset", RESET)):
        with pytest.raises(ValueError, match=f"{name} was given with an input that has lengths"):
            fusedrnn.LSTM(3, 4)(zero_packed((3, 3), (2, 3)), **{name: value})
    with pytest.raises(ValueError, match="lengths was given with an input without a batch"):
        fusedrnn.LSTM(3, 4)(zeros(4, 3), lengths=torch.tensor([1]))
    nested = torch.nested.nested_tensor([zeros(2, 3), zeros(0, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="an empty sequence"):
        fusedrnn.LSTM(3, 4)(nested)


def test_lengths_of_every_kind():
    module, x = fusedrnn.GRU(3, 4), torch.randn(4, 3, 3)
    want, _ = module(x, lengths=LENGTHS)
    for lengths in ([4, 1, 3], (4, 1, 3), range(2, 5), LENGTHS.to(torch.uint8)):
        got, _ = module(x, lengths=lengths)
        assert torch.equal(got, want) != isinstance(lengths, range)


def test_every_factory_names_its_device():
    """Under a default device that none of the tensors is on."""
    module, x = fusedrnn.LSTM(3, 4, 2, bidirectional=True), torch.randn(4, 3, 3)
    rows, jagged = packed(dtype=torch.float32), [torch.randn(n, 3) for n in (2, 4)]
    nested = torch.nested.nested_tensor(jagged, layout=torch.jagged)
    torch.set_default_device("meta")
    try:
        for backend in ("auto", "torch"):
            with fusedrnn.use_backend(backend):
                module(x)[0].sum().backward()
                module(rows)[0].data.sum().backward()
                module(nested)[0].values().sum().backward()
                if backend == "auto":
                    module(x, lengths=LENGTHS, reset=RESET)[0].sum().backward()
                    module(x, lengths=[4, 1, 3])[0].sum().backward()
    finally:
        torch.set_default_device(None)
