"""The choice of a backend, and its reasons in words."""

import threading

import pytest
import torch
from processes import python
from torch import nn

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.dispatch import decide, explain, requested_backend, use_backend
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.expected import judge
from fusedrnn.kernels.plan import CHIPS, NoPlan
from fusedrnn.records import Facts, Layers


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_BACKEND", raising=False)
    # Not by the environment: an import of triton during the test would remember it.
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "_decided", dispatch._decide)


@pytest.fixture
def cuda(monkeypatch):
    """Makes calls on CUDA plannable without a GPU."""
    monkeypatch.setattr(dispatch, "chip_of", lambda device: CHIPS["sm_90"])
    return torch.device("cuda", 0)


def facts(device="cpu", cell="lstm", layers=(), **changes) -> Facts:
    sizes, own = (7, 2, 3, 16), Layers(**dict(layers))
    made = Facts(cell, torch.device(device), torch.float32, *sizes, layers=own)
    return made._replace(**changes)


def choose(asked):
    return decide(asked)[0]


def refusal(backend: str, asked: Facts) -> str:
    with use_backend(backend), pytest.raises(NotImplementedError) as caught:
        choose(asked)
    return str(caught.value)


def test_use_backend_nests_and_is_of_a_thread():
    seen = []
    with use_backend("torch"):
        with use_backend("aten"):
            assert requested_backend() == ("aten", "use_backend")
        assert requested_backend() == ("torch", "use_backend")
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert seen == [requested_backend()] == [("auto", "default")]


def test_the_environment_is_read_at_the_call_and_yields_to_use_backend(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_BACKEND", "torch")
    assert choose(facts()) == "torch"
    assert requested_backend() == ("torch", "FUSEDRNN_BACKEND")
    with use_backend("auto"):
        assert choose(facts()) == "aten"
    monkeypatch.setenv("FUSEDRNN_BACKEND", "")
    assert requested_backend() == ("auto", "default")


def test_unknown_names_are_refused(monkeypatch):
    expected = "{} is 'Triton'; expected one of auto, triton, aten, torch"
    with pytest.raises(ValueError, match=expected.format("backend")):
        use_backend("Triton")
    with pytest.raises(ValueError, match="precision is 'fp32'; expected one of ieee, tf32, "):
        fusedrnn.use_precision("fp32")
    monkeypatch.setenv("FUSEDRNN_BACKEND", "Triton")
    with pytest.raises(ValueError, match=expected.format("FUSEDRNN_BACKEND")):
        fusedrnn.LSTM(3, 4)(torch.zeros(5, 2, 3))


def test_precision_follows_torchs_switches():
    """Runs a new process: torch has no way back from some of them."""
    code = """if True:
        import torch
        from fusedrnn.dispatch import precision
        b = torch.backends
        assert precision() == "tf32"  # torch's default
        b.cudnn.rnn.fp32_precision = "ieee"
        assert precision() == "ieee"
        b.cudnn.allow_tf32 = False
        b.cudnn.rnn.fp32_precision = "tf32"  # from here on reading allow_tf32 raises
        assert precision() == "tf32"
    """
    done = python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    with fusedrnn.use_precision("tf32x3"):
        with fusedrnn.use_precision("ieee"):
            assert dispatch.precision() == "ieee"
        assert dispatch.precision() == "tf32x3"
    assert dispatch.precision() == "tf32"


LONG = {"steps": 512, "hidden_size": 32}


@pytest.mark.parametrize(
    ("changes", "backend", "without_triton"),
    [
        ({}, "aten", "aten"),  # a short call
        (LONG, "triton", "aten"),
        (LONG | {"hidden_size": 64}, "aten", "aten"),  # more than 0.8 of cuDNN's time
        (LONG | {"needs_grad": True}, "triton", "aten"),
        (LONG | {"dtype": torch.bfloat16}, "triton", "aten"),
        (LONG | {"ragged": ("packed",)}, "triton", "aten"),
        (LONG | {"needs_grad": True, "batch": 4096}, "aten", "aten"),  # four waves of programs
        ({"cell": "gru_reset_before", "ragged": ("packed",)}, "triton", "torch"),
        ({"ragged": ("lengths", "reset")}, "triton", "torch"),
        ({"states": True}, "triton", "torch"),
        ({"dtype": torch.float64}, "aten", "aten"),
        ({"proj_size": 2}, "aten", "aten"),
        ({"proj_size": 2, "ragged": ("lengths",)}, "torch", "torch"),
        ({"batch": 0}, "aten", "aten"),
        ({"steps": 1}, "aten", "aten"),
        ({"steps": 1, "cell": "gru_reset_before"}, "triton", "torch"),
        ({"cell": "gru_reset_before", "dtype": torch.int64}, "torch", "torch"),
    ],
)
def test_auto_on_cuda(changes, backend, without_triton, cuda, monkeypatch):
    asked = facts(cuda, **changes)
    assert choose(asked) == backend
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    assert choose(asked) == without_triton
    assert "triton is not installed" in refusal("triton", asked)


def test_no_plan_is_a_reason(cuda, monkeypatch):
    reason = dict(dispatch._decide(facts(cuda))[1])["triton"]
    assert "the kernels 0.0" in reason
    assert "cycles at 1755 MHz" in reason
    assert "torch's operator 0.00" in reason
    assert "published: xwang233" in reason

    def no_plan(problem, chip):
        raise NoPlan("H does not fit.")

    monkeypatch.setattr(planning, "plan_stack", no_plan)
    assert choose(facts(cuda)) == "aten"
    assert refusal("triton", facts(cuda)) == "backend 'triton': H does not fit."


def test_the_plan_gets_the_whole_question(cuda, monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "plan_stack", lambda *question: asked.append(question) or ())
    layers = {"num_layers": 3, "bidirectional": True, "recompute": True}
    with fusedrnn.use_precision("tf32x3"):
        choose(facts(cuda, "gru", layers, dtype=torch.float32, needs_grad=True))
    expected = planning.Problem("gru", 16, 2, 2, torch.float32, "tf32x3", True, 3, False, True)
    assert asked == [(expected, CHIPS["sm_90"])]


@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_a_compilers_choice_depends_on_no_size_of_the_input(requested, cuda, monkeypatch):
    asked, real = [], planning.plan_stack
    monkeypatch.setattr(planning, "plan_stack", lambda p, c: (asked.append(p), real(p, c))[1])
    half = facts(cuda, hidden_size=512, dtype=torch.float16, compiled=True)
    with use_backend(requested):
        sizes = ((1, 1), (1, 4096), (10_000, 16), (10_000, 64))
        assert len({choose(half._replace(steps=T, batch=B)) for T, B in sizes}) == 1
        assert len(asked) == 4
        assert len(set(asked)) == 1
        choose(half._replace(compiled=False, batch=3))
    assert asked[-1].batch == 3


def training(cell, T, B, I, H, **more):
    return facts(cell=cell, steps=T, batch=B, input_size=I, hidden_size=H, needs_grad=True, **more)


@pytest.mark.parametrize(
    ("asked", "backend"),
    [
        (training("gru", 10, 8, 4, 4), "torch"),
        (training("gru", 9, 8, 4, 4), "aten"),
        (training("gru", 500, 8, 4, 4)._replace(needs_grad=False), "aten"),
        (training("gru", 15, 8, 4, 4)._replace(dtype=torch.float64), "aten"),
        (training("gru", 15, 8, 4, 4, autocast=torch.bfloat16), "aten"),
        (training("rnn_tanh", 20, 8, 4, 4), "torch"),
        (training("rnn_relu", 19, 8, 4, 4), "aten"),
        (training("lstm", 100, 64, 300, 16), "torch"),
        (training("lstm", 100, 64, 240, 16), "aten"),
        (training("lstm", 100, 64, 300, 76), "aten"),
        (training("lstm", 100, 64, 300, 16, layers={"num_layers": 2}), "aten"),
        (training("lstm", 500, 64, 64, 64), "aten"),
        (training("lstm", 50, 8, 4, 4, ragged=("packed",)), "torch"),
        (training("lstm", 49, 8, 4, 4, ragged=("packed",)), "aten"),
        (training("gru", 50, 1, 4, 4, ragged=("packed",)), "aten"),
        (facts(ragged=("lengths",)), "torch"),
        (facts(cell="gru_reset_before"), "torch"),
        (facts(layers={"recompute": True}, needs_grad=True), "torch"),
        (facts(proj_size=2, dtype=torch.float64, ragged=("packed",), needs_grad=True), "aten"),
        (facts("meta"), "aten"),
        (facts("mps"), "aten"),
        # Torch's operator cannot be one node of a training graph; without gradients it can.
        (facts(cell="gru", compiled=True), "aten"),
        (facts(cell="gru", compiled=True, needs_grad=True), "torch"),
        (facts(cell="gru", compiled=True, ragged=("packed",)), "torch"),
        (facts(cell="gru", transformed=True), "torch"),
    ],
)
def test_auto_elsewhere(asked, backend):
    """Where the loop was measured to be faster than torch's operator, and beside it."""
    assert choose(asked) == backend


def test_a_decision_is_made_once_for_each_setting(monkeypatch):
    """The cache's key has all that decides: settings of the thread, too."""
    made, decide = [], dispatch._decide
    monkeypatch.undo()
    monkeypatch.delenv("FUSEDRNN_BACKEND", raising=False)
    counted = dispatch.lru_cache(lambda *key: (made.append(key), decide(*key))[1])
    monkeypatch.setattr(dispatch, "_decided", counted)
    asked = facts(cell="gru")
    for _ in range(2):
        assert choose(asked) == "aten"
        with use_backend("torch"):
            assert choose(asked) == "torch"
        assert choose(asked._replace(states=True)) == "torch"
    assert len(made) == 3


def test_named_backends_refuse(monkeypatch):
    for backend, changes, reason in (
        ("triton", {}, "backend 'triton': the kernels need CUDA tensors, these are on cpu "),
        ("triton", {"device": "meta"}, "these are on meta"),
        ("auto", {"device": "mps", "cell": "gru_reset_before"}, "the CPU and CUDA, not for mps"),
        ("torch", {"device": "mps"}, "not for mps"),
        ("aten", {"cell": "gru_reset_before"}, "has no operator for GRU(reset_after=False)"),
        ("aten", {"ragged": ("reset",)}, "takes no lengths and no reset"),
        ("aten", {"states": True}, "keeps no state but the last"),
    ):
        assert reason in refusal(backend, facts(**changes))
    monkeypatch.setattr(dispatch, "_interpreting", lambda: True)
    with use_backend("triton"):
        assert choose(facts(ragged=("packed",))) == "triton"
    assert "the bit patterns of bfloat16" in refusal("triton", facts(dtype=torch.bfloat16))
    assert "no projection" in refusal("triton", facts(proj_size=2))


def test_explain_on_the_cpu():
    module = fusedrnn.LSTM(3, 16, 2, bidirectional=True, batch_first=True)
    told = explain(module, torch.zeros(2, 7, 3))
    assert (told.backend, told.requested, told.source) == ("aten", "auto", "default")
    assert str(told).splitlines() == [
        "lstm on cpu, float32, T=7 B=2 I=3 H=16, layers=2, directions=2, with gradients",
        "backend: aten (asked for: auto, default)",
        "not triton: the kernels need CUDA tensors, these are on cpu "
        "(TRITON_INTERPRET=1 and a named backend run CPU tensors)",
        "under torch.compile: torch",
    ]
    assert repr(told) == str(told)


def test_explain_with_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreting", lambda: True)
    module = fusedrnn.GRU(3, 16, 2, bidirectional=True)
    with use_backend("triton"):
        told = explain(module, torch.zeros(7, 2, 3), torch.zeros(4, 2, 16))
    problem = planning.Problem("gru", 16, 2, 2, torch.float32, "tf32", True)
    chip = planning.chip_of(torch.device("cpu"))
    line = planning.plan(problem, chip).describe()
    verdict = judge(problem._replace(layers=2), planning.plan_stack(problem, chip), chip, 7, 3)
    assert str(told).splitlines()[1:] == [
        "backend: triton (asked for: triton, use_backend)",
        "precision: tf32",
        f"layer 0: {line}",
        f"layer 1: {line}",
        f"expected: {verdict}",
    ]


def test_explain_says_what_would_raise(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_BACKEND", "triton")
    told = explain(fusedrnn.RNN(3, 16), torch.zeros(7, 3))
    assert told.backend is None
    assert "backend: none, the call would raise (asked for: triton, FUSEDRNN_B" in str(told)
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.rnn\.LSTM"):
        explain(nn.LSTM(3, 4), torch.zeros(7, 2, 3))
    with pytest.raises(RuntimeError, match="input has 5 features"):
        explain(fusedrnn.LSTM(3, 4), torch.zeros(7, 2, 5))
