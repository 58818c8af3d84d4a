"""Where experts are few, the best of several searches is taken, at the price that was asked for."""

from dataclasses import replace

import pytest

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.rebalancing import replan as module
from rq_ep.rebalancing.replan import moved_bytes, price_of, refined, replan
from rq_ep.strategies.rq import ReplicateQuantize
from tests.rebalancing.cases import problem_of, steps_SLE

RQ = ReplicateQuantize()


def changed(seed: int) -> tuple[PlacementProblem, Placement]:
    """A problem for a new domain, and the placement of the one before."""
    problem = problem_of(steps_SLE(2 * seed, 32, seed))
    current = RQ.place(problem)
    return replace(problem_of(steps_SLE(2 * seed + 1, 32, seed)), move_price=0.24), current


def objective(problem: PlacementProblem, current: Placement, placement: Placement) -> float:
    return placement.certificate["predicted"] + price_of(problem, moved_bytes(problem, current, placement))


def test_of_few_experts_the_best_of_several_searches_is_taken() -> None:
    gains = []
    for seed in range(4):
        problem, current = changed(seed)
        first = replan(problem, RQ, current)
        assert first is not None
        best = refined(problem, RQ, current, first)
        gains.append(objective(problem, current, first) - objective(problem, current, best))
    assert min(gains) >= 0
    assert max(gains) > 0.001


def test_where_moving_costs_nothing_and_where_experts_are_many_it_is_searched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, current = changed(0)
    first = replan(problem, RQ, current)
    assert first is not None
    assert refined(replace(problem, move_price=0.0), RQ, current, first) is first
    monkeypatch.setattr(module, "FEW_EXPERTS", problem.stats.num_experts - 1)
    assert refined(problem, RQ, current, first) is first


def test_without_a_placement_inside_the_limits_there_is_none() -> None:
    problem, current = changed(0)
    assert replan(replace(problem, budget_bytes_R=(1000,) * 4), RQ, current) is None
