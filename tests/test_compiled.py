"""The backend ``compiled``: its chunks as plain functions for every cell, and compiled for some."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import compiled, explain, use_backend
from fusedrnn.kernels.spec import SPECS
from fusedrnn.testing import assert_budget

K, I, H = compiled.STEPS, 3, 5


@pytest.fixture(autouse=True)
def _from_the_first_chunk_on(monkeypatch):
    """Few steps are enough for these tests; who asks for a gain waits for more."""
    monkeypatch.setattr(compiled, "_LEAST", K)


@pytest.fixture
def plain(monkeypatch):
    """Chunks run as they stand, uncompiled; what was asked for, by name and direction."""
    asked = []

    def program(function, fixed, tensors):
        asked.append((function.__name__, fixed[1]))
        absent = [tensor is None for tensor in tensors]

        def run(given):
            given = iter(given)
            return list(function(*fixed, *[None if no else next(given) for no in absent]))

        return run

    monkeypatch.setattr(compiled, "_program", program)
    return asked


def module_of(cell: str, dtype=torch.float64, **options):
    torch.manual_seed(0)
    if cell.startswith("rnn"):
        return fusedrnn.RNN(I, H, nonlinearity=cell[4:], dtype=dtype, **options)
    if cell == "gru_reset_before":
        options["reset_after"] = False
    return getattr(fusedrnn, cell[:4].rstrip("_").upper())(I, H, dtype=dtype, **options)


def states_of(module, B: int, seed: int = 1):
    L, D = module.num_layers, 1 + module.bidirectional
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(seed)
    sizes = [module.proj_size or H, H][: 2 if module.mode == "LSTM" else 1]
    found = [torch.randn(L * D, B, size, generator=generator).to(like) for size in sizes]
    return [state.requires_grad_() for state in found]


def found(module, x, states, backend, only_final=False):
    """Results and gradients; only_final: no gradient arrives at the output."""
    x = x.detach().requires_grad_()
    with use_backend(backend):
        output, final = module(x, tuple(states) if len(states) > 1 else states[0])
        results = {"output": output, "h_n": final} | (
            {"h_n": final[0], "c_n": final[1]} if len(states) > 1 else {}
        )
        if only_final:
            del results["output"]
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results.values()]
        names = ["x", "h_0", "c_0"][: 1 + len(states)]
        names += [name for name, _ in module.named_parameters()]
        gradients = torch.autograd.grad(
            list(results.values()), [x, *states, *module.parameters()], grads
        )
    return {**results, **{f"d_{n}": g for n, g in zip(names, gradients, strict=True)}}


def assert_same(module, T, B, **options):
    x, states = torch.randn(T, B, I, dtype=torch.float64), states_of(module, B)
    loop, ours = (found(module, x, states, b, **options) for b in ("torch", "compiled"))
    assert loop.keys() == ours.keys()
    for name, value in loop.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11)


CHUNKS = {("forward_chunk", 0), ("backward_chunk", 0)}
BOTH_WAYS = CHUNKS | {("forward_chunk", 1), ("backward_chunk", 1)}


@pytest.mark.parametrize("T", [K, K + 1, 3 * K - 1])
@pytest.mark.parametrize("cell", SPECS)
def test_chunks_and_what_is_left_are_the_loop(plain, cell, T):
    assert_same(module_of(cell, bidirectional=True), T, 3)
    assert set(plain) == BOTH_WAYS


def test_each_chunk_is_one_call(plain, monkeypatch):
    calls, program = [], compiled._program

    def counted(function, *rest):
        run = program(function, *rest)
        return lambda given: (calls.append(function.__name__), run(given))[1]

    monkeypatch.setattr(compiled, "_program", counted)
    found(
        module_of("gru"),
        torch.zeros(3 * K + 5, 2, I).double(),
        states_of(module_of("gru"), 2),
        "compiled",
    )
    assert calls == ["forward_chunk"] * 3 + ["backward_chunk"] * 3


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"num_layers": 2}, {"recompute": True}, {"num_layers": 2, "recompute": True}],
    ids=str,
)
@pytest.mark.parametrize("cell", SPECS)
def test_every_module_s_options(plain, cell, options):
    assert_same(module_of(cell, **options), 2 * K + 3, 2)
    assert set(plain) == CHUNKS


@pytest.mark.parametrize("cell", SPECS)
def test_segments_shorter_and_longer_than_a_chunk(plain, cell, monkeypatch):
    for rows in (3, 2 * (K + 3)):
        monkeypatch.setattr("fusedrnn.loop._rows_of_segment", lambda *_, rows=rows: rows)
        assert_same(module_of(cell, bidirectional=True), 3 * K, 2)


@pytest.mark.parametrize("cell", SPECS)
def test_gradients_that_reach_the_final_states_alone(plain, cell):
    assert_same(module_of(cell), K + 2, 2, only_final=True)
    assert set(plain) == CHUNKS


@pytest.mark.parametrize("D", [1, 2])
def test_projected_states(plain, D):
    assert_same(module_of("lstm", proj_size=2, bidirectional=D == 2), 2 * K + 1, 3)
    assert len(set(plain)) == 2 * D


@pytest.mark.parametrize("cell", SPECS)
def test_without_gradients_and_every_step_s_states(plain, cell):
    module = module_of(cell, bidirectional=True).eval()
    x, states = torch.randn(2 * K + 1, 3, I, dtype=torch.float64), states_of(module, 3)
    hx = tuple(states) if len(states) > 1 else states[0]
    results = {}
    for backend in ("torch", "compiled"):
        with use_backend(backend), torch.no_grad():
            output, final = module(x, hx)
            every = module.states(x, hx)
            with torch.inference_mode():
                again = module(x, hx)[0]
        results[backend] = [output, again, *every[:2], *(final if len(states) > 1 else [final])]
    assert set(plain) == {("forward_chunk", 0), ("forward_chunk", 1)}
    for ours, loop in zip(results["compiled"], results["torch"], strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-11, atol=1e-11)


def test_gradients_that_reach_every_c_are_the_loop_s(plain):
    module = module_of("lstm")
    x = torch.randn(K + 1, 2, I, dtype=torch.float64)
    grads = {}
    for backend in ("torch", "compiled"):
        with use_backend(backend):
            c = module.states(x).c[0][0]
            grads[backend] = torch.autograd.grad(c.pow(2).sum(), list(module.parameters()))
    assert set(plain) == {("forward_chunk", 0)}
    for ours, loop in zip(grads["compiled"], grads["torch"], strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-11, atol=1e-11)


def _ragged(call):
    lengths = torch.tensor([2 * K, K, 3])
    return {
        "lengths": lambda m, x: call(m, x, lengths=lengths),
        "reset": lambda m, x: call(m, x, reset=torch.zeros(2 * K, 3, dtype=torch.bool)),
        "packed": lambda m, x: m(pack_padded_sequence(x, lengths))[0].data,
        "few steps": lambda m, x: call(m, x[: K - 1]),
        "many products": lambda m, x: call(m, x.repeat(1, 3000, 1)),
        "16 bit": lambda m, x: call(m.to(torch.bfloat16), x.to(torch.bfloat16)),
        "nothing": lambda m, x: call(m, x[:, :0]),
    }


REASONS = {
    "lengths": "only those of full sequences are compiled",
    "reset": "only those of full sequences are compiled",
    "packed": "only those of full sequences are compiled",
    "few steps": f"of fewer than {K} steps none is compiled",
    "many products": "steps of more than 524,288 multiplications are not compiled",
    "16 bit": "only fp32 and fp64 are compiled",
    "nothing": "there is nothing to compile",
}


@pytest.mark.parametrize("what", REASONS)
def test_other_steps_are_the_loop_s_bit_for_bit_and_explain_says_so(plain, what):
    results = []
    for backend in ("torch", "compiled"):
        with use_backend(backend):
            x = torch.randn(2 * K, 3, I, generator=torch.Generator().manual_seed(3))
            run = _ragged(lambda m, *args, **options: m(*args, **options)[0])[what]
            results.append(run(module_of("gru", torch.float32), x))
    assert not plain
    assert torch.equal(*results)
    run = _ragged(explain)[what] if what != "packed" else None
    with use_backend("compiled"):
        module = module_of("gru", torch.float32)
        if run is None:
            told = explain(module, pack_padded_sequence(x, [2 * K, K, 3]))
        else:
            told = run(module, x)
    assert told.layers == (f"steps: a loop: {REASONS[what]}",)


def test_explain_names_what_is_compiled():
    with use_backend("compiled"):
        told = explain(module_of("lstm", torch.float32), torch.zeros(K, 2, I))
    assert (told.backend, told.layers) == ("compiled", (f"steps: {K} at a time compiled",))


def test_few_steps_are_not_compiled(monkeypatch):
    monkeypatch.undo()
    with use_backend("compiled"):
        few, enough = (
            explain(module_of("gru", torch.float32), torch.zeros(T, 2, I)).layers
            for T in (compiled._LEAST - 1, compiled._LEAST)
        )
    assert few == ("steps: a loop: of fewer than 32 steps none is compiled",)
    assert enough == (f"steps: {K} at a time compiled",)


def test_auto_never_takes_it():
    assert explain(module_of("gru", torch.float32), torch.zeros(99, 2, I)).backend == "torch"


def test_no_compiler_is_a_refusal(monkeypatch):
    monkeypatch.setattr(compiled, "_missing", lambda: "torch finds no C++ compiler")
    with (
        use_backend("compiled"),
        pytest.raises(NotImplementedError, match="backend 'compiled': torch finds no"),
    ):
        module_of("gru")(torch.zeros(9, 2, I, dtype=torch.float64))


def test_torch_is_asked_for_its_compiler():
    script = "from fusedrnn import compiled; print(compiled.missing())"
    for cxx, wanted in ((None, "None"), ("no-such-compiler", "torch finds no C++ compiler")):
        environment = os.environ | ({"CXX": cxx} if cxx else {})
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.startswith(wanted)


def test_it_is_the_cpu_s():
    request = explain(module_of("gru"), torch.zeros(9, 2, I, dtype=torch.float64)).request
    reason = fusedrnn.dispatch._compiled_refusal(
        request._replace(device=torch.device("cuda", 0)), "compiled"
    )
    assert reason == "the loop's steps are compiled for the CPU, not for cuda:0"


def test_under_a_compiler_and_torch_func(plain):
    module, x = module_of("gru"), torch.randn(K + 1, 2, I, dtype=torch.float64)
    with use_backend("torch"):
        want = module(x)[0]
    with use_backend("compiled"):
        traced = torch.compile(module, backend="aot_eager", fullgraph=True)(x)[0]
        many = torch.func.vmap(lambda one: module(one.unsqueeze(1))[0], in_dims=1)(x)
    torch.testing.assert_close(traced, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(many[1, :, 0], want[:, 1], rtol=1e-11, atol=1e-11)
    assert set(plain) == {("forward_chunk", 0)}


class TestPrograms:
    """What is compiled, kept and asked for, without a compiler."""

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(compiled, "_PROGRAMS", {})

    @pytest.fixture
    def made(self, monkeypatch):
        """What was made, each by a thread and under modes."""
        seen = []

        def make(*key):
            time.sleep(0.05)
            seen.append((key, threading.get_ident(), torch.is_inference_mode_enabled()))
            return lambda given: given

        monkeypatch.setattr(compiled, "_made", make)
        return seen

    def program(self, B=2, gap=0, dtype=torch.float64, H=H, fixed=("gru", 0, True, False)):
        gx = torch.zeros(K, B, 3 * H + gap, dtype=dtype)[..., : 3 * H]
        weights = torch.zeros(H, 3 * H, dtype=dtype), None, None
        h = torch.zeros(B, H, dtype=dtype)
        return compiled._program(compiled.forward_chunk, fixed, [gx, h, None, *weights])

    def test_one_for_every_batch(self, made):
        assert len({self.program(B) for B in (1, 2, 7)}) == 1
        assert len(made) == 1

    def test_another_for_whatever_else_it_takes_for_granted(self, made):
        changes = {"gap": 4, "dtype": torch.float32, "H": 6, "fixed": ("gru", 1, True, False)}
        programs = {self.program(), *(self.program(**{k: v}) for k, v in changes.items())}
        assert len(programs) == len(made) == 5

    def test_a_gap_is_seen_with_one_sequence_too(self, made):
        assert self.program(1, gap=4) is self.program(3, gap=4)
        assert self.program(1) is not self.program(1, gap=4)

    def test_threads_wait_for_the_one_that_compiles(self, made):
        threads = [threading.Thread(target=self.program) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1

    def test_it_is_made_outside_of_the_caller_s_modes(self, made):
        with torch.inference_mode():
            self.program()
        ((_, thread, inference),) = made
        assert (thread != threading.get_ident(), inference) == (True, False)

    def test_a_failure_names_the_way_out(self, monkeypatch):
        def fail(*args):
            raise OSError("no space left on device")

        monkeypatch.setattr(compiled, "_compile", fail)
        sentence = "could not compile steps of gru; backend 'torch' runs the same loop"
        with pytest.raises(RuntimeError, match=sentence) as caught:
            self.program()
        assert isinstance(caught.value.__cause__, OSError)
        assert not compiled._PROGRAMS


# torch's own words about its own calls.
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.xdist_group("compiled")
class TestCompiled:
    """Real programs, of a few sizes: each takes a compiler 5 to 20 seconds."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _cache(cls, tmp_path_factory):
        """Nothing is taken from an earlier run."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
            patch.setattr(compiled, "_PROGRAMS", {})
            yield

    def assert_within_budget(self, ours, B, T=2 * K + 3):
        x = torch.randn(T, B, I)
        states = states_of(ours, B)
        reference, got = (found(ours, x, states, b) for b in ("torch", "compiled"))
        exact = [state.detach().double().requires_grad_() for state in states]
        truth = found(ours.double(), x.double(), exact, "torch")
        ours.float()
        for name, want in truth.items():
            assert_budget(name, got[name], reference[name], want)

    def test_any_batch_by_the_same_programs(self):
        ours = module_of("gru", torch.float32, bidirectional=True)
        before = len(compiled._PROGRAMS)
        for B in (4, 1, 33):
            self.assert_within_budget(ours, B)
            assert len(compiled._PROGRAMS) == before + 4

    def test_an_lstm_with_a_projection(self):
        self.assert_within_budget(module_of("lstm", torch.float32, proj_size=2), 3)

    @pytest.mark.parametrize("cell", ["gru_reset_before", "rnn_relu"])
    def test_fp64(self, cell):
        assert_same(module_of(cell), K + 1, 3)

    def test_the_next_process_compiles_nothing(self, monkeypatch):
        assert_same(module_of("rnn_relu"), K, 2)
        monkeypatch.setattr(compiled, "_PROGRAMS", {})
        monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("it was compiled"))
        assert_same(module_of("rnn_relu"), K, 2)

    def test_threads_run_one_program_at_once(self):
        module, x = module_of("rnn_relu"), torch.randn(4 * K, 3, I, dtype=torch.float64)
        results: list[torch.Tensor] = []

        def work():
            with use_backend("compiled"):
                results.extend(module(x)[0].detach() for _ in range(50))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 200
        assert all(torch.equal(result, results[0]) for result in results)

    def test_other_sources_are_other_programs(self, monkeypatch):
        names = []
        monkeypatch.setattr(compiled, "_PROGRAMS", {})
        monkeypatch.setattr(compiled, "_machine", lambda: "another")
        monkeypatch.setattr(compiled, "_compile", lambda *args: names.append(args[-1]) or 1 / 0)
        with pytest.raises(RuntimeError, match="could not compile"):
            assert_same(module_of("rnn_relu"), K, 2)
        assert not names[0].exists()
