"""Where experts are few, the best of several searches is taken, at the price that was asked for."""

from dataclasses import replace

import pytest

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.rebalancing import replan as module
from rq_ep.rebalancing.replan import moved_bytes, price_of, replan
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


def test_of_few_experts_the_best_of_several_searches_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = []
    for seed in range(4):
        problem, current = changed(seed)
        best = replan(problem, RQ, current)
        with monkeypatch.context() as patch:
            patch.setattr(module, "FEW_EXPERTS", 0)
            single = replan(problem, RQ, current)
        assert best is not None
        assert single is not None
        gains.append(objective(problem, current, single) - objective(problem, current, best))
    assert min(gains) >= 0
    assert max(gains) > 0.001


def test_without_a_placement_inside_the_limits_there_is_none() -> None:
    problem, current = changed(0)
    assert replan(replace(problem, budget_bytes_R=(1000,) * 4), RQ, current) is None
