"""The same sequences one by one through torch.nn: what `lengths` and `reset` must equal."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.lessons.by_hand import gru_step


class LoopGRU(nn.GRU):
    """The textbook's GRU of one layer and direction, since torch has no operator for it."""

    def forward(self, input, hx):
        weights = [*self.parameters()]
        weights += [input.new_zeros(3 * self.hidden_size)] * (4 - len(weights))
        hs = [hx[0]]
        for x in input:
            hs.append(gru_step(x, hs[-1], *weights))
        return torch.stack(hs[1:]), hs[-1].unsqueeze(0)


def torch_module(cell: str, input_size: int, hidden_size: int, **kwargs) -> nn.RNNBase:
    if cell.startswith("rnn"):
        return nn.RNN(input_size, hidden_size, nonlinearity=cell[4:], **kwargs)
    classes = {"lstm": nn.LSTM, "gru": nn.GRU, "gru_reset_before": LoopGRU}
    return classes[cell](input_size, hidden_size, **kwargs)


def one_by_one(module, x, hx, lengths=None, reset=None):
    """Runs each piece of each sequence by itself; returns the output and the final states.

    x: ``[T, B, I]``; hx: a tuple of states ``[L*D, B, H]``; lengths and reset as of the modules.
    """
    T, B, _ = x.shape
    D = 2 if module.bidirectional else 1
    finals = [[None] * B for _ in range(module.num_layers * D)]
    outputs = []
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        begins = [] if reset is None else [t for t in range(n) if reset[t, b]]
        layer_input = x[:n, b : b + 1]
        for layer in range(module.num_layers):
            columns = []
            for d in range(D):
                row = layer * D + d
                start = tuple(state[row : row + 1, b : b + 1] for state in hx)
                out, finals[row][b] = _direction(module, layer_input, start, begins, layer, d)
                columns.append(out)
            layer_input = torch.cat(columns, -1)
        rest = x.new_zeros(T - n, 1, layer_input.shape[-1])
        outputs.append(torch.cat((layer_input, rest)))
    states = tuple(
        torch.cat([torch.cat([final[i] for final in of_row], 1) for of_row in finals])
        for i in range(len(hx))
    )
    return torch.cat(outputs, 1), states


def _direction(module, x: Tensor, state: tuple, begins: list[int], layer: int, d: int):
    n, H, P = len(x), module.hidden_size, module.proj_size
    if n == 0:
        return x.new_zeros(0, 1, P or H), state
    suffix = f"_l{layer}" + ("_reverse" if d else "")
    names = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())]
    names += ["weight_hr"] if P else []
    options = {"bias": module.bias} | ({"proj_size": P} if P else {})
    single = torch_module(module._cell, x.shape[-1], H, **options).to(x)
    weights = {f"{name}_l0": getattr(module, name + suffix) for name in names}
    borders = [0, *(t for t in begins if t), n]
    pieces = list(pairwise(borders))
    if d == 0 and 0 in begins:
        state = tuple(torch.zeros_like(s) for s in state)
    outs = []
    for first, end in pieces if d == 0 else reversed(pieces):
        piece = x[first:end] if d == 0 else x[first:end].flip(0)
        given = state if len(state) == 2 else state[0]
        out, final = torch.func.functional_call(single, weights, (piece, given))
        outs.append(out if d == 0 else out.flip(0))
        last = final if isinstance(final, tuple) else (final,)
        state = tuple(torch.zeros_like(s) for s in last)
    return torch.cat(outs if d == 0 else outs[::-1]), last
