"""Replicate and quantize: replicas of heavy hitters, paid for by few bits for tolerant experts, split step by step."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replicas
from rq_ep.core.strategy import Planner, RebalanceRule, SplitRule, Strategy, Summary
from rq_ep.core.topology import Topology
from rq_ep.solver.search.solve import solve
from rq_ep.solver.split.min_max_split import ByExpert, split
from rq_ep.solver.split.one_rank_per_expert import route_to_one_rank
from rq_ep.solver.split.source_split import nearest_first
from rq_ep.strategies.eplb import eplb_candidates


class Choice(NamedTuple):
    """A step's plan, and whether the step waits for weights: then each active expert is read on one rank alone."""

    plan: DispatchPlan
    waits_for_weights: bool


@dataclass(frozen=True)
class StaticPlanner:
    """Plans over resident replicas: the exact split of pairs or, where that is shorter, one rank for each expert."""

    replicas: Replicas
    topology: Topology
    by_expert: ByExpert
    cost: LayerCost | None  # None: pairs alone decide
    read_s_P: FloatArray  # seconds of reading each replica
    many_pairs: float  # from which on arithmetic takes longer than reading every replica

    @classmethod
    def of(cls, layer: LayerPlacement, topology: Topology, cost: LayerCost | None) -> "StaticPlanner":
        """Raises a `UserError` where the replicas of an expert differ in format."""
        replicas, num_ranks = layer.replicas, topology.num_ranks
        if replicas.mixing_experts:
            raise UserError(
                f"layer {layer.index}: expert {replicas.mixing_experts[0]} is stored in several formats, which only "
                "rq_paper splits: serve the placement with --strategy rq_paper, or place again"
            )
        read_s_P, many_pairs = np.zeros(len(replicas)), 0.0
        if len(replicas) == layer.num_experts:
            cost = None  # there is nothing to choose
        if cost is not None:
            read_s_P = np.array([cost.stream_s[name] + cost.overhead_s.get(name, 0.0) for name in replicas.formats_P])
            many_pairs = read_s_P.sum() / min(cost.pair_s[name] for name in replicas.formats_P)
        planner = cls(replicas, topology, ByExpert.of(replicas, num_ranks), cost, read_s_P, many_pairs)
        planner.by_pairs(np.zeros((num_ranks, layer.num_experts), np.int64))  # what is compiled is compiled now
        return planner

    def __call__(self, counts_RE: IntArray) -> DispatchPlan:
        return self.choose(counts_RE).plan

    def choose(self, counts_RE: IntArray) -> Choice:
        """The shorter of two plans, by the cost of the layer; without one, the exact split of pairs."""
        balanced = self.by_pairs(counts_RE)
        if self.cost is None:
            return Choice(balanced, False)
        totals_E = counts_RE.sum(axis=0)
        if totals_E.sum() >= self.many_pairs:
            return Choice(balanced, False)
        read_once = self._plan(counts_RE, route_to_one_rank(self.by_expert, totals_E, self.read_s_P))
        if self.cost.step(read_once).layer_s < self.cost.step(balanced).layer_s:
            return Choice(read_once, True)
        return Choice(balanced, False)

    def by_pairs(self, counts_RE: IntArray) -> DispatchPlan:
        """The exact min-max split of pairs."""
        return self._plan(counts_RE, split(self.by_expert, counts_RE.sum(axis=0)).quotas_C)

    def _plan(self, counts_RE: IntArray, quotas_C: IntArray) -> DispatchPlan:
        return DispatchPlan(self.replicas, nearest_first(self.by_expert, counts_RE, quotas_C, self.topology))


@dataclass(frozen=True)
class ReplicateQuantize(Strategy):
    """Places by `rq_ep.solver` inside a byte budget for each rank; plans the exact min-max split of each step.

    With a cost of the layer, steps of so few pairs that ranks wait for weights instead are planned on one replica of
    each expert, where that is modelled to be shorter.
    """

    name: ClassVar[str] = "rq"
    summary: ClassVar[Summary] = Summary(
        "replicas x format x rank inside a byte budget per rank",
        "the exact min-max split of this step, nearest source first",
        "ours, after Replicate-and-Quantize, arXiv 2602.19938",
    )
    split: ClassVar[SplitRule | None] = "exact"
    begins_from_current: ClassVar[bool] = True
    rebalance_rule: ClassVar[RebalanceRule | None] = RebalanceRule()

    max_steps: int = 64  # calibration steps the solver looks at, spread over the record
    max_moves: int = 8000  # moves it tries in each layer

    def __post_init__(self) -> None:
        check_integer("max_steps", self.max_steps, 1)
        check_integer("max_moves", self.max_moves)

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return solve(
            problem, self, self.max_steps, self.max_moves, current, [] if current else eplb_candidates(problem)
        )

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        return StaticPlanner.of(layer, topology, cost)
