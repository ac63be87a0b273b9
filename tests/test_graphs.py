"""The stepwise loop in pieces, each run as a CUDA graph would run it.

What stands in for a graph calls the same function again, on the tensors that it was given when it
was captured. What the captured call owned is overwritten with NaN in between, as an allocator may.
"""

import pytest
import torch

from fusedrnn.kernels import graphs as graphs_module
from fusedrnn.kernels import stepwise_launch
from fusedrnn.kernels.graphs import Graphs
from fusedrnn.kernels.plan import CHIPS, Problem, plan
from fusedrnn.kernels.rows import Rows, origins_of, packed_rows
from fusedrnn.kernels.spec import SPECS, Weights

STEPS, T, B, H, P = 2, 5, 4, 6, 4  # two pieces, and a step that fills none
CELLS = tuple(SPECS)


class Recorder:
    """Captures by remembering the function, after the one run that warms up."""

    def __init__(self):
        self.captures, self.replays = 0, 0

    def __call__(self, run):
        run()
        self.captures += 1

        def replay():
            self.replays += 1
            run()

        return replay


def make(cell, D, dtype, seed, *, T=T, ragged=False, proj=False, bias=True):
    """Weights from one seed for all, the rest from ``seed``; by name."""
    counts, columns = SPECS[cell], P if proj else H
    torch.manual_seed(0)
    G = counts.gates

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    weights = [
        Weights(
            None,
            randn(G * H, columns) / 3,
            None,
            randn(G * H) if bias else None,
            randn(P, H) if proj else None,
        )
        for _ in range(D)
    ]
    torch.manual_seed(seed)
    two = counts.states == 2
    rows = Rows(T, B)
    if ragged:
        lengths = torch.tensor([T, 0, STEPS, T - 1]).clamp(max=T)
        rows = Rows(T, B, origins_of(T, B, D, "cpu", lengths, torch.rand(T, B) < 0.15))
    return weights, {
        "gx": randn(D, T * B, G * H),
        "h_0": randn(D, B, columns),
        "c_0": randn(D, B, H) if two else None,
        "d_out": randn(T * B, D * columns),
        "d_cs": randn(D, T * B, H) if two else None,
        "d_h_n": randn(D, B, columns),
        "d_c_n": randn(D, B, H) if two else None,
        "rows": rows,
    }


def run(cell, weights, given, **graphs):
    """Forward and backward; every result by name, and whatever the call owned."""
    counts, gx, rows = SPECS[cell], given["gx"], given["rows"]
    (D, _, columns), two, count = given["h_0"].shape, given["c_0"] is not None, gx.shape[1]
    saved = {
        "out": gx.new_empty(count, D * columns),
        "h_n": torch.empty_like(given["h_0"]),
        "c_n": torch.empty_like(given["c_0"]) if two else None,
        "gates": gx.new_empty(D, count, counts.saved * H),
        "cs": gx.new_empty(D, count, H) if two else None,
    }
    states = given["h_0"], given["c_0"]
    stepwise_launch.stepwise_fwd(cell, gx, weights, *states, *saved.values(), rows, **graphs)
    grads = {
        "dgates": gx.new_empty(D, count, counts.grad_tiles * H),
        "d_h_0": torch.empty_like(given["h_0"]),
        "d_c_0": torch.empty_like(given["c_0"]) if two else None,
    }
    stepwise_launch.stepwise_bwd(
        cell,
        *(given[name] for name in ("d_out", "d_cs", "d_h_n", "d_c_n")),
        weights,
        *states,
        *(saved[name] for name in ("out", "gates", "cs")),
        *grads.values(),
        rows,
        **graphs,
    )
    return {name: tensor for name, tensor in (saved | grads).items() if tensor is not None}


def spoil(*calls):
    for tensors in calls:
        for tensor in tensors.values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(torch.nan)


KINDS = {
    "fp32": {},
    "fp16": {"dtype": torch.float16},
    "ragged": {"ragged": True},
    "no-bias": {"bias": False},
}
CASES = [(cell, 2, "ragged") for cell in CELLS]
CASES += [("lstm", 1, "fp32"), ("gru_reset_before", 2, "fp16"), ("gru", 2, "no-bias")]


def check(cell, D, **kind):
    """Three calls, in the second of which the pieces are captured, each as it is without graphs."""
    kind = {"dtype": torch.float32} | kind
    recorder = Recorder()
    used = {"graph_steps": STEPS, "graphs": Graphs(recorder)}
    weights, _ = make(cell, D, seed=0, **kind)
    eps = torch.finfo(kind["dtype"]).eps
    for seed, steps in enumerate((STEPS, T, T + STEPS)):
        _, given = make(cell, D, seed=seed, T=steps, **kind)
        expected, got = run(cell, weights, given), run(cell, weights, given, **used)
        for name, tensor in expected.items():
            # Not bit for bit: a BLAS may add up in another order at another address.
            atol = 8 * eps * max(tensor.abs().flatten().tolist(), default=0.0)
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=f"{seed} {name}")
        spoil(given, got)
    assert recorder.captures == 2
    assert recorder.replays == 2 * (T // STEPS + (T + STEPS) // STEPS)


@pytest.mark.parametrize(("cell", "D", "kind"), CASES)
def test_pieces_are_the_loop(cell, D, kind):
    check(cell, D, **KINDS[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_with_a_projection(dtype):
    check("lstm", 2, dtype=dtype, proj=True)


def test_other_weights_get_a_graph_of_their_own():
    """Other contents do not: a graph reads what stands there when it runs."""
    recorder = Recorder()
    used = {"graph_steps": STEPS, "graphs": Graphs(recorder)}
    weights, given = make("gru", 1, torch.float32, 0)
    for _ in range(3):
        run("gru", weights, given, **used)
    assert recorder.captures == 2
    weights[0].w_hh.mul_(0.5)  # an optimizer's step
    expected = run("gru", weights, given)
    assert torch.equal(run("gru", weights, given, **used)["out"], expected["out"])
    assert recorder.captures == 2
    others = [w._replace(w_hh=w.w_hh * 3) for w in weights]
    for _ in range(2):
        expected = run("gru", others, given)
        assert torch.equal(run("gru", others, given, **used)["out"], expected["out"])
    assert recorder.captures == 4


def test_precision_is_frozen_in_a_graph():
    recorder = Recorder()
    used = {"graph_steps": STEPS, "graphs": Graphs(recorder)}
    weights, given = make("gru", 1, torch.float32, 0)
    switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32") * 3:
            switch.fp32_precision = precision
            run("gru", weights, given, **used)
    finally:
        switch.fp32_precision = before
    assert recorder.captures == 4


def test_only_so_many_graphs_are_kept():
    recorder = Recorder()
    used = {"graph_steps": STEPS, "graphs": Graphs(recorder, room=2)}
    weights, given = make("gru", 1, torch.float32, 0)
    others = [w._replace(w_hh=w.w_hh * 3) for w in weights]
    for each in (weights, weights, others, others, weights, weights):
        run("gru", each, given, **used)
    assert recorder.captures == 6


def test_what_no_graph_takes_runs_without():
    recorder = Recorder()
    weights, given = make("gru", 1, torch.float32, 0, T=STEPS - 1)
    for _ in range(3):
        run("gru", weights, given, graph_steps=STEPS, graphs=Graphs(recorder))  # too short
    weights, given = make("gru", 1, torch.float32, 0)
    sizes = torch.tensor([B] * (T - 1) + [1])
    count = int(sizes.sum())
    packed = {"rows": packed_rows(sizes, 1, torch.device("cpu"))}
    packed |= {"gx": given["gx"][:, :count].contiguous(), "d_out": given["d_out"][:count]}
    graphs = Graphs(recorder)
    for _ in range(3):
        run("gru", weights, given | packed, graph_steps=STEPS, graphs=graphs)
    assert recorder.captures == recorder.replays == 0


def test_the_plan_asks_for_graphs_where_the_host_is_slower():
    def steps(H, chip=CHIPS["sm_90"]):
        problem = Problem("lstm", H, H, 16, 1, torch.bfloat16, "ieee", True, proj_size=H // 2)
        chosen = plan(problem, chip)
        assert chosen.schedule == "stepwise"
        return chosen.graph_steps

    assert steps(512) == 32
    assert steps(8192) == 0
    assert steps(512, CHIPS["sm_90"]._replace(concurrent=False)) == 0  # the interpreter
    problem = Problem("lstm", 64, 64, 16, 1, torch.float64, "ieee", False)
    assert "CUDA graphs of 32 steps" in plan(problem, CHIPS["sm_90"]).describe()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("cell", CELLS)
def test_on_a_gpu(cell, device):
    weights, given = make(cell, 2, torch.float32, 0)

    def moved(tensor):
        return tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor

    weights = [Weights(*map(moved, w)) for w in weights]
    given = {name: moved(tensor) for name, tensor in given.items()}
    used = {"graph_steps": STEPS, "graphs": Graphs(graphs_module.capture)}
    expected = run(cell, weights, given)
    for _ in range(3):
        got = run(cell, weights, given, **used)
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name
