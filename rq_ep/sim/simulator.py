"""The simulator: recorded counts are planned by a strategy's own planners, step by step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import Placement
from rq_ep.core.plan import imbalance, spread_over_sources
from rq_ep.core.strategy import Strategy
from rq_ep.rebalancing.live_placement import LivePlacement


@dataclass(frozen=True)
class Simulation:
    """One strategy replayed over S steps of L layers."""

    imbalance_SL: FloatArray  # max/mean of pairs over ranks; NaN where a step routed nothing
    loads_LR: IntArray  # pairs of each rank, all steps together
    low_precision_share: float  # of pairs, computed in a format other than the native one
    transfers_SL: IntArray  # experts borrowed
    layer_s_SL: FloatArray | None  # modelled seconds, with a cost model

    @property
    def imbalances(self) -> FloatArray:
        """max/mean of every step and layer that routed something: means are taken over these values, never before."""
        imbalances = self.imbalance_SL[np.isfinite(self.imbalance_SL)]
        return imbalances if imbalances.size else np.ones(1)


def simulate(
    strategy: Strategy,
    placement: Placement,
    steps: Iterable[IntArray],
    native_format: str,
    cost: LayerCost | None = None,
    on_step: Callable[[], None] = lambda: None,
    live: LivePlacement | None = None,
) -> Simulation:
    """Replay recorded steps under `strategy` as it serves `placement`.

    One step is held at a time, so that neither many of them nor many ranks fill the memory.

    Args:
        strategy: makes the planners.
        placement: one layer for each layer of the counts.
        steps: recorded pairs of each step: [L, E], which are divided among the ranks, or [L, R, E].
        native_format: the format that does not count as low precision.
        cost: prices each plan; None: no seconds.
        on_step: called after each step.
        live: follows the load, beginning from `placement`; None: the placement stays.
    """
    topology, num_layers = placement.topology, len(placement.layers)
    planners = [strategy.planner(layer, topology, cost) for layer in placement.layers]
    loads_LR = np.zeros((num_layers, topology.num_ranks), np.int64)
    imbalances, transfers, seconds = [], [], []
    pairs, low_pairs = 0, 0
    for counts in steps:
        imbalance_L, transfers_L, layer_s_L = np.full(num_layers, np.nan), np.zeros(num_layers, np.int64), []
        for at, planner in enumerate(planners):
            counts_RE = counts[at] if counts.ndim == 3 else spread_over_sources(counts[at], topology.num_ranks)
            plan = planner(counts_RE)
            num_pairs = int(plan.loads_R.sum())
            if num_pairs:
                imbalance_L[at] = imbalance(plan.loads_R)
            loads_LR[at] += plan.loads_R
            transfers_L[at] = len(plan.transfers)
            pairs += num_pairs
            low_P = [p for p, name in enumerate(plan.replicas.formats_P) if name != native_format]
            low_pairs += int(plan.pairs_RP[:, low_P].sum())
            if cost is not None:
                layer_s_L.append(cost.step(plan).layer_s)
        imbalances.append(imbalance_L)
        transfers.append(transfers_L)
        seconds.append(layer_s_L)
        if live is not None:
            for at, layer in live.step(counts.sum(axis=1) if counts.ndim == 3 else counts).items():
                planners[at] = strategy.planner(layer, topology, cost)
        on_step()
    return Simulation(
        imbalance_SL=np.array(imbalances).reshape(-1, num_layers),
        loads_LR=loads_LR,
        low_precision_share=low_pairs / max(pairs, 1),
        transfers_SL=np.array(transfers, np.int64).reshape(-1, num_layers),
        layer_s_SL=None if cost is None else np.array(seconds).reshape(-1, num_layers),
    )
