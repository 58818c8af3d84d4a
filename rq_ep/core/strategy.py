"""The strategy contract: two pure decisions at two speeds, and everything that others ask of a strategy.

What a strategy does is read from the attributes declared here; no code compares names or classes of strategies.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.topology import Topology

# counts_RE [R, E] int64, routed pairs from each source rank to each expert, known to every rank -> the step's plan.
Planner = Callable[[IntArray], DispatchPlan]

# How an expert's pairs are split over its resident replicas, where that has a closed form that the solver knows:
# all of them to the only replica; evenly; or so that the fullest rank of the step has the fewest.
SplitRule = Literal["home", "even", "exact"]


class Summary(NamedTuple):
    """A strategy in one clause each: its row in the README's table."""

    experts: str = ""  # where experts live
    pairs: str = ""  # which rank computes a step's tokens
    source: str = ""  # paper or code


# By `python -m bench replan`: dearer bytes leave layers of few experts uneven, cheaper ones move more than pays.
PRICE_OF_EXPERT = 0.015
MAX_PRICE = 0.45


@dataclass(frozen=True, kw_only=True)
class RebalanceRule:
    """When a placement that serves is replaced, and what a change must gain.

    Steps are those of the group that route tokens; gains are in max/mean over ranks.
    """

    window: int = 256  # steps whose loads a new placement is planned for
    interval: int = 64  # steps between two decisions; after a change the next one waits for a whole window
    full_step: int = 32  # tokens; a step of fewer is a part of one: a window of few requests would show only these
    first: float = 1.0  # part of an interval after which the first decision comes
    min_gain: float | None = 0.02  # on steps that were not planned for; None: whatever is planned is taken
    min_share: float = 0.25  # of what max/mean is above its least, that must go as well: what stays is mostly chance
    # What moving as many bytes as all experts take must gain besides; None: by the experts of a layer (`price_among`).
    price: float | None = None
    room_bytes: int | None = None  # of a rank, for what arrives; None: one expert of the largest format
    bytes_per_step: int | None = None  # that reach a rank in a step at most; None: by the time that it takes

    def price_among(self, num_experts: int) -> float:
        """The price in layers of so many experts; of few, each is a large part of the bytes, and has to move."""
        return min(PRICE_OF_EXPERT * num_experts, MAX_PRICE) if self.price is None else self.price


class Strategy(ABC):
    """How experts are placed and how a step's pairs are split: a frozen dataclass whose fields are its settings.

    Every rank makes its own planner, and all ranks must derive the same plan from the same counts: a planner uses
    nothing but its arguments and settings.
    """

    # As the table `rq_ep.strategies.STRATEGIES` calls it. A class that leaves it out is called "package.module:Class",
    # by which it can be imported wherever a strategy is named.
    name: ClassVar[str]
    summary: ClassVar[Summary] = Summary()
    # The rule by which its certificates are evaluated; None: by replaying its planner over the calibration steps.
    split: ClassVar[SplitRule | None] = None
    lends: ClassVar[bool] = False  # whether its plans may transfer experts for a step
    serves_replicas: ClassVar[bool] = True  # whether its planner takes layers with several replicas of an expert
    counts_replicas: ClassVar[bool] = False  # whether its `place` takes `num_redundant_experts`
    needs_low_format: ClassVar[bool] = False  # whether its `place` needs a format below the native one, calibrated
    begins_from_current: ClassVar[bool] = False  # whether its `place` makes few moves from the placement that serves
    rebalance_rule: ClassVar[RebalanceRule | None] = None  # None: what serves is kept, whatever the load

    # These may be settings: a field of a subclass takes the place of the default.
    max_borrowed: int | None = None  # experts that a rank borrows in a step; None: all that it does not hold
    transient_format: str | None = None  # weight format that experts are lent in; None: as they are stored
    max_steps: int = 64  # calibration steps that its certificates are evaluated on

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @abstractmethod
    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        """Decide replicas, formats, ranks and shares: seconds, offline.

        Args:
            problem: statistics, ranks and limits.
            current: the placement that serves now, for a strategy that can begin from it; others ignore it.

        Raises:
            UserError: the budget is too small; the message says how many bytes would do.
        """

    @abstractmethod
    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        """Prepare the tables of one layer; the planner it returns takes microseconds, every layer and step.

        Args:
            layer: the replicas.
            topology: the ranks and their nodes.
            cost: the layer on the machine at hand; without it a strategy goes by its settings alone.
        """
