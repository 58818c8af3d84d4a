"""Replicas that balance hardly misses are dropped, and leave their bytes to experts that need more bits."""

from heapq import heapify, heappop, heappush

import numpy as np

from rq_ep.solver.search.neighborhood import may_leave
from rq_ep.solver.search.ruin_recreate import removal_costs
from rq_ep.solver.search.search_state import SearchState


def drop_spares(state: SearchState, max_loss: float) -> None:
    """Drop replicas, those first whose bytes cost least, while the objective grows by `max_loss` at most in all.

    A cost is taken from the cuts that are known, which it is at least, and made exact before a replica goes.
    """
    tail_weight, left = state.context.effort.tail_weight, max_loss * len(state.layers)
    queue = []
    for i, (layer, limits) in enumerate(zip(state.layers, state.limits, strict=True)):
        cost_ER = removal_costs(layer, limits, tail_weight)
        queue += [
            (float(cost_ER[expert, rank]), i, expert, rank) for expert, rank in np.argwhere(cost_ER < np.inf).tolist()
        ]
    heapify(queue)
    while queue and not state.context.effort.is_over():
        at_least, i, expert, rank = heappop(queue)
        layer, limits = state.layers[i], state.limits[i]
        size = int(limits.bytes_E[expert])
        if at_least * size > left or not may_leave(layer.index, limits, expert, rank):
            continue
        index = layer.index
        without = layer.without(np.flatnonzero((index.experts_P == expert) & (index.ranks_P == rank)))
        loss = state.layer_value(i, without) - state.layer_value(i, layer)
        if loss > left:
            continue
        if queue and loss / size > queue[0][0]:
            heappush(queue, (loss / size, i, expert, rank))
            continue
        left -= max(loss, 0.0)
        state.layers[i] = without
        limits.free_R[rank] += size
