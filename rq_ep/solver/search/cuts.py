"""Lower bounds on the balance of a placement by cuts: no split can beat any set of ranks (max-flow min-cut).

Experts whose replicas all lie in a set of ranks must be computed there, so some rank of the set carries at least the
set's mean. The fullest rank of the optimal split is the maximum of these means over all sets. Up to
`MAX_RANKS_ENUMERATED` ranks every set is listed and the value is exact; beyond, sets are listed as splits return them
as their proof, and the value is a lower bound. A change of a few replicas changes few means, so it is priced in
microseconds, and most changes are refused without any split.

Axes: G listed sets of ranks; N sets of the largest means of a step; X experts that a move changes. Loads are in units
of the step's mean rank load.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled
from rq_ep.solver.split.augmenting_paths import ReplicaIndex

MAX_RANKS_ENUMERATED = 8
MAX_CUTS = 512  # beside single ranks
NUM_NEAREST = 4  # sets that price a move first


class Cuts(NamedTuple):
    """Listed sets of ranks, in arrays with room for more of them, and the load confined to each."""

    outside_RG: npt.NDArray[np.int16]  # 1 where the set lacks the rank
    sizes_G: FloatArray
    missing_EG: npt.NDArray[np.int16]  # replicas of the expert outside the set; at 0 the expert is confined to it
    means_SG: FloatArray  # load confined to the set, divided by its ranks
    tops_S: FloatArray  # the largest mean of each step
    nearest_SN: IntArray  # the sets of the largest means, the largest first
    num: IntArray  # [1] sets listed


class Changes(NamedTuple):
    """Distinct experts whose replicas change."""

    experts_X: IntArray
    off_X: IntArray  # the rank that the expert leaves, -1: none
    on_X: IntArray  # the rank that the expert comes to, -1: none


def empty_cuts(num_ranks: int, num_experts: int, num_steps: int) -> Cuts:
    """An empty list with room for single ranks and `MAX_CUTS` more."""
    capacity = num_ranks + MAX_CUTS
    return Cuts(
        outside_RG=np.zeros((num_ranks, capacity), np.int16),
        sizes_G=np.ones(capacity),
        missing_EG=np.zeros((num_experts, capacity), np.int16),
        means_SG=np.zeros((num_steps, capacity)),
        tops_S=np.zeros(num_steps),
        nearest_SN=np.zeros((num_steps, NUM_NEAREST), np.int64),
        num=np.zeros(1, np.int64),
    )


def initial_cuts(index: ReplicaIndex, loads_SE: FloatArray, num_ranks: int, proofs_SR: BoolArray) -> Cuts:
    """All sets of few ranks; of many, the single ranks, all ranks together, and the cuts `proofs_SR` of the steps."""
    cuts = empty_cuts(num_ranks, loads_SE.shape[1], len(loads_SE))
    if num_ranks <= MAX_RANKS_ENUMERATED:
        sets_GR = (np.arange(1, 2**num_ranks)[:, None] >> np.arange(num_ranks)) % 2 == 1
    else:
        distinct = {set_R.tobytes(): set_R for set_R in proofs_SR if 1 < set_R.sum() < num_ranks}
        some = list(distinct.values())[: MAX_CUTS // 2]
        sets_GR = np.stack([*np.eye(num_ranks, dtype=bool), np.ones(num_ranks, bool), *some])
    _add_cuts(cuts, index, loads_SE, sets_GR)
    return cuts


@compiled
def _add_cuts(cuts: Cuts, index: ReplicaIndex, loads_SE: FloatArray, sets_GR: BoolArray) -> None:
    for set_R in sets_GR:
        add_cut(cuts, index, loads_SE, set_R)


@compiled
def add_cut(cuts: Cuts, index: ReplicaIndex, loads_SE: FloatArray, cut_R: BoolArray) -> None:
    """Add a set."""
    g = cuts.num[0]
    size = 0
    for rank in range(len(cut_R)):
        cuts.outside_RG[rank, g] = 0 if cut_R[rank] else 1
        size += 1 if cut_R[rank] else 0
    cuts.sizes_G[g] = size
    confined, num_confined = np.empty(loads_SE.shape[1], np.int64), 0
    for expert in range(loads_SE.shape[1]):
        missing = 0
        for p in index.by_expert_P[index.first_E[expert] : index.first_E[expert + 1]]:
            missing += cuts.outside_RG[index.ranks_P[p], g]
        cuts.missing_EG[expert, g] = missing
        if missing == 0:
            confined[num_confined] = expert
            num_confined += 1
    cuts.num[0] = g + 1
    for step in range(len(loads_SE)):
        load = 0.0
        for i in range(num_confined):
            load += loads_SE[step, confined[i]]
        cuts.means_SG[step, g] = load / size
    _compare(cuts, g)


@compiled
def _compare(cuts: Cuts, g: int) -> None:
    """Enter a set among the nearest ones of each step, if it is one; the sets of lower numbers have been entered."""
    means_SG, nearest_SN = cuts.means_SG, cuts.nearest_SN
    for step in range(len(cuts.tops_S)):
        position = min(g, NUM_NEAREST)
        if position == NUM_NEAREST:
            position -= 1
            if means_SG[step, g] <= means_SG[step, nearest_SN[step, position]]:
                continue
        while position > 0 and means_SG[step, nearest_SN[step, position - 1]] < means_SG[step, g]:
            nearest_SN[step, position] = nearest_SN[step, position - 1]
            position -= 1
        nearest_SN[step, position] = g
        cuts.tops_S[step] = means_SG[step, nearest_SN[step, 0]]


@compiled
def update_tops(cuts: Cuts) -> None:
    """Find the sets of the largest means of each step."""
    for g in range(cuts.num[0]):
        _compare(cuts, g)


@compiled
def drop_cuts(cuts: Cuts, num_kept: int) -> None:
    """Drop half of the sets, the first `num_kept` aside: those that come least close to being the largest of a step."""
    num = cuts.num[0]
    closest_G = np.full(num, np.inf)
    for step in range(len(cuts.tops_S)):
        for g in range(num):
            closest_G[g] = min(closest_G[g], cuts.tops_S[step] - cuts.means_SG[step, g])
    closest_G[:num_kept] = -1.0
    kept = np.sort(np.argsort(closest_G, kind="mergesort")[: num_kept + (num - num_kept) // 2])
    for to in range(len(kept)):
        g = kept[to]
        cuts.sizes_G[to] = cuts.sizes_G[g]
        cuts.outside_RG[:, to] = cuts.outside_RG[:, g]
        cuts.missing_EG[:, to] = cuts.missing_EG[:, g]
        cuts.means_SG[:, to] = cuts.means_SG[:, g]
    cuts.num[0] = len(kept)
    update_tops(cuts)


@compiled
def confinement_changes(cuts: Cuts, expert: int, off: int, on: int, changes_G: npt.NDArray[np.int8]) -> None:
    """Write for each set 1 if the expert becomes confined to it, -1 if it is released from it, else 0.

    Args:
        cuts: the sets.
        expert: which leaves rank `off` and comes to rank `on`.
        off: a rank, or -1.
        on: a rank, or -1.
        changes_G: overwritten.
    """
    for g in range(cuts.num[0]):
        before = cuts.missing_EG[expert, g]
        after = before
        if off >= 0:
            after -= cuts.outside_RG[off, g]
        if on >= 0:
            after += cuts.outside_RG[on, g]
        changes_G[g] = (1 if after == 0 else 0) - (1 if before == 0 else 0)


@compiled
def raise_values(cuts: Cuts, loads_SE: FloatArray, changes: Changes, g: int, values_S: FloatArray) -> None:
    """Raise the steps' values to the mean that a set would have with the changes."""
    confinement_XG = np.empty((len(changes.experts_X), cuts.num[0]), np.int8)
    for x in range(len(confinement_XG)):
        confinement_changes(cuts, changes.experts_X[x], changes.off_X[x], changes.on_X[x], confinement_XG[x])
    for step in range(len(values_S)):
        values_S[step] = max(values_S[step], _changed_mean(cuts, loads_SE, changes, confinement_XG, step, g))


@compiled
def price_changes(
    cuts: Cuts, loads_SE: FloatArray, changes: Changes, values_S: FloatArray, limit: float = np.inf
) -> bool:
    """Write each step's largest mean as it would be with the changes; False as soon as their mean reaches a limit.

    The sets that are nearest to being the largest are looked at first: they refuse most changes.
    """
    num_experts, num, num_steps = len(changes.experts_X), cuts.num[0], len(values_S)
    confinement_XG = np.empty((num_experts, num), np.int8)
    for x in range(num_experts):
        confinement_changes(cuts, changes.experts_X[x], changes.off_X[x], changes.on_X[x], confinement_XG[x])
    total = 0.0
    for step in range(num_steps):
        value = 1.0  # the mean of all ranks
        for g in cuts.nearest_SN[step]:
            value = max(value, _changed_mean(cuts, loads_SE, changes, confinement_XG, step, g))
        values_S[step] = value
        total += value
    if total >= limit * num_steps:
        return False
    changed_sets = np.empty(num, np.int64)
    is_changed_G = np.zeros(num, np.bool_)
    num_changed, num_raised = 0, 0
    # The raised sets come first: of the others, a step needs to know only if its top is relieved.
    for is_raised in (True, False):
        for g in range(num):
            highest, lowest = 0, 0
            for x in range(num_experts):
                highest = max(highest, confinement_XG[x, g])
                lowest = min(lowest, confinement_XG[x, g])
            if (highest > 0) == is_raised and (is_raised or lowest < 0):
                changed_sets[num_changed] = g
                num_changed += 1
                is_changed_G[g] = True
        if is_raised:
            num_raised = num_changed
    for step in range(num_steps):
        value = cuts.tops_S[step]
        num_relevant = num_raised
        if is_changed_G[cuts.nearest_SN[step, 0]]:
            value = 0.0
            num_relevant = num_changed
            for g in range(num):
                if not is_changed_G[g]:
                    value = max(value, cuts.means_SG[step, g])
        for g in changed_sets[:num_relevant]:
            value = max(value, _changed_mean(cuts, loads_SE, changes, confinement_XG, step, g))
        total += max(value - values_S[step], 0.0)
        values_S[step] = value
        if total >= limit * num_steps:
            return False
    return True


@compiled
def _changed_mean(
    cuts: Cuts, loads_SE: FloatArray, changes: Changes, confinement_XG: npt.NDArray[np.int8], step: int, g: int
) -> float:
    """The mean of a set in a step, with the changes."""
    change = 0.0
    for x in range(len(changes.experts_X)):
        change += confinement_XG[x, g] * loads_SE[step, changes.experts_X[x]]
    mean: float = cuts.means_SG[step, g] + change / cuts.sizes_G[g]
    return mean


@compiled
def apply_changes(cuts: Cuts, loads_SE: FloatArray, changes: Changes) -> None:
    """Bring the confined loads and their tops up to date with the changes."""
    confinement_G = np.empty(cuts.num[0], np.int8)
    for x in range(len(changes.experts_X)):
        expert, off, on = changes.experts_X[x], changes.off_X[x], changes.on_X[x]
        confinement_changes(cuts, expert, off, on, confinement_G)
        for g in range(cuts.num[0]):
            if off >= 0:
                cuts.missing_EG[expert, g] -= cuts.outside_RG[off, g]
            if on >= 0:
                cuts.missing_EG[expert, g] += cuts.outside_RG[on, g]
            if confinement_G[g] != 0:
                for step in range(len(loads_SE)):
                    cuts.means_SG[step, g] += confinement_G[g] * loads_SE[step, expert] / cuts.sizes_G[g]
    update_tops(cuts)
