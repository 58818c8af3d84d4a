"""The one interface: a strategy decides twice, at two speeds, and both decisions are pure."""

from collections.abc import Callable
from typing import ClassVar, Protocol

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.topology import Topology

# counts_RE [R, E] int64, routed pairs from each source rank to each expert, known to every rank -> the step's plan.
Planner = Callable[[IntArray], DispatchPlan]


class Strategy(Protocol):
    """How experts are placed and how a step's pairs are spread: a frozen dataclass of its knobs."""

    name: ClassVar[str]

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        """Decide replicas, formats, ranks and shares: seconds, offline.

        Raises:
            UserError: the budget is too small; the message says how many bytes would do.
        """
        ...

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        """Prepare the tables of one layer; the planner it returns takes microseconds, every layer and step.

        Args:
            layer: the replicas.
            topology: the ranks and their nodes.
            cost: the layer on the machine at hand; without it a strategy goes by its settings alone.
        """
        ...
