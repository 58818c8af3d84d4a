"""The state of re-placements on rank 0, over a planner and ranks that are scripts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.rebalancing.rebalancer import Decision, Rebalancer, RebalanceRequest
from rq_ep.serve.rank.rebalance.planner_process import Answer, PlannerFailure, Request
from rq_ep.serve.rank.rebalance.rebalance_controller import (
    ANOTHER_RANK,
    BACK_OFF_S,
    MAX_BACK_OFF_S,
    PLANNER_TIMEOUT_S,
    RebalanceController,
)
from rq_ep.solver.migration.move_rounds import move_rounds
from rq_ep.strategies import make_strategy
from tests.rebalancing.cases import NUM_EXPERTS, NUM_LAYERS, NUM_RANKS, SIZES, problem_of, steps_SLE

WINDOW, INTERVAL = 64, 16


def placed(shift: int) -> Placement:
    """Standard EP's blocks, moved on by some ranks."""
    rank_of = [(expert * NUM_RANKS // NUM_EXPERTS + shift) % NUM_RANKS for expert in range(NUM_EXPERTS)]
    replicas = [Replica(rank, expert, "bf16") for expert, rank in enumerate(rank_of)]
    layers = tuple(LayerPlacement.even(layer, NUM_EXPERTS, replicas) for layer in range(NUM_LAYERS))
    size = NUM_EXPERTS // NUM_RANKS * NUM_LAYERS * SIZES["bf16"]
    return Placement(layers, "rq", Topology(NUM_RANKS), (size,) * NUM_RANKS, (size,) * NUM_RANKS)


BEFORE, AFTER = placed(0), placed(1)
ROUNDS = tuple(move_rounds([list(layer.replicas) for layer in BEFORE.layers], AFTER, SIZES, "bf16", SIZES["bf16"]))
MOVES = Decision(AFTER, "better", None, 2 * NUM_EXPERTS * SIZES["bf16"], ROUNDS)
STAYS = Decision(None, "gains less than 0.020")


class Stage:
    """A controller, its planner, its ranks and its clock."""

    def __init__(self) -> None:
        rule = replace(make_strategy("rq").rebalance_rule, window=WINDOW, interval=INTERVAL)
        rebalancer = Rebalancer(problem_of(steps_SLE(0, 1, 0)), make_strategy("rq"), BEFORE, rule)
        self.now_s = 0.0
        self.asked: list[RebalanceRequest] = []
        self.answers: list[Answer] = []
        self.num_kills = 0
        self.begun: list[int] = []
        self.aborted: list[int] = []
        self.rounds_served: list[tuple[int, int]] = []
        self.served_: list[tuple[int, Placement]] = []
        self.replies: list[tuple[int, str | None, Mapping[str, Any] | None]] = []
        self.warnings: list[str] = []
        self.layers = list(BEFORE.layers)
        self.controller = RebalanceController(rebalancer, SIZES, self, self, lambda: self.now_s)

    # The planner

    def ask(self, request: Request) -> None:
        assert isinstance(request, RebalanceRequest)
        self.asked.append(request)

    def take(self) -> Answer | None:
        return self.answers.pop(0) if self.answers else None

    def kill(self, reason: str) -> None:
        self.num_kills += 1

    def close(self) -> None: ...

    # The ranks

    def begin(self, generation: int, decision: Decision) -> None:
        self.begun.append(generation)

    def abort(self, generation: int, reason: str) -> None:
        self.aborted.append(generation)

    def round_served(self, generation: int, num_rounds: int) -> None:
        self.rounds_served.append((generation, num_rounds))

    def served(self, generation: int, placement: Placement) -> None:
        self.served_.append((generation, placement))

    def answer(self, number: int, refusal: str | None, decision: Mapping[str, Any] | None) -> None:
        self.replies.append((number, refusal, decision))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    # What happens

    def steps(self, number: int) -> None:
        for counts_LE in steps_SLE(0, number, 1, 64):
            self.controller.observe(counts_LE, 0)
        self.controller.step()

    def decides(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.controller.step()

    def commits_round(self, number: int) -> None:
        self.layers = ROUNDS[number].applied_to(self.layers)
        self.controller.on_round({position: self.layers[position] for position in ROUNDS[number].layers})

    @property
    def state(self) -> str:
        return self.controller.status.state


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_decision_is_asked_for_when_it_is_due_and_once(stage: Stage) -> None:
    stage.steps(INTERVAL - 1)
    assert (stage.state, stage.asked) == ("idle", [])
    stage.steps(1)
    stage.steps(5 * INTERVAL)
    assert stage.state == "planning"
    assert len(stage.asked) == 1
    stage.decides(STAYS)
    assert stage.state == "idle"
    assert stage.controller.status.results == {"stayed": 1}
    assert stage.controller.status.decision["reason"] == STAYS.reason
    assert (stage.begun, stage.served_) == ([], [])


def test_an_accepted_placement_is_moved_to_round_by_round_and_then_serves(stage: Stage) -> None:
    stage.steps(INTERVAL)
    stage.decides(MOVES)
    assert (stage.state, stage.begun) == ("moving", [1])
    total = NUM_LAYERS * NUM_EXPERTS * SIZES["bf16"]
    status = stage.controller.status
    assert (status.done_bytes, status.left_bytes, status.moved_bytes) == (0, total, 0)
    for number in range(len(ROUNDS)):
        stage.commits_round(number)
        assert stage.rounds_served[-1] == (1, number + 1)
    stage.controller.on_end(True, "")
    assert stage.served_[-1] == (1, AFTER)
    status = stage.controller.status
    assert (status.state, status.moved_bytes, status.results) == ("idle", total, {"committed": 1})
    stage.steps(WINDOW - 1)
    assert len(stage.asked) == 1, "the next decision waits for a whole window"
    stage.steps(1)
    assert stage.asked[1].current is AFTER


def test_what_serves_after_an_abort_in_the_middle_is_the_current_placement(stage: Stage) -> None:
    stage.steps(INTERVAL)
    stage.decides(MOVES)
    stage.commits_round(0)
    stage.controller.command(7, "abort")
    assert (stage.state, stage.aborted) == ("aborting", [1])
    assert stage.replies == [(7, None, None)]
    stage.controller.on_end(False, "it was aborted by a request")
    assert stage.state == "idle"
    generation, placement = stage.served_[-1]
    assert generation == 1
    assert list(placement.layers) == stage.layers
    assert sum(placement.bytes_R) == sum(len(layer.replicas) for layer in stage.layers) * SIZES["bf16"]
    assert stage.controller.status.results == {"aborted": 1}
    stage.now_s += BACK_OFF_S
    stage.steps(WINDOW)
    assert stage.asked[-1].current == placement


def test_an_abort_while_planning_drops_the_answer(stage: Stage) -> None:
    stage.steps(INTERVAL)
    stage.controller.command(1, "abort")
    assert stage.state == "aborting"
    stage.decides(MOVES)
    assert (stage.state, stage.begun, stage.aborted) == ("idle", [], [])


def test_one_thing_is_done_at_a_time(stage: Stage) -> None:
    stage.controller.command(1, "abort")
    stage.controller.command(2, "start")
    stage.controller.command(3, "start")
    stage.controller.command(4, "dry_run")
    assert [(number, refusal is None) for number, refusal, _ in stage.replies] == [
        (1, False), (2, True), (3, False), (4, False),
    ]  # fmt: skip
    assert len(stage.asked) == 1


def test_a_dry_run_answers_with_the_moves_and_moves_nothing(stage: Stage) -> None:
    stage.controller.command(5, "dry_run")
    assert stage.replies == []
    stage.decides(MOVES)
    ((number, refusal, decision),) = stage.replies
    assert (number, refusal) == (5, None)
    assert decision is not None
    assert sum(move["do"] == "receive" for move in decision["moves"]) == NUM_LAYERS * NUM_EXPERTS
    assert (stage.state, stage.begun) == ("idle", [])


def test_a_planner_that_dies_is_named_and_asked_again_an_interval_later(stage: Stage) -> None:
    stage.steps(INTERVAL)
    stage.decides(PlannerFailure("the planner process has ended (exit status -9)", True))
    status = stage.controller.status
    assert (status.state, status.results) == ("idle", {"failed": 1})
    assert "-9" in status.problem
    assert "-9" in stage.warnings[0]
    stage.now_s += BACK_OFF_S
    stage.steps(INTERVAL)
    assert len(stage.asked) == 2


def test_a_file_that_cannot_be_written_ends_no_decision(stage: Stage) -> None:
    stage.steps(INTERVAL)
    stage.decides(PlannerFailure("p.json: cannot be written", False))
    assert (stage.state, stage.controller.status.problem) == ("planning", "p.json: cannot be written")


def test_a_planner_that_is_silent_is_ended(stage: Stage) -> None:
    stage.steps(INTERVAL)
    stage.now_s = 30.0
    stage.controller.step()
    assert (stage.controller.status.progress_s, stage.num_kills) == (30.0, 0)
    stage.now_s = PLANNER_TIMEOUT_S + 1
    stage.controller.step()
    assert stage.num_kills == 1


def test_progress_is_counted_from_the_last_round(stage: Stage) -> None:
    assert stage.controller.status.progress_s == 0
    stage.steps(INTERVAL)
    stage.decides(MOVES)
    stage.now_s = 4.0
    stage.commits_round(0)
    stage.now_s = 15.0
    assert stage.controller.status.progress_s == 11.0
    assert np.isclose(stage.controller.status.done_bytes, ROUNDS[0].received_bytes_R(NUM_RANKS, SIZES).sum())


def test_after_failures_in_a_row_nothing_is_decided_for_twice_as_long_each_time_until_one_succeeds(
    stage: Stage,
) -> None:
    waits: list[float] = []
    for number in range(1, 11):
        stage.steps(WINDOW)
        assert len(stage.asked) == number
        if number % 2:
            stage.decides(MOVES)
            stage.controller.on_end(False, "rank 0: expert 3 of layer 1 arrived damaged")
        else:
            stage.decides(PlannerFailure("the planner process has ended (exit status -9)", True))
        status = stage.controller.status
        assert (status.state, status.num_failures) == ("idle", number)
        waits.append(status.retry_s)
        stage.now_s += status.retry_s - 0.1
        stage.steps(2 * WINDOW)
        assert len(stage.asked) == number, "it is due, and it is too early"
        stage.now_s += 0.1
    assert waits == [min(BACK_OFF_S * 2**at, MAX_BACK_OFF_S) for at in range(10)]
    assert "arrived damaged; nothing is decided for 10 s, after 1 failures in a row" in stage.warnings[0]
    stage.steps(WINDOW)
    stage.decides(MOVES)
    stage.controller.on_end(True, "")
    assert (stage.controller.status.num_failures, stage.controller.status.retry_s) == (0, 0.0)
    stage.steps(WINDOW)
    stage.decides(PlannerFailure("no memory", True))
    assert stage.controller.status.retry_s == BACK_OFF_S


def test_a_user_need_not_wait_after_a_failure(stage: Stage) -> None:
    stage.steps(INTERVAL)
    stage.decides(PlannerFailure("no memory", True))
    stage.controller.command(1, "start")
    assert (stage.state, len(stage.asked)) == ("planning", 2)


@pytest.mark.parametrize("is_early", [True, False])
def test_the_reason_of_another_rank_is_shown(stage: Stage, is_early: bool) -> None:
    stage.steps(INTERVAL)
    stage.decides(MOVES)
    stage.controller.on_given_up(0, "rank 2: of another migration")
    if is_early:
        stage.controller.on_given_up(1, "rank 1: no space")
    stage.controller.on_end(False, "")
    if not is_early:
        assert stage.controller.status.problem == ANOTHER_RANK
        stage.controller.on_given_up(1, "rank 1: no space")
    stage.controller.on_given_up(1, "rank 2: another rank may have ended")
    assert stage.controller.status.problem == "rank 1: no space"
    assert "rank 1: no space" in stage.warnings[-1]
