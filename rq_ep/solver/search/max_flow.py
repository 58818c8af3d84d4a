"""The min-max split of many steps at once, in fractions, kept up to date while replicas come and go.

The method is that of `rq_ep.solver.split.min_max_split`, but it goes on from the split of before: replicas of a changed
expert are filled anew (water filling), then augmenting paths finish, or a cut proves that the fullest rank cannot be
emptier. Where little has changed, little is to be done.

Axes: P replicas in any order. Loads are in units of the step's mean rank load.
"""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled, compiled_part
from rq_ep.solver.split.augmenting_paths import RankSearch, ReplicaIndex, push_or_cut

TOLERANCE = 1e-5  # of the mean rank load: what differs by less is equal
LEAST_PUSH = 1e-7  # a path that carries less is none: chains of rounding errors must end


class Splits(NamedTuple):
    """The replicas of a layer and the split of every step."""

    replicas: ReplicaIndex
    loads_SE: FloatArray
    quotas_SP: FloatArray  # load of each replica
    loads_SR: FloatArray  # load of each rank
    values_S: FloatArray  # load of the fullest rank


@compiled
def index_replicas(experts_P: IntArray, ranks_P: IntArray, num_experts: int, num_ranks: int) -> ReplicaIndex:
    """Sort replicas by expert and by rank."""
    by_expert_P, first_E = _grouped(experts_P, num_experts)
    by_rank_P, first_R = _grouped(ranks_P, num_ranks)
    return ReplicaIndex(experts_P, ranks_P, by_expert_P, first_E, by_rank_P, first_R)


@compiled_part
def _grouped(groups_P: IntArray, num_groups: int) -> tuple[IntArray, IntArray]:
    """Counting sort: replicas by group, and [X + 1] where each of the X groups begins."""
    end_X = np.zeros(num_groups + 1, np.int64)
    for group in groups_P:
        end_X[group] += 1
    for group in range(1, num_groups + 1):
        end_X[group] += end_X[group - 1]
    by_groups_P = np.empty(len(groups_P), np.int64)
    for p in range(len(groups_P) - 1, -1, -1):  # the last first, which leaves in `end_X` where groups begin
        end_X[groups_P[p]] -= 1
        by_groups_P[end_X[groups_P[p]]] = p
    return by_groups_P, end_X


@compiled_part
def water_fill(
    index: ReplicaIndex, expert: int, load: float, quotas_P: FloatArray, loads_R: FloatArray, by_load_R: IntArray
) -> None:
    """Water filling: take an expert's load off its ranks and fill these again, the emptiest first, to one level.

    `by_load_R` is work space.
    """
    first, end = index.first_E[expert], index.first_E[expert + 1]
    if end - first == 1:
        p = index.by_expert_P[first]
        loads_R[index.ranks_P[p]] += load - quotas_P[p]
        quotas_P[p] = load
        return
    num = 0
    for p in index.by_expert_P[first:end]:  # insertion by load
        rank = index.ranks_P[p]
        loads_R[rank] -= quotas_P[p]
        quotas_P[p] = 0.0
        position = num
        while position > 0 and loads_R[index.ranks_P[by_load_R[position - 1]]] > loads_R[rank]:
            by_load_R[position] = by_load_R[position - 1]
            position -= 1
        by_load_R[position] = p
        num += 1
    volume, num_filled = load, 0
    while num_filled < num:
        here = loads_R[index.ranks_P[by_load_R[num_filled]]]
        if num_filled > 0 and here * num_filled >= volume:
            break
        volume += here
        num_filled += 1
    level = volume / num_filled
    for position in range(num_filled):
        p = by_load_R[position]
        quotas_P[p] = max(level - loads_R[index.ranks_P[p]], 0.0)
        loads_R[index.ranks_P[p]] += quotas_P[p]


@compiled_part
def augment(
    index: ReplicaIndex,
    quotas_P: FloatArray,
    loads_R: FloatArray,
    target: float,
    cut_R: BoolArray,
    search: RankSearch,
) -> float:
    """Push load along augmenting paths until no rank exceeds `target`; raise it where a cut proves it too low.

    Returns the final target. If it was raised, `cut_R` is overwritten by the ranks that prove it. `search` is work
    space.
    """
    while True:
        num_cut, confined = push_or_cut(index, quotas_P, loads_R, target, TOLERANCE, LEAST_PUSH, search)
        if num_cut == 0:
            return target
        target = max(confined / num_cut, target + TOLERANCE)
        for rank in range(len(cut_R)):
            cut_R[rank] = search.is_reached_R[rank]
