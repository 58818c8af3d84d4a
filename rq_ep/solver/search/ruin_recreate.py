"""Ruin and recreate over all layers: ranks drop replicas that are missed least, and fill the free bytes greedily again.

The local search keeps to one layer, so a layer keeps the bytes that it was given greedily at first. To ruin a little
and recreate it leads from one division of the bytes to the next (Schrimpf et al., Record breaking optimization results
using the ruin and recreate principle, J. Comput. Phys. 159, 2000). It pays where the problem is small; else every layer
has its share, and moves inside the layers gain more in the same time.
"""

from collections.abc import Callable

import numpy as np

from rq_ep.core.arrays import FloatArray
from rq_ep.solver.search.cuts import initial_cuts, price_changes
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.local_search import LEAST_GAIN, improve, tail_weighted_mean
from rq_ep.solver.search.neighborhood import LayerLimits, may_leave, removal
from rq_ep.solver.search.search_state import SearchState

MIN_ITERATIONS, MAX_ITERATIONS = 2, 100  # fewer are not worth the costs of every replica
MAX_WORK = 2**21  # iterations times layers, steps, experts and ranks: 8 for 8 layers of 64 experts on 8 ranks
RUINS_OF_REPLICA = 8  # iterations for each replica that may be dropped: few replicas leave few ways to ruin
NUM_RANKS, NUM_REPLICAS = 2, 2  # ranks that are ruined in an iteration, and replicas that each drops; fewer gain less
NUM_MOVES = 300  # attempted afterwards in each layer that has changed


def ruin_and_recreate(state: SearchState, on_progress: Callable[[float], None]) -> None:
    """Ruin, recreate and improve, as often as the size of the problem allows; keep what lowers the objective."""
    effort, limits = state.context.effort, state.limits
    size = sum(layer.loads_SE.size * layer.loads_SR.shape[1] for layer in state.layers)
    num_iterations = min(MAX_WORK // max(size, 1), MAX_ITERATIONS)
    if num_iterations < MIN_ITERATIONS or state.is_settled:
        return
    costs_LER = np.stack([removal_costs(*pair, effort.tail_weight) for pair in zip(state.layers, limits, strict=True)])
    num_iterations = min(num_iterations, RUINS_OF_REPLICA * int(np.isfinite(costs_LER).sum()))
    for iteration in range(num_iterations):
        if state.is_settled or effort.is_over():
            break
        generator = np.random.default_rng((effort.seed, iteration))
        before, held_LER = state.value, state.held_LER
        free_R, move_budget = state.free_R.copy(), limits[0].move_budget.copy()
        _ruin(state, costs_LER, generator)
        state.add_replicas()
        changed = np.flatnonzero((state.held_LER != held_LER).any(axis=(1, 2))).tolist()
        for i in changed:
            state.layers[i] = improve(
                state.layers[i], limits[i], effort.tail_weight, NUM_MOVES, generator, effort.is_over
            )
        is_better = state.value < before - LEAST_GAIN
        for i in changed:
            if is_better:
                costs_LER[i] = removal_costs(state.layers[i], limits[i], effort.tail_weight)
            else:
                state.layers[i] = LayerSplit.of(state.layers[i].loads_SE, held_LER[i])
        if not is_better:
            state.free_R[:], limits[0].move_budget[:] = free_R, move_budget
        on_progress((iteration + 1) / num_iterations)


def removal_costs(layer: LayerSplit, limits: LayerLimits, tail_weight: float) -> FloatArray:
    """[E, R] what the objective loses with a replica, per byte; infinite where the replica must stay."""
    cost_ER = np.full(limits.allowed_ER.shape, np.inf)
    cuts = initial_cuts(layer.index, layer.loads_SE, layer.loads_SR.shape[1], layer.optimize())
    now, without_S = tail_weighted_mean(layer.values_S, tail_weight), np.empty_like(layer.values_S)
    for expert, rank in np.argwhere(layer.held_ER).tolist():
        if may_leave(layer.index, limits, expert, rank):
            price_changes(cuts, removal(expert, rank), without_S, np.inf)
            cost_ER[expert, rank] = (tail_weighted_mean(without_S, tail_weight) - now) / limits.bytes_E[expert]
    return cost_ER


def _ruin(state: SearchState, costs_LER: FloatArray, generator: np.random.Generator) -> None:
    """Drop replicas from some ranks: those of lowest cost, each cost weighted by a random number."""
    drawn_LER = costs_LER * generator.random(costs_LER.shape)
    for rank in generator.permutation(costs_LER.shape[2])[:NUM_RANKS].tolist():
        num_left = NUM_REPLICAS
        for position in np.argsort(drawn_LER[:, :, rank], axis=None, kind="stable").tolist():
            i, expert = divmod(position, costs_LER.shape[1])
            if not num_left or np.isinf(costs_LER[i, expert, rank]):
                break
            layer, limits = state.layers[i], state.limits[i]
            if not may_leave(layer.index, limits, expert, rank):  # another replica of the expert has been dropped
                continue
            is_it_P = (layer.index.experts_P == expert) & (layer.index.ranks_P == rank)
            state.layers[i] = layer.without(np.flatnonzero(is_it_P))
            limits.free_R[rank] += limits.bytes_E[expert]
            if not limits.present_ER[expert, rank]:
                limits.move_budget[0] += limits.bytes_E[expert]
            num_left -= 1
