"""Replicate and quantize: replicas of heavy hitters, paid for by few bits for tolerant experts, split step by step."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import check_integer
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import Planner
from rq_ep.core.topology import Topology
from rq_ep.solver.search.mixed_replicas import place_mixed
from rq_ep.solver.search.solve import solve
from rq_ep.solver.split.min_max_split import ByExpert, split
from rq_ep.solver.split.one_rank_per_expert import route_to_one_rank
from rq_ep.solver.split.source_split import nearest_first
from rq_ep.solver.split.two_format_split import TwoFormatSplit
from rq_ep.strategies.eplb import eplb_candidates


@dataclass(frozen=True)
class _Whole:
    """As `TwoFormatSplit`, where replicas of an expert share a format."""

    by_expert: ByExpert

    def split(self, totals_E: IntArray) -> IntArray:
        return split(self.by_expert, totals_E).quotas_C

    def route_to_one_rank(self, totals_E: IntArray, read_s_P: FloatArray) -> IntArray:
        return route_to_one_rank(self.by_expert, totals_E, read_s_P)

    def assign_sources(self, counts_RE: IntArray, quotas_C: IntArray, topology: Topology) -> IntArray:
        return nearest_first(self.by_expert, counts_RE, quotas_C, topology)


@dataclass(frozen=True)
class ReplicateQuantize:
    """Places by `rq_ep.solver` inside a byte budget for each rank; plans the exact min-max split of each step.

    With a cost of the layer, steps of so few pairs that ranks wait for weights instead are planned on one replica of
    each expert, where that is modelled to be shorter. Of an expert in two formats at most half of the pairs of a step
    go to the fewer bits, those of the lowest gates.
    """

    name: ClassVar[str] = "rq"

    max_steps: int = 64  # calibration steps the solver looks at, spread over the record
    max_moves: int = 6000  # moves it tries in each layer

    def __post_init__(self) -> None:
        check_integer("max_steps", self.max_steps, 1)
        check_integer("max_moves", self.max_moves)

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        def uniform(asked: PlacementProblem) -> Placement:
            return solve(asked, self.name, self.max_steps, self.max_moves, current, eplb_candidates(asked))

        if problem.mixed_replicas and current is None:
            return place_mixed(problem, self.name, self.max_steps, uniform)
        return uniform(problem)  # from one that serves, formats stay

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        replicas = layer.replicas
        way = (
            TwoFormatSplit.of(replicas, topology.num_ranks)
            if replicas.mixing_experts
            else _Whole(ByExpert.of(replicas, topology.num_ranks))
        )

        def by_pairs(counts_RE: IntArray) -> DispatchPlan:
            return DispatchPlan(replicas, way.assign_sources(counts_RE, way.split(counts_RE.sum(axis=0)), topology))

        by_pairs(np.zeros((topology.num_ranks, layer.num_experts), np.int64))  # what is compiled is compiled now
        if cost is None or len(replicas) == layer.num_experts:
            return by_pairs

        read_s_P = np.array([cost.stream_s[name] + cost.overhead_s.get(name, 0.0) for name in replicas.formats_P])
        # With so many pairs arithmetic takes longer than reading every replica.
        many_pairs = read_s_P.sum() / min(cost.pair_s[name] for name in replicas.formats_P)

        def plan(counts_RE: IntArray) -> DispatchPlan:
            balanced = by_pairs(counts_RE)
            totals_E = counts_RE.sum(axis=0)
            if totals_E.sum() >= many_pairs:
                return balanced
            pairs_RP = way.assign_sources(counts_RE, way.route_to_one_rank(totals_E, read_s_P), topology)
            lean = DispatchPlan(replicas, pairs_RP, bound="bytes")
            return lean if cost.step(lean).layer_s < cost.step(balanced).layer_s else balanced

        return plan
