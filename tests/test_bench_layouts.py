"""Peers that need a GPU, in their own documented equations on the CPU: weights, states, shapes."""

from __future__ import annotations

import peer_stubs
import pytest
import torch

from bench import peers, peers_cuda
from bench.cases import CELLS, Workload
from bench.gate import Gate
from bench.peer import both, reordered
from bench.providers import PROVIDERS, Provider
from bench.run import Settings, Subject

CPU = torch.device("cpu")
BOTH_WAYS = Workload("both", "toy", "none", T=4, B=3, I=5, H=6, layers=2, bidirectional=True)
PEERS = ("flashrnn", "haste", "torchrl")


def judged(name, cell):
    subject = Subject(BOTH_WAYS, cell, Settings(CPU))
    return Gate(BOTH_WAYS, cell, subject.weights, subject.gate_input()).judge(name)


@pytest.fixture
def written(monkeypatch):
    peer_stubs.install(monkeypatch)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", PEERS)
def test_an_adapter_agrees_with_the_equations_its_peer_documents(name, cell, written):
    """Outputs, final states and all gradients, in torch's layout, within the error budget."""
    verdict = judged(name, cell)
    assert verdict.ok, verdict.failures
    assert {"d_input", "d_h_0", "d_weight_hh_l1_reverse", "d_bias_ih_l0"} <= {
        budget.name for budget in verdict.budgets
    }


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["flashrnn", "haste"])
def test_another_order_of_gates_is_found(name, cell, written, monkeypatch):
    """Every neighbouring pair of gates swapped, in all four tensors: a permutation all the same."""
    peer = {"flashrnn": peers_cuda.FlashRNN, "haste": peers_cuda.Haste}[name]
    gates = 4 if cell == "lstm" else 3
    for n in range(gates - 1):
        order = list(range(gates))
        order[n : n + 2] = order[n + 1], order[n]

        class Swapped(peer):
            def convert(self, *weights, order=tuple(order)):
                return super().convert(*(reordered(t, gates, order) for t in weights))

        monkeypatch.setitem(PROVIDERS, name, Provider(both(Swapped)))
        assert not judged(name, cell).ok, order


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["flashrnn", "haste"])
def test_a_transposed_recurrent_matrix_is_found(name, cell, written, monkeypatch):
    peer = {"flashrnn": peers_cuda.FlashRNN, "haste": peers_cuda.Haste}[name]

    class Transposed(peer):
        def convert(self, w_ih, w_hh, b_ih, b_hh):
            square = torch.cat([part.T for part in w_hh.split(self.hidden_size)])
            return super().convert(w_ih, square, b_ih, b_hh)

    monkeypatch.setitem(PROVIDERS, name, Provider(both(Transposed)))
    assert not judged(name, cell).ok


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flashrnn's imports
@pytest.mark.parametrize("cell", CELLS)
def test_flashrnns_own_equations_on_the_cpu_agree(cell, monkeypatch):
    """Its backend ``vanilla``, which is plain torch, through our adapter."""
    pytest.importorskip("flashrnn", reason="flashrnn is not installed")
    monkeypatch.setattr(peers_cuda.FlashRNN, "backend", "vanilla")
    verdict = judged("flashrnn", cell)
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize("cell", CELLS)
def test_keras_weights_by_its_equations(cell):
    """kernel ``[I, G H]``: i, f, c, o; of the GRU z, r, h with biases ``[2, 3 H]``, reset after."""

    class Written(peers.Keras):
        def layer(self, weights, x, states):
            kernel, recurrent, bias = weights
            outputs, states = [], list(states)
            for x_t in x.unbind(1):
                h = states[0]
                if self.mode == "LSTM":
                    i, f, c, o = (x_t @ kernel + h @ recurrent + bias).chunk(4, 1)
                    states[1] = f.sigmoid() * states[1] + i.sigmoid() * c.tanh()
                    states[0] = o.sigmoid() * states[1].tanh()
                else:
                    z, r, n = (x_t @ kernel + bias[0]).chunk(3, 1)
                    z_h, r_h, n_h = (h @ recurrent + bias[1]).chunk(3, 1)
                    z = (z + z_h).sigmoid()
                    states[0] = z * h + (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh()
                outputs.append(states[0])
            return torch.stack(outputs, 1), tuple(states)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(PROVIDERS, "keras", Provider(both(Written)))
        verdict = judged("keras", cell)
    assert verdict.ok, verdict.failures
