"""The search against the optimal placement that stores low only experts of least damage, on small instances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.objective.precision import Formats, low_experts
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.solve import solve
from tests.solver.instances import RQ, problem, skewed
from tests.solver.oracle import best_placement

WORSE_BY = 0.05  # of the optimum, at most; mostly the search attains it


def test_knows_the_best_where_it_is_known() -> None:
    loads_SE = np.array([[2.1, 0.3, 0.3, 0.3]])
    alone = best_placement(loads_SE, np.array([2, 1, 1]), 1, 1, np.ones(4, np.int64), 0.0)
    assert alone.value == pytest.approx(2.1)
    shared = best_placement(loads_SE, np.array([2, 2, 2]), 1, 1, np.ones(4, np.int64), 0.0)
    assert shared.value == pytest.approx(1.0)
    assert shared.held_ER[0].sum() >= 2
    low = best_placement(loads_SE, np.array([4, 2, 2]), 2, 1, np.array([7, 1, 1, 1]), 0.2)
    assert low.low_E.sum() <= 2
    assert not low.low_E[0]
    assert low.value < alone.value
    with pytest.raises(ValueError, match="no placement fits"):
        best_placement(loads_SE, np.array([1, 1, 1]), 1, 1, np.ones(4, np.int64), 0.0)


@given(
    num_experts=st.integers(3, 6),
    num_ranks=st.integers(2, 3),
    num_steps=st.integers(1, 3),
    room=st.integers(0, 1500),
    share=st.sampled_from([0.0, 0.2, 0.5]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_search_comes_close_to_the_best_placement(
    num_experts: int, num_ranks: int, num_steps: int, room: int, share: float, seed: int
) -> None:
    counts_SE = skewed(num_experts, 4000, seed, num_steps)
    budget = (-(-num_experts // num_ranks) * 1000 + room,) * num_ranks
    instance = problem(counts_SE[:, None], num_ranks, budget=budget, max_low_precision_share=share)
    (steps,) = calibration_steps(instance, 64)
    placement = solve(instance, RQ, 64, 1000)
    pairs_E = instance.stats.counts.sum(axis=(0, 1))
    may_be_low_E = low_experts(instance, Formats.of(instance))[0]
    limits = steps.loads_SE, np.array(budget), 1000, 504, pairs_E, share
    best = best_placement(*limits, may_be_low_E, time_limit_s=10)
    assert LayerSplit.of(steps.loads_SE, best.held_ER).value == pytest.approx(best.value, abs=1e-3)
    predicted = placement.layers[0].predicted
    assert predicted <= best.value * (1 + WORSE_BY) + 1e-3  # whole pairs
    assert predicted >= best_placement(*limits, time_limit_s=10).bound - 1e-6
