"""What a search begins with: bounded without a split, and filled coarsely where time is short."""

import time
from dataclasses import replace

import numpy as np
import pytest

from rq_ep.core.problem import contiguous
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.search import initial_solutions
from rq_ep.solver.search.initial_solutions import constructed, filled_in_time, known_solutions, least_value
from rq_ep.solver.search.search_state import SearchContext, SearchState
from tests.solver.instances import problem, skewed

INSTANCE = problem(np.stack([skewed(16, 4000, seed, 20) for seed in range(3)], axis=1), 4)
STEPS = calibration_steps(INSTANCE, 20)


def test_no_state_is_below_the_bound_that_takes_no_split() -> None:
    context = SearchContext.of(INSTANCE, 100, None)
    blocks = known_solutions(context, [contiguous(INSTANCE)])[0]
    assert np.isclose(least_value(context, STEPS, blocks), SearchState(context, STEPS, blocks).value)
    for solution in constructed(context, STEPS)[0]:
        state = SearchState(context, STEPS, solution).add_replicas()
        assert least_value(context, STEPS, state.solution) <= state.value + 1e-9


def test_with_little_time_the_bytes_are_filled_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SearchContext.of(INSTANCE, 100, None)
    limited = replace(context, effort=replace(context.effort, deadline=time.monotonic() + 3600))
    solution = constructed(context, STEPS)[0][-1]
    assert filled_in_time(context, STEPS, solution) is solution
    assert filled_in_time(limited, STEPS, solution) is solution  # much time
    monkeypatch.setattr(initial_solutions, "TIMES_COARSE", 10**9)
    coarse = SearchState(context, STEPS, filled_in_time(limited, STEPS, solution))
    assert coarse.value < SearchState(context, STEPS, solution).value - 0.1
    assert (coarse.free_R >= 0).all()
