"""The names, sizes, lengths and resets of most tests."""

import torch

T, B, I, H = 4, 3, 3, 5
NAMES = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
LENGTHS = torch.tensor([4, 1, 3])
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[[0, 1, 2], [1, 0, 2]] = True
