"""What a search begins with: bounded without a split, filled ahead of turns, and coarsely where time is short."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rq_ep.core.problem import contiguous
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.search import greedy_fill, initial_solutions
from rq_ep.solver.search.initial_solutions import constructed, filled_in_time, known_solutions, least_value
from rq_ep.solver.search.layer_growth import Growth
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.solver.search.search_state import SearchContext, SearchState
from rq_ep.solver.workers import workers
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


def test_replicas_that_are_added_ahead_are_those_that_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts_SLE = np.stack([skewed(16, 4000, seed, 6) for seed in range(24)], axis=1)
    instance = problem(counts_SLE, 4, max_low_precision_share=0.05)
    context, steps = SearchContext.of(instance, 0, None), calibration_steps(instance, 6)
    solution, held, numbers = constructed(context, steps)[0][-1], [], []
    grown = Growth.grown

    def counted(self: Growth, turns: Any, limits: LayerLimits, *more: Any) -> Growth:
        growth = grown(self, turns, limits, *more)
        if turns:  # else nothing has been added yet
            numbers[-1].append((len(turns), len(growth.turns)))
        return growth

    monkeypatch.setattr(Growth, "grown", counted)
    monkeypatch.setattr(greedy_fill, "FOR_WORKERS", 0)
    monkeypatch.setattr(greedy_fill, "SPREAD", -3)  # bold, so that some of it does not fit in the end
    for ahead, number in ((1, 1), (3, 1), (3, 3)):
        monkeypatch.setattr(greedy_fill, "AHEAD", ahead)
        numbers.append([])
        with workers(number) as threads:
            state = SearchState(replace(context, workers=threads), steps, solution).add_replicas()
        held.append(state.held_LER)
        assert 0 <= state.free_R.min() <= state.free_R.max() < 1000  # others took the bytes of some that were chosen
    assert set(numbers[0]) == {(1, 1)}
    for of_run in numbers[1:]:
        assert max(after - before for before, after in of_run) > 1
        assert any(before == after > 1 for before, after in of_run)  # and some were given up halfway
    for others_LER in held[1:]:
        np.testing.assert_array_equal(others_LER, held[0])


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
