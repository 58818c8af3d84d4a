"""What is derived from a plan, and the one measure of balance."""

import numpy as np
import pytest

from rq_ep.core.plan import DispatchPlan, imbalance, intervals
from rq_ep.core.replicas import Replica, Replicas


@pytest.mark.parametrize(
    ("loads", "expected"),
    [([5, 5, 5, 5], 1.0), ([20, 0, 0, 0], 4.0), ([2, 1], 4 / 3), ([0, 0, 0], 1.0), ([7], 1.0), ([10**18, 10**18], 1.0)],
)
def test_imbalance_is_the_fullest_rank_over_the_mean(loads: list[int], expected: float) -> None:
    assert imbalance(np.array(loads)) == pytest.approx(expected)


def test_imbalance_is_taken_per_step_and_then_averaged() -> None:
    # Two steps that overload one rank each: the sum over steps would look perfect.
    steps = np.array([[20, 0], [0, 20]])
    assert np.mean([imbalance(loads_R) for loads_R in steps]) == 2
    assert imbalance(steps.sum(axis=0)) == 1


def test_pairs_between_ranks() -> None:
    replicas = Replicas.of([Replica(0, 0, "a"), Replica(0, 1, "a"), Replica(2, 1, "a")])
    plan = DispatchPlan(replicas, np.array([[1, 2, 3], [4, 5, 6], [0, 0, 7]]))
    assert plan.pairs_RR.tolist() == [[3, 0, 3], [9, 0, 6], [0, 0, 7]]
    assert plan.loads_R.tolist() == [12, 0, 16]


def test_intervals_cut_the_line_of_sources() -> None:
    counts_R, cuts = np.array([3, 0, 5]), np.array([0, 2, 2, 8])
    assert intervals(counts_R, cuts).tolist() == [[2, 0, 1], [0, 0, 0], [0, 0, 5]]
