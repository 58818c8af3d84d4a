"""The simulator: recorded counts through a strategy's own planners, and what comes out."""

from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import Placement
from rq_ep.core.plan import imbalance
from rq_ep.core.strategy import Strategy
from rq_ep.sim.traces import deal_counts


@dataclass(frozen=True)
class Simulation:
    """One strategy replayed over S steps of L layers."""

    imbalance_SL: FloatArray  # max/mean of pairs over ranks; NaN where a step routed nothing
    loads_LR: IntArray  # pairs of each rank, all steps together
    low_precision_share: float  # of pairs, computed in a format other than the native one
    transfers_SL: IntArray  # experts borrowed
    layer_s_SL: FloatArray | None  # modelled seconds, with a cost model

    @property
    def seen(self) -> FloatArray:
        """max/mean of every step and layer that routed something: to be averaged over these, never before."""
        seen = self.imbalance_SL[np.isfinite(self.imbalance_SL)]
        return seen if seen.size else np.ones(1)


def simulate(
    strategy: Strategy,
    placement: Placement,
    counts: IntArray,
    native_format: str,
    cost: LayerCost | None = None,
) -> Simulation:
    """Replay recorded counts under `strategy` as it serves `placement`.

    Args:
        strategy: makes the planners.
        placement: one layer for each layer of the counts.
        counts: recorded pairs per step, layer and expert, [S, L, E], which are dealt to the ranks, or [S, L, R, E].
        native_format: the format that does not count as low precision.
        cost: prices each plan; None: no seconds.
    """
    topology = placement.topology
    planners = [strategy.planner(layer, topology, cost) for layer in placement.layers]
    num_steps, num_layers = counts.shape[:2]
    imbalance_SL = np.full((num_steps, num_layers), np.nan)
    transfers_SL = np.zeros((num_steps, num_layers), np.int64)
    layer_s_SL = np.zeros((num_steps, num_layers))
    loads_LR = np.zeros((num_layers, topology.num_ranks), np.int64)
    low_pairs = 0
    for at, planner in enumerate(planners):
        dealt_SRE = counts[:, at] if counts.ndim == 4 else deal_counts(counts[:, [at]], topology.num_ranks)[:, 0]
        for step, counts_RE in enumerate(dealt_SRE):
            plan = planner(counts_RE)
            if plan.loads_R.any():
                imbalance_SL[step, at] = imbalance(plan.loads_R)
            loads_LR[at] += plan.loads_R
            transfers_SL[step, at] = len(plan.transfers)
            low_P = np.array([name != native_format for name in plan.replicas.formats_P], bool)
            low_pairs += int(plan.pairs_RP[:, low_P].sum())
            if cost is not None:
                layer_s_SL[step, at] = cost.step(plan).layer_s
    return Simulation(
        imbalance_SL=imbalance_SL,
        loads_LR=loads_LR,
        low_precision_share=low_pairs / max(int(counts.sum()), 1),
        transfers_SL=transfers_SL,
        layer_s_SL=None if cost is None else layer_s_SL,
    )
