"""Standard expert parallelism: contiguous blocks of experts, every pair goes to its expert's home rank."""

from dataclasses import dataclass
from typing import ClassVar

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.strategy import Planner, SplitRule, Strategy, Summary
from rq_ep.core.topology import Topology
from rq_ep.solver.certificate.certify import certify


@dataclass(frozen=True)
class Standard(Strategy):
    """One native replica of each expert, as GShard (arXiv 2006.16668) and every engine since place them."""

    name: ClassVar[str] = "standard"
    summary: ClassVar[Summary] = Summary("contiguous blocks", "the expert's rank", "GShard, arXiv 2006.16668")
    split: ClassVar[SplitRule | None] = "home"
    serves_replicas: ClassVar[bool] = False

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return certify(problem, self, contiguous(problem))

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        replicas = layer.replicas
        if len(replicas) > layer.num_experts:
            raise UserError(
                f"strategy 'standard' serves one replica of each expert, but layer {layer.index} of the placement has "
                f"{len(replicas)} of {layer.num_experts} experts: serve it with --strategy rq or eplb"
            )

        def plan(counts_RE: IntArray) -> DispatchPlan:
            return DispatchPlan(replicas, counts_RE[:, replicas.experts_P])

        return plan
