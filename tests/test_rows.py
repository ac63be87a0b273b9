"""The rows of a call and the origins of its steps."""

import torch

from fusedrnn.kernels.rows import (
    INITIAL,
    PREVIOUS,
    SKIPPED,
    ZERO,
    origins_of,
    packed_rows,
    packed_table,
)

CPU = torch.device("cpu")


def test_origins_of_the_documented_example():
    """The table in docs/design.md."""
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[1, 0] = True
    origins = origins_of(4, 3, 2, CPU, torch.tensor([3, 0, 2]), reset)
    forward = [[INITIAL, ZERO, PREVIOUS, SKIPPED], [SKIPPED] * 4,
               [INITIAL, PREVIOUS, SKIPPED, SKIPPED]]  # fmt: skip
    backward = [[ZERO, PREVIOUS, INITIAL, SKIPPED], [SKIPPED] * 4,
                [PREVIOUS, INITIAL, SKIPPED, SKIPPED]]  # fmt: skip
    assert origins.transpose(1, 2).tolist() == [forward, backward]


def test_lengths_are_clamped_and_resets_after_the_end_ignored():
    reset = torch.tensor([[False, False], [False, True], [True, True]])
    origins = origins_of(3, 2, 1, CPU, torch.tensor([9, -1]), reset)
    assert origins[0].T.tolist() == [[INITIAL, PREVIOUS, ZERO], [SKIPPED] * 3]
    late = origins_of(3, 2, 2, CPU, torch.tensor([2, 1]), reset)
    assert torch.equal(late, origins_of(3, 2, 2, CPU, torch.tensor([2, 1])))


def test_a_reset_of_the_first_step_hides_the_initial_state():
    reset = torch.tensor([[True], [False]])
    assert origins_of(2, 1, 2, CPU, None, reset).flatten().tolist() == [
        *(ZERO, PREVIOUS),
        *(PREVIOUS, INITIAL),
    ]


def test_rows_of_packed_input():
    sizes = torch.tensor([3, 2, 2, 1])
    rows = packed_rows(sizes, packed_table(sizes, 3, CPU), 2)
    assert rows.total == 8
    assert [(span.start, span.stop) for span in rows.spans()] == [(0, 3), (3, 5), (5, 7), (7, 8)]
    assert rows.starts.tolist() == [0, 3, 5, 7]
    assert rows.origins[0].tolist() == [[3, 3, 3], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert rows.origins[1].tolist() == [[1, 1, 3], [1, 1, 0], [1, 3, 0], [3, 0, 0]]


def test_rows_of_sequences_without_any_step():
    sizes = torch.tensor([1])
    rows = packed_rows(sizes, packed_table(sizes, 2, CPU), 1)
    assert rows.origins.tolist() == [[[INITIAL, SKIPPED]]]
