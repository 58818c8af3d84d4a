"""A judged step is what the strategy's own planner makes of it."""

import numpy as np
import pytest

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import imbalance
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.step_balance import judge
from rq_ep.strategies import make_strategy
from tests.solver.instances import random_replicas, skewed


@pytest.mark.parametrize(("strategy", "rule"), [("rq", "exact"), ("eplb", "even"), ("standard", "home")])
def test_the_planner_balances_as_judged(strategy: str, rule: str) -> None:
    replicas = random_replicas(12, 4, 0 if rule == "home" else 9, seed=3)
    counts_SE = skewed(12, 500, seed=1, num_steps=7)
    counts_SE[2] = 0
    counts_SE[2, 5] = 3
    planner = make_strategy(strategy).planner(LayerPlacement.even(0, 12, replicas), Topology(4))
    plans = [planner(np.array([counts_E, *np.zeros((3, 12), np.int64)])) for counts_E in counts_SE]
    found = judge(replicas, counts_SE, 4, rule)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.ratio_S, [imbalance(plan.loads_R) for plan in plans])
    pairs_E = np.bincount(replicas.experts_P, found.pairs_P)
    assert pairs_E.tolist() == counts_SE.sum(axis=0).tolist()


def test_no_steps_and_more_ranks_than_experts() -> None:
    replicas = random_replicas(3, 7, 4, seed=0)
    assert judge(replicas, np.zeros((0, 3), np.int64), 7, "exact").ratio_S.shape == (0,)
    assert judge(replicas, np.array([[7, 7, 7]]), 7, "even").ratio_S[0] >= 1
