"""Have all loaded and compiled that a decision takes, before the first one is asked for."""

import numpy as np

from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import RebalanceRule, Strategy
from rq_ep.core.topology import Topology
from rq_ep.rebalancing.load_window import ObservedLoads
from rq_ep.rebalancing.rebalancer import Decision, RebalanceRequest, decide

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_STEPS = 2, 8, 4, 32


def warm_up(strategy: Strategy) -> Decision:
    """Decide on a small placement, whose loads are so uneven that it is worth replacing; returns that decision.

    In a new installation that takes half a minute of CPU time, and else a moment.
    """
    sizes, topology = {"fp32": 4, "int8": 1}, Topology(NUM_RANKS)
    held = [Replica(expert * NUM_RANKS // NUM_EXPERTS, expert, "fp32") for expert in range(NUM_EXPERTS)]
    layers = tuple(LayerPlacement.even(index, NUM_EXPERTS, held) for index in range(NUM_LAYERS))
    bytes_R = tuple(bytes_by_rank(layers, NUM_RANKS, sizes).tolist())
    stats = ExpertStats.uniform(tuple(range(NUM_LAYERS)), NUM_EXPERTS, sizes, "fp32")
    weights_E = np.arange(1, NUM_EXPERTS + 1) ** 2
    counts_SLE = np.random.default_rng(0).multinomial(512, weights_E / weights_E.sum(), size=(NUM_STEPS, NUM_LAYERS))
    return decide(
        RebalanceRequest(
            PlacementProblem(stats, topology, bytes_R, tuple(sizes)),
            strategy,
            RebalanceRule(),
            Placement(layers, strategy.name, topology, bytes_R, bytes_R),
            ObservedLoads(counts_SLE, np.zeros(NUM_STEPS, np.int64)),
        )
    )
