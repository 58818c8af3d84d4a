"""Replicate and quantize: replicas of heavy hitters, paid for by few bits for tolerant experts, split step by step."""

from dataclasses import dataclass
from typing import ClassVar

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import check_integer
from rq_ep.core.placement import LayerPlacement, Placement, PlacementProblem
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.strategy import Planner
from rq_ep.core.topology import Topology
from rq_ep.solver.construct import solve
from rq_ep.solver.deal import nearest_first
from rq_ep.solver.split import SharedExperts, split


@dataclass(frozen=True)
class ReplicateQuantize:
    """Places by `rq_ep.solver` inside a byte budget for each rank; plans the exact min-max split of each step."""

    name: ClassVar[str] = "rq"

    max_steps: int = 64  # calibration steps the solver looks at, spread over the record
    max_moves: int = 3000  # moves it tries in each layer

    def __post_init__(self) -> None:
        check_integer("max_steps", self.max_steps, 1)
        check_integer("max_moves", self.max_moves)

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return solve(problem, self.name, self.max_steps, self.max_moves)

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        replicas = layer.replicas
        shared = SharedExperts.of(replicas, topology.num_ranks)

        def plan(counts_RE: IntArray) -> DispatchPlan:
            pairs_RP = counts_RE[:, replicas.experts_P]
            if len(shared.replicas_C):
                quotas_C = split(shared, counts_RE.sum(axis=0)).quotas_C
                pairs_RP[:, shared.replicas_C] = nearest_first(shared, counts_RE, quotas_C, topology)
            return DispatchPlan(replicas, pairs_RP)

        return plan
