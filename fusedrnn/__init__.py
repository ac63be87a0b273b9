"""Fused LSTM, GRU and RNN: drop-in modules for ``torch.nn``'s, on Triton kernels."""

from .dispatch import explain, use_backend, use_precision
from .functional import gru, lstm, rnn
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .patching import patch, replace_modules, to_torch, unpatch
from .states import States
from .stream import Stream

__version__ = "0.1.0"

__all__ = [
    "GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "States", "Stream", "__version__",
    "explain", "gru", "lstm", "patch", "replace_modules", "rnn", "to_torch", "unpatch",
    "use_backend", "use_precision",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
