"""Planners that are broken on purpose: the conformance checks catch each."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np
import pytest

from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Planner, Strategy
from rq_ep.core.topology import Topology
from rq_ep.solver.certificate.certify import certify
from rq_ep.strategies.eplb import Eplb
from tests.strategies.conformance import check_planners
from tests.strategies.test_conformance import plans_of_a_process

LAYER = LayerPlacement.even(0, 3, [Replica(rank, expert, "bf16") for rank in range(3) for expert in {rank, 0}])
COUNTS_RE = np.array([[5, 2, 1], [4, 0, 3], [9, 1, 1]])

Wreck = Callable[[DispatchPlan], DispatchPlan]


@dataclass(frozen=True)
class Broken(Strategy):
    """EPLB's planner, with something done to its plan."""

    serves_replicas: ClassVar[bool] = True
    wreck: Wreck = lambda plan: plan

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return certify(problem, self, contiguous(problem))

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        planner = Eplb().planner(layer, topology, cost)
        return lambda counts_RE: self.wreck(planner(counts_RE))


@dataclass(frozen=True)
class HashOrdered(Broken):
    """Sends an expert's pairs to the replica whose name hashes lowest: other processes salt hashes otherwise."""

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        replicas = layer.replicas

        def plan(counts_RE: np.ndarray) -> DispatchPlan:
            pairs_RP = np.zeros((topology.num_ranks, len(replicas)), np.int64)
            for expert in range(layer.num_experts):
                of_expert = np.flatnonzero(replicas.experts_P == expert).tolist()
                pairs_RP[:, min(of_expert, key=lambda p: hash(f"replica {p}"))] = counts_RE[:, expert]
            return DispatchPlan(replicas, pairs_RP)

        return plan


def to_every_replica(plan: DispatchPlan) -> DispatchPlan:
    return DispatchPlan(plan.replicas, COUNTS_RE[:, plan.replicas.experts_P])


def drop_pairs(plan: DispatchPlan) -> DispatchPlan:
    return DispatchPlan(plan.replicas, plan.pairs_RP // 2)


def swap_experts(plan: DispatchPlan) -> DispatchPlan:
    return DispatchPlan(plan.replicas, plan.pairs_RP[:, ::-1])


def lend_undeclared(plan: DispatchPlan) -> DispatchPlan:
    replicas, order_P = plan.replicas.joined([Replica(0, 1, "bf16")], ())
    pairs_RP = np.column_stack([plan.pairs_RP, np.zeros(3, np.int64)])[:, order_P]
    return DispatchPlan(replicas, pairs_RP, (WeightTransfer(1, 1, 0, "bf16"),))


def differ_between_ranks() -> Wreck:
    """The second call, of another rank's planner, plans otherwise; each plan by itself is sound."""
    calls = count()

    def wreck(plan: DispatchPlan) -> DispatchPlan:
        if next(calls) == 0:
            return plan
        pairs_RP = np.zeros_like(plan.pairs_RP)
        first_E = np.unique(plan.replicas.experts_P, return_index=True)[1]
        pairs_RP[:, first_E] = COUNTS_RE
        return DispatchPlan(plan.replicas, pairs_RP)

    return wreck


def test_the_planner_is_sound_before_it_is_broken() -> None:
    check_planners(Broken(), LAYER, Topology(3), COUNTS_RE)


@pytest.mark.parametrize(
    ("wreck", "message"),
    [
        (to_every_replica, "lost or sent twice"),
        (drop_pairs, "lost or sent twice"),
        (swap_experts, "lost or sent twice"),
        (lend_undeclared, "does not declare `lends`"),
        (differ_between_ranks(), "otherwise from the same counts"),
    ],
)
def test_a_broken_planner_is_caught(wreck: Wreck, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_planners(Broken(wreck), LAYER, Topology(3), COUNTS_RE)


@pytest.mark.slow
def test_a_planner_that_follows_hashes_is_caught_between_processes() -> None:
    name = f"{__name__}:HashOrdered"
    assert len({plans_of_a_process([name], seed) for seed in ("1", "2", "3", "4")}) > 1
