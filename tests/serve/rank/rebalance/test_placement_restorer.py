"""The balance after ranks have left or come back, over a planner that is asked in this process."""

from dataclasses import replace
from typing import Any

import pytest

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.rebalancing.settle import SettleRequest, settle
from rq_ep.serve.messages import FromRank, MigrationPlanned
from rq_ep.serve.rank.rebalance.placement_restorer import PlacementRestorer
from rq_ep.serve.rank.rebalance.planner_process import Answer, PlannerFailure, Request
from rq_ep.sim.simulator import simulate
from rq_ep.solver.migration.members import lowered
from rq_ep.solver.migration.recover import recover
from rq_ep.strategies import make_strategy
from tests.rebalancing.cases import SIZES, problem_of, steps_SLE
from tests.serve.rank.rebalance.test_rebalance_controller import BEFORE

MEMBERS = (0, 1, 3)
LOADS = steps_SLE(0, 4, 0)
PROBLEM = replace(problem_of(LOADS), budget_bytes_R=(12_000,) * 4, time_limit_s=0.2)
RECOVERED = replace(recover(PROBLEM, BEFORE, MEMBERS, SIZES["bf16"]).placement, budget_bytes_R=PROBLEM.budget_bytes_R)


def imbalance(placement: Placement) -> float:
    of_members = lowered(placement, MEMBERS)
    return float(simulate(make_strategy("rq"), of_members, LOADS, "bf16").imbalances.mean())


class Planner:
    """Answers what it is asked, or with a failure, once it is told to."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.answer: Answer | None = None
        self.num_closed = 0

    def ask(self, request: Request) -> None:
        self.asked.append(request)

    def take(self) -> Answer | None:
        return self.answer

    def kill(self, reason: str) -> None: ...

    def close(self) -> None:
        self.num_closed += 1


class Stage:
    def __init__(self, placement: Placement, members: tuple[int, ...], strategy: str = "rq") -> None:
        self.planners: list[Planner] = []
        self.sent: list[FromRank] = []
        inputs: Any = Inputs(strategy)
        self.restorer = PlacementRestorer(inputs, placement, BEFORE, members, 7, None, self.sent.append, self.planner)

    def planner(self) -> Planner:
        self.planners.append(Planner())
        return self.planners[-1]


class Inputs:
    room_bytes = SIZES["bf16"]
    stats = PROBLEM.stats
    layout = None

    def __init__(self, strategy: str) -> None:
        self.strategy = make_strategy(strategy)

    def problem(self, placement: Placement, counts_LE: object) -> PlacementProblem:
        return PROBLEM


@pytest.mark.parametrize("members", [MEMBERS, (0, 1, 2, 3)])
def test_what_the_planner_finds_is_gone_to_in_rounds(members: tuple[int, ...]) -> None:
    stage = Stage(RECOVERED, members)
    (planner,) = stage.planners
    (request,) = planner.asked
    assert isinstance(request, SettleRequest)
    stage.restorer.tick()
    assert stage.sent == [], "there is no answer yet"
    found = planner.answer = settle(request)
    stage.restorer.tick()
    (planned,) = stage.sent
    assert isinstance(planned, MigrationPlanned)
    assert (planned.generation, planned.placement) == (7, found.placement.to_dict())
    assert planner.num_closed == 1, "its process has nothing more to do"
    if len(members) == 4:
        assert found.placement == BEFORE
    else:
        assert imbalance(found.placement) < imbalance(RECOVERED)


def test_nothing_is_planned_where_it_would_change_nothing_or_most() -> None:
    assert Stage(BEFORE, (0, 1, 2, 3)).planners == []
    assert Stage(RECOVERED, MEMBERS, "standard").planners == []


def test_a_planner_that_fails_is_named_and_one_of_other_members_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(RECOVERED, MEMBERS)
    stage.planners[0].answer = PlannerFailure("it has ended", True)
    stage.restorer.tick()
    stage.restorer.close()
    assert (stage.sent, stage.planners[0].num_closed) == ([], 1)
    assert "the placement stays as it is: it has ended" in caplog.text
    other = Stage(RECOVERED, MEMBERS)
    other.restorer.close()
    assert other.planners[0].num_closed == 1
