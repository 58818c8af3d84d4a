"""Static replicas first; what they cannot balance in a step travels, if it is worth it: `rq`, then lending as LLEP."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError, check_integer, check_number, check_text
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import Planner, RebalanceRule, SplitRule, Strategy, Summary
from rq_ep.core.topology import Topology
from rq_ep.solver.search.solve import solve
from rq_ep.solver.split.lending import Lending
from rq_ep.solver.split.min_max_split import ByExpert
from rq_ep.solver.split.relay import may_relay, relay
from rq_ep.solver.split.source_split import nearest_first
from rq_ep.strategies.eplb import eplb_candidates
from rq_ep.strategies.rq import StaticPlanner


@dataclass(frozen=True)
class ReplicateLend(Strategy):
    """Places and splits as `rq`. Then the ranks that stay overloaded lend experts to the emptiest, one by one.

    With a cost of the layer, as many experts move as make the modelled step shortest to a hundredth, often none: what
    is saved is weighed against the transfers of the busiest link. Ranks whose links idle pass an excess on: the ranks
    that borrow lend experts of their own, and hand on one that many wait for. Without a cost, LLEP's settings are
    applied to what the static replicas leave: nothing moves below `fallback_ratio`, and no expert for fewer than
    `min_tokens_per_gemm` pairs.
    """

    name: ClassVar[str] = "rq_llep"
    summary: ClassVar[Summary] = Summary(
        "as `rq`", "as `rq`; what stays uneven is lent for the step, if that is worth the transfers", "ours"
    )
    split: ClassVar[SplitRule | None] = "exact"  # certified as it places: what is lent depends on each step
    lends: ClassVar[bool] = True
    begins_from_current: ClassVar[bool] = True
    rebalance_rule: ClassVar[RebalanceRule | None] = RebalanceRule()

    fallback_ratio: float = 1.3  # without a cost: max/mean after the static split below which nothing moves
    min_tokens_per_gemm: int = 1024  # without a cost: pairs for which an expert is worth moving
    max_borrowed: int = 4  # experts that a rank makes room for in a step
    transient_format: str | None = None  # that experts travel in; None: as they lie
    max_low_precision_share: float = 0.25  # of a step's pairs, computed in `transient_format`
    max_steps: int = 64  # as for `rq`
    max_moves: int = 8000  # as for `rq`

    def __post_init__(self) -> None:
        check_number("fallback_ratio", self.fallback_ratio)
        check_integer("min_tokens_per_gemm", self.min_tokens_per_gemm)
        check_integer("max_borrowed", self.max_borrowed)
        if self.transient_format is not None:
            check_text("transient_format", self.transient_format)
        check_number("max_low_precision_share", self.max_low_precision_share, 0, 1)
        check_integer("max_steps", self.max_steps, 1)
        check_integer("max_moves", self.max_moves)

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return solve(
            problem, self, self.max_steps, self.max_moves, current, [] if current else eplb_candidates(problem)
        )

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        if cost is not None and self.transient_format is not None and self.transient_format not in cost.transfer_s:
            known = ", ".join(sorted(cost.transfer_s))
            raise UserError(f"transient_format {self.transient_format!r}: the machine's costs know {known}")
        replicas = layer.replicas
        static = StaticPlanner.of(layer, topology, cost)
        lending = Lending.of(
            replicas,
            topology.num_ranks,
            cost,
            max_borrowed=self.max_borrowed,
            transient_format=self.transient_format,
            max_low_precision_share=self.max_low_precision_share,
            min_pairs=self.min_tokens_per_gemm,
            min_ratio=self.fallback_ratio,
        )

        def plan(counts_RE: IntArray) -> DispatchPlan:
            before, waits_for_weights = static.choose(counts_RE)
            if waits_for_weights or not lending.may_pay(before.loads_R):
                return before
            loans = lending.choose(before)
            if loans is None:
                return before
            by_expert = ByExpert.of(loans.replicas, topology.num_ranks)
            quotas_C = loans.quotas_ER[by_expert.experts_C, by_expert.ranks_C]
            pairs_RP = nearest_first(by_expert, counts_RE, quotas_C, topology)
            after = DispatchPlan(loans.replicas, pairs_RP, loans.transfers)
            if cost is not None and may_relay(loans.transfers):
                relayed = replace(after, transfers=relay(loans.transfers))
                after = min(after, relayed, key=lambda plan: cost.step(plan).layer_s)
            return after if lending.is_shorter(after, before) else before

        lending.choose(plan(np.zeros((topology.num_ranks, layer.num_experts), np.int64)))  # compiled now, not in a step
        return plan
