"""The best split of many steps at once, kept up to date while replicas come and go.

The same method as `solver.split`, in fractions and from where it stood: replicas whose expert changed are poured anew,
then augmenting paths finish, or prove with a cut that the fullest rank cannot be emptier. Little has to be done where
little has changed.

P replicas in no order; those of expert e are `by_expert_P[first_E[e] : first_E[e + 1]]`, those on rank r
`by_rank_P[first_R[r] : first_R[r + 1]]`. Loads in units of the step's mean rank load.
"""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled

CLOSE = 1e-5  # of the mean rank load: what differs by less is equal
LEAST_PUSH = 1e-7  # a path that carries less is none: chains of rounding errors must end


class Index(NamedTuple):
    """Who holds what: replicas, and where to find those of an expert and of a rank."""

    experts_P: IntArray
    ranks_P: IntArray
    by_expert_P: IntArray
    first_E: IntArray
    by_rank_P: IntArray
    first_R: IntArray


@compiled
def index_of(experts_P: IntArray, ranks_P: IntArray, num_experts: int, num_ranks: int) -> Index:
    """Sort replicas by expert and by rank."""
    by_expert_P, first_E = _grouped(experts_P, num_experts)
    by_rank_P, first_R = _grouped(ranks_P, num_ranks)
    return Index(experts_P, ranks_P, by_expert_P, first_E, by_rank_P, first_R)


@compiled
def _grouped(group_P: IntArray, num_groups: int) -> tuple[IntArray, IntArray]:
    first_G = np.zeros(num_groups + 1, np.int64)
    for group in group_P:
        first_G[group + 1] += 1
    first_G = np.cumsum(first_G)
    next_G = first_G[:-1].copy()
    by_group_P = np.empty(len(group_P), np.int64)
    for p in range(len(group_P)):
        by_group_P[next_G[group_P[p]]] = p
        next_G[group_P[p]] += 1
    return by_group_P, first_G


@compiled
def pour(index: Index, expert: int, load: float, quotas_P: FloatArray, loads_R: FloatArray, order_N: IntArray) -> None:
    """Take an expert's load off its ranks and pour it back, the emptiest rank first, to a common level."""
    first, end = index.first_E[expert], index.first_E[expert + 1]
    if end - first == 1:
        p = index.by_expert_P[first]
        loads_R[index.ranks_P[p]] += load - quotas_P[p]
        quotas_P[p] = load
        return
    num = 0
    for at in range(first, end):  # insertion by load
        p = index.by_expert_P[at]
        rank = index.ranks_P[p]
        loads_R[rank] -= quotas_P[p]
        quotas_P[p] = 0.0
        place = num
        while place > 0 and loads_R[index.ranks_P[order_N[place - 1]]] > loads_R[rank]:
            order_N[place] = order_N[place - 1]
            place -= 1
        order_N[place] = p
        num += 1
    volume, num_filled = load, 0
    while num_filled < num:
        here = loads_R[index.ranks_P[order_N[num_filled]]]
        if num_filled > 0 and here * num_filled >= volume:
            break
        volume += here
        num_filled += 1
    level = volume / num_filled
    for place in range(num_filled):
        p = order_N[place]
        quotas_P[p] = max(level - loads_R[index.ranks_P[p]], 0.0)
        loads_R[index.ranks_P[p]] += quotas_P[p]


@compiled
def settle(index: Index, quotas_P: FloatArray, loads_R: FloatArray, target: float, cut_R: BoolArray) -> float:
    """Push load along shortest chains of replicas until no rank exceeds `target`; raise it where a cut proves it low.

    Returns the target in the end; if it was raised, `cut_R` is overwritten by the ranks that prove it.
    """
    num_ranks = len(loads_R)
    giver_R = np.empty(num_ranks, np.int64)  # the chain that reached a rank: whose replica gives,
    taker_R = np.empty(num_ranks, np.int64)  # and the rank's own replica of the same expert
    queue_R = np.empty(num_ranks, np.int64)
    reached_R = np.empty(num_ranks, np.bool_)
    while True:
        num_reached = 0
        for rank in range(num_ranks):
            reached_R[rank] = loads_R[rank] > target + CLOSE
            if reached_R[rank]:
                giver_R[rank] = -1
                queue_R[num_reached] = rank
                num_reached += 1
        if num_reached == 0:
            return target
        place, found = 0, -1
        while place < num_reached and found < 0:
            rank = queue_R[place]
            place += 1
            for p in index.by_rank_P[index.first_R[rank] : index.first_R[rank + 1]]:
                if quotas_P[p] <= LEAST_PUSH:
                    continue
                expert = index.experts_P[p]
                for other in index.by_expert_P[index.first_E[expert] : index.first_E[expert + 1]]:
                    taker = index.ranks_P[other]
                    if not reached_R[taker]:
                        reached_R[taker] = True
                        giver_R[taker], taker_R[taker] = p, other
                        queue_R[num_reached] = taker
                        num_reached += 1
                        if found < 0 and loads_R[taker] < target - LEAST_PUSH:
                            found = taker
                if found >= 0:
                    break
        if found < 0:
            confined = 0.0
            for rank in queue_R[:num_reached]:
                confined += loads_R[rank]
            target = max(confined / num_reached, target + CLOSE)
            cut_R[:] = reached_R
            continue
        amount, rank = target - loads_R[found], found
        while giver_R[rank] >= 0:
            amount = min(amount, quotas_P[giver_R[rank]])
            rank = index.ranks_P[giver_R[rank]]
        amount = min(amount, loads_R[rank] - target)
        loads_R[rank] -= amount
        loads_R[found] += amount
        rank = found
        while giver_R[rank] >= 0:
            quotas_P[giver_R[rank]] -= amount
            quotas_P[taker_R[rank]] += amount
            rank = index.ranks_P[giver_R[rank]]
