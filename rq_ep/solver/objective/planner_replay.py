"""Steps evaluated by the strategy's own planner: for every split that has no closed rule, and for lending."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan, spread_over_sources
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.step_balance import StepBalance


@dataclass(frozen=True)
class PlannerReplay:
    """A `SplitEvaluator` that plans each step, its pairs spread over the source ranks as the simulator spreads them.

    Pairs of a borrowed expert count on the rank that computes them. Transfers are not priced.
    """

    strategy: Strategy
    topology: Topology
    cost: LayerCost | None
    rule: str = "planner"

    def by_pairs(self, layer: LayerPlacement, counts_SE: IntArray, weight_SE: FloatArray | None = None) -> StepBalance:
        unit_SE = np.ones(counts_SE.shape) if weight_SE is None else weight_SE / np.maximum(counts_SE, 1)
        return self._replay(layer, counts_SE, unit_SE, lambda pairs: pairs)

    def by_reading(self, layer: LayerPlacement, counts_SE: IntArray, read_SE: FloatArray) -> StepBalance:
        return self._replay(layer, counts_SE, read_SE, lambda pairs: np.minimum(pairs, 1))

    def _replay(
        self,
        layer: LayerPlacement,
        counts_SE: IntArray,
        unit_SE: FloatArray,
        num_units: Callable[[IntArray], IntArray],
    ) -> StepBalance:
        """Plan the steps; a replica's load is the units of its pairs, each of which weighs its expert's `unit_SE`."""
        planner, num_ranks = self.strategy.planner(layer, self.topology, self.cost), self.topology.num_ranks
        ratio_S, pairs_P = np.ones(len(counts_SE)), np.zeros(len(layer.replicas), np.int64)
        for step, (counts_E, unit_E) in enumerate(zip(counts_SE, unit_SE, strict=True)):
            plan = planner(spread_over_sources(counts_E, num_ranks))
            planned_P = plan.pairs_RP.sum(axis=0)
            load_P = num_units(planned_P) * unit_E[plan.replicas.experts_P]
            load_R = np.bincount(plan.replicas.ranks_P, load_P, minlength=num_ranks)
            ratio_S[step] = load_R.max() * num_ranks / float(num_units(counts_E) @ unit_E)
            pairs_P += _resident(plan, planned_P, layer)
        return StepBalance(ratio_S, pairs_P)


def _resident(plan: DispatchPlan, planned_P: IntArray, layer: LayerPlacement) -> IntArray:
    """[P] pairs of the layer's own replicas; borrowed ones are left out."""
    keys, resident = (
        replicas.ranks_P * layer.num_experts + replicas.experts_P for replicas in (plan.replicas, layer.replicas)
    )
    of_resident_P: IntArray = planned_P[np.searchsorted(keys, resident)]
    return of_resident_P
