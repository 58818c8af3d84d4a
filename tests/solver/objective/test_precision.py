"""Which experts are stored in few bits, by hand-made statistics."""

from dataclasses import replace

import numpy as np

from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.precision import Formats, low_experts

STATS = ExpertStats(
    counts=np.array([[[10, 10, 10, 10], [10, 10, 10, 10]]]),
    formats=("bf16", "int8"),
    native_format="bf16",
    expert_bytes={"bf16": 200, "int8": 104},
    importance=np.array([[4.0, 3, 2, 1], [400, 300, 100, 200]]),
    error=np.stack([np.zeros((2, 4)), np.full((2, 4), 0.01)], axis=2),
    visits=np.full((2, 4), 10),
)


def chosen(stats: ExpertStats, share: float) -> list[list[int]]:
    problem = PlacementProblem(stats, Topology(2), formats=("bf16", "int8"), max_low_precision_share=share)
    return [np.flatnonzero(low_E).tolist() for low_E in low_experts(problem, Formats.of(problem))]


def test_layers_are_compared_by_shares_of_their_damage() -> None:
    assert chosen(STATS, 0.25) == [[3], [2]]
    assert chosen(STATS, 0.5) == [[2, 3], [2, 3]]
    assert chosen(STATS, 0.0) == [[], []]


def test_error_counts_as_much_as_importance() -> None:
    error = STATS.error.copy()
    error[0, 3, 1] = 0.1
    assert chosen(replace(STATS, error=error), 0.25) == [[2], [2]]


def test_measured_answers_go_before_both_and_over_all_layers() -> None:
    kl = np.zeros((2, 4, 2))
    kl[..., 1] = [[1, 2, 3, 4], [50, 60, 70, 80]]
    assert chosen(replace(STATS, kl=kl), 0.5) == [[0, 1, 2, 3], []]


def test_an_expert_that_was_never_visited_is_never_stored_low() -> None:
    visits = STATS.visits.copy()
    visits[0, 3] = 0
    assert chosen(replace(STATS, visits=visits), 0.25) == [[2], [2]]
    assert 3 not in chosen(replace(STATS, visits=visits), 1.0)[0]
    assert chosen(replace(STATS, visits=None), 0.25) == [[3], [2]]
