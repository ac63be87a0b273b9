"""Makes calls run by a plan or a schedule, to try what the planner would not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

import fusedrnn
from fusedrnn import dispatch, known, launches
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import Chip, Plan, Problem

Planner = Callable[[Problem, Chip], tuple[Plan, ...]]
#: What asks for plans, and what remembers calls together with theirs.
_PLACES = (
    (dispatch, "plan_stack"), (launches, "plan_stack"), (launches, "_launches"),
    (known, "_KNOWN"),
)  # fmt: skip


class _Memory(NamedTuple):
    """A planner, and what stands for those memories: theirs are of other plans."""

    planner: Planner
    launches: Callable
    known: dict

    @classmethod
    def of(cls, planner: Planner) -> _Memory:
        return cls(planner, lru_cache(4096)(launches._launches.__wrapped__), {})


@contextmanager
def _planned(memory: _Memory) -> Iterator[None]:
    """Within, whoever asks for a plan asks this planner."""
    before = [getattr(module, name) for module, name in _PLACES]
    new = memory.planner, memory.planner, memory.launches, memory.known
    for (module, name), value in zip(_PLACES, new, strict=True):
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in zip(_PLACES, before, strict=True):
            setattr(module, name, value)


@contextmanager
def forced(plan: Plan) -> Iterator[None]:
    """Within, whoever asks for a plan is given this one. For modules of one layer."""
    with _planned(_Memory.of(lambda problem, chip: (plan,))):
        yield


@contextmanager
def scheduled(name: str) -> Iterator[None]:
    """Within, every layer runs on triton by one schedule, each in a launch of its own.

    A call that the schedule does not take raises NotImplementedError with its reason.

    Args:
        name: ``"resident"``, ``"cooperative"`` or ``"stepwise"``.
    """
    with fusedrnn.use_backend("triton"), _planned(_of_schedule(name)):
        yield


@cache
def _of_schedule(name: str) -> _Memory:
    choose: Callable[[Problem, Chip], Plan] = getattr(planning, name)

    def planner(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
        first = problem._replace(layers=1)
        width = problem.directions * (problem.proj_size or problem.hidden_size)
        above = first._replace(input_size=width)
        return (choose(first, chip), *(choose(above, chip) for _ in range(problem.layers - 1)))

    return _Memory.of(planner)
