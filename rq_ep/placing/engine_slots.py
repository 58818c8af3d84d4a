"""EPLB for engines of equal slots: as they serve it, and searched on from there. Not a strategy to serve with here."""

from dataclasses import dataclass
from typing import ClassVar

from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import Planner, Strategy
from rq_ep.core.topology import Topology
from rq_ep.solver.search.equal_slots import check_slots, place_slots
from rq_ep.strategies.eplb import Eplb


@dataclass(frozen=True)
class EqualSlots:
    """As many replicas on every rank, one format, even splits: what SGLang, TensorRT-LLM and vLLM's kin can serve."""

    name: ClassVar[str] = Eplb.name

    @classmethod
    def of(cls, strategy: Strategy) -> "EqualSlots":
        """This in place of a strategy; a `UserError` refuses one that splits pairs otherwise."""
        if not isinstance(strategy, Eplb):
            raise UserError(
                f"--for: these engines split evenly over equal slots; place with eplb, not {strategy.name!r}"
            )
        return cls()

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        check_slots(problem)
        return place_slots(problem, self.name, Eplb().place(problem).layers)

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        return Eplb().planner(layer, topology, cost)
