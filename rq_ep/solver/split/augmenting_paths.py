"""Augmenting paths (Edmonds-Karp) between ranks that share experts: the end of every min-max split.

Ranks are the nodes of a flow network; two of them are joined where both hold a replica of an expert. Load is pushed
from ranks above a target along shortest paths to ranks below it. Where no path is left, the ranks reached are a minimum
cut: they hold every replica of what they compute, so one of them carries at least their mean. The same code serves
whole pairs (`min_max_split`) and fractions (`rq_ep.solver.search.max_flow`).
"""

from typing import NamedTuple, TypeVar

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled_part

Loads = TypeVar("Loads", IntArray, FloatArray)


class ReplicaIndex(NamedTuple):
    """Who holds what: P replicas in any order, and where to find those of an expert and of a rank.

    Replicas of expert e are `by_expert_P[first_E[e] : first_E[e + 1]]`, those on rank r
    `by_rank_P[first_R[r] : first_R[r + 1]]`.
    """

    experts_P: IntArray
    ranks_P: IntArray
    by_expert_P: IntArray
    first_E: IntArray  # [E + 1]
    by_rank_P: IntArray  # those of an expert with a single replica may be left out
    first_R: IntArray  # [R + 1]


class RankSearch(NamedTuple):
    """Work space of a breadth-first search over ranks."""

    parent_R: IntArray  # the replica whose load would move on to this rank; -1 where the search begins
    entry_R: IntArray  # this rank's own replica of the same expert, which would take the load
    queue_R: IntArray
    is_reached_R: BoolArray
    is_passed_E: BoolArray  # all ranks of the expert have been reached by way of it


@compiled_part
def rank_search(num_ranks: int, num_experts: int) -> RankSearch:
    """An empty work space."""
    return RankSearch(
        np.empty(num_ranks, np.int64),
        np.empty(num_ranks, np.int64),
        np.empty(num_ranks, np.int64),
        np.empty(num_ranks, np.bool_),
        np.empty(num_experts, np.bool_),
    )


@compiled_part
def push_or_cut(
    index: ReplicaIndex,
    quotas_P: Loads,
    loads_R: Loads,
    target: float,
    tolerance: float,
    least_push: float,
    search: RankSearch,
) -> tuple[int, float]:
    """Push load along shortest paths until no rank exceeds `target`, or until a cut proves that to be impossible.

    Args:
        index: the replicas.
        quotas_P: [P] load of each replica; changed.
        loads_R: [R] load of each rank; changed.
        target: load that no rank shall exceed.
        tolerance: by which a rank may exceed it.
        least_push: a replica of no more load gives none, and a rank this close to the target takes none.
        search: work space; `is_reached_R` are the ranks of the cut.

    Returns:
        The number of ranks of the cut and the load confined to them; no rank if the target is met.
    """
    num_ranks = len(loads_R)
    experts_P, ranks_P, by_expert_P, first_E, by_rank_P, first_R = index
    parent_R, entry_R, queue_R, is_reached_R, is_passed_E = search
    while True:
        num_reached = 0
        for expert in range(len(is_passed_E)):
            is_passed_E[expert] = False
        for rank in range(num_ranks):
            is_reached_R[rank] = loads_R[rank] > target + tolerance
            if is_reached_R[rank]:
                parent_R[rank] = -1
                queue_R[num_reached] = rank
                num_reached += 1
        position, sink = 0, -1
        while position < num_reached and sink < 0:
            rank = queue_R[position]
            position += 1
            for here in range(first_R[rank], first_R[rank + 1]):  # a slice would cost more than what is done with it
                p = by_rank_P[here]
                expert = experts_P[p]
                if is_passed_E[expert] or quotas_P[p] <= least_push:
                    continue
                is_passed_E[expert] = True
                for there in range(first_E[expert], first_E[expert + 1]):
                    other = by_expert_P[there]
                    neighbor = ranks_P[other]
                    if not is_reached_R[neighbor]:
                        is_reached_R[neighbor] = True
                        parent_R[neighbor], entry_R[neighbor] = p, other
                        queue_R[num_reached] = neighbor
                        num_reached += 1
                        if sink < 0 and loads_R[neighbor] < target - least_push:
                            sink = neighbor
                if sink >= 0:
                    break
        if sink < 0:
            confined = target - target  # zero, of the same type
            for rank in queue_R[:num_reached]:
                confined += loads_R[rank]
            return num_reached, confined
        _push(ranks_P, quotas_P, loads_R, target, search, sink)


@compiled_part
def _push(ranks_P: IntArray, quotas_P: Loads, loads_R: Loads, target: float, search: RankSearch, sink: int) -> None:
    """Move as much load as fits along the path that ends in rank `sink`."""
    parent_R, entry_R = search.parent_R, search.entry_R
    amount, rank = target - loads_R[sink], sink
    while parent_R[rank] >= 0:
        amount = min(amount, quotas_P[parent_R[rank]])
        rank = ranks_P[parent_R[rank]]
    amount = min(amount, loads_R[rank] - target)
    loads_R[rank] -= amount
    loads_R[sink] += amount
    rank = sink
    while parent_R[rank] >= 0:
        quotas_P[parent_R[rank]] -= amount
        quotas_P[entry_R[rank]] += amount
        rank = ranks_P[parent_R[rank]]
