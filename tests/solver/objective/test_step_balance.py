"""The balance of a step is what the strategy's own planner makes of it."""

import numpy as np
import pytest

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import imbalance
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.objective import evaluator_of
from rq_ep.solver.objective.planner_replay import PlannerReplay
from rq_ep.solver.objective.step_balance import SPLITS, EvenSplit, ExactSplit, SplitEvaluator
from rq_ep.strategies import make_strategy
from tests.solver.instances import problem, random_replicas, skewed


@pytest.mark.parametrize(("strategy", "rule"), [("rq", "exact"), ("eplb", "even"), ("standard", "home")])
def test_the_planner_balances_as_its_rule_says(strategy: str, rule: str) -> None:
    replicas = random_replicas(12, 4, 0 if rule == "home" else 9, seed=3)
    counts_SE = skewed(12, 500, seed=1, num_steps=7)
    counts_SE[2] = 0
    counts_SE[2, 5] = 3
    layer = LayerPlacement.even(0, 12, replicas)
    planner = make_strategy(strategy).planner(layer, Topology(4))
    plans = [planner(np.array([counts_E, *np.zeros((3, 12), np.int64)])) for counts_E in counts_SE]
    split = evaluator_of(problem(counts_SE[:, None], 4), make_strategy(strategy))
    assert split.rule == rule
    assert rule in SPLITS
    balance = split.by_pairs(layer, counts_SE)
    np.testing.assert_allclose(balance.ratio_S, [imbalance(plan.loads_R) for plan in plans])
    pairs_E = np.bincount(replicas.experts_P, balance.pairs_P)
    assert pairs_E.tolist() == counts_SE.sum(axis=0).tolist()


@pytest.mark.parametrize(
    ("strategy", "rule"), [("rq", ExactSplit(4)), ("eplb", EvenSplit(4)), ("standard", EvenSplit(4))]
)
def test_a_replayed_planner_is_evaluated_as_by_its_rule(strategy: str, rule: SplitEvaluator) -> None:
    counts_SE = skewed(12, 500, seed=1, num_steps=7)
    layer = LayerPlacement.even(0, 12, random_replicas(12, 4, 0 if strategy == "standard" else 9, seed=3))
    replay = PlannerReplay(make_strategy(strategy), Topology(4), None)
    np.testing.assert_allclose(replay.by_pairs(layer, counts_SE).ratio_S, rule.by_pairs(layer, counts_SE).ratio_S)
    if strategy == "eplb":
        weight_SE = np.linspace(1, 3, 12) * counts_SE
        read_SE = np.broadcast_to(np.linspace(5, 9, 12), counts_SE.shape)
        for ours, theirs in (
            (replay.by_pairs(layer, counts_SE, weight_SE), rule.by_pairs(layer, counts_SE, weight_SE)),
            (replay.by_reading(layer, counts_SE, read_SE), rule.by_reading(layer, counts_SE, read_SE)),
        ):
            np.testing.assert_allclose(ours.ratio_S, theirs.ratio_S, rtol=0.05)  # whole pairs, or parts of them
            assert ours.pairs_P.tolist() == theirs.pairs_P.tolist()


def test_borrowed_experts_count_where_they_compute() -> None:
    lender = make_strategy("llep", min_tokens_per_gemm=1, fallback_ratio=1.0)
    counts_SE = np.array([[80, 0, 0, 0], [10, 10, 10, 10]])
    layer = LayerPlacement.even(0, 4, random_replicas(4, 4, 0, seed=0))
    balance = PlannerReplay(lender, Topology(4), None).by_pairs(layer, counts_SE)
    assert balance.ratio_S.tolist() == [1.0, 1.0]
    assert balance.pairs_P.sum() < counts_SE.sum()  # of resident replicas


def test_no_steps_and_more_ranks_than_experts() -> None:
    replicas = random_replicas(3, 7, 4, seed=0)
    assert ExactSplit(7).balance(replicas, np.zeros((0, 3), np.int64)).ratio_S.shape == (0,)
    assert EvenSplit(7).balance(replicas, np.array([[7, 7, 7]])).ratio_S[0] >= 1
