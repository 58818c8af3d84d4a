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
from rq_ep.solver.compiled import compiled, compiled_beside, compiled_part
from rq_ep.solver.split.augmenting_paths import ReplicaIndex
from rq_ep.solver.split.heaviest_first import heaviest_first

MAX_RANKS_ENUMERATED = 8
MAX_CUTS = 512
NUM_NEAREST = 4  # sets that price a move first


class Cuts(NamedTuple):
    """Listed sets of ranks, in arrays with room for more of them, and the load confined to each.

    Steps come last, so that what is done for a set in all steps runs over neighbors in memory.
    """

    loads_ES: FloatArray
    outside_RG: npt.NDArray[np.int16]  # 1 where the set lacks the rank
    sizes_G: FloatArray
    missing_EG: npt.NDArray[np.int16]  # replicas of the expert outside the set; at 0 the expert is confined to it
    means_GS: FloatArray  # load confined to the set, divided by its ranks
    tops_S: FloatArray  # the largest mean of each step
    nearest_SN: IntArray  # the sets of the largest means, the largest first
    num: IntArray  # [1] sets listed


class Changes(NamedTuple):
    """Distinct experts whose replicas change."""

    experts_X: IntArray
    off_X: IntArray  # the rank that the expert leaves, -1: none
    on_X: IntArray  # the rank that the expert comes to, -1: none


def empty_cuts(num_ranks: int, loads_SE: FloatArray) -> Cuts:
    """An empty list with room for single ranks and `MAX_CUTS` more."""
    capacity, (num_steps, num_experts) = num_ranks + MAX_CUTS, loads_SE.shape
    return Cuts(
        loads_ES=np.ascontiguousarray(loads_SE.T),
        outside_RG=np.zeros((num_ranks, capacity), np.int16),
        sizes_G=np.ones(capacity),
        missing_EG=np.zeros((num_experts, capacity), np.int16),
        means_GS=np.zeros((capacity, num_steps)),
        tops_S=np.zeros(num_steps),
        nearest_SN=np.zeros((num_steps, NUM_NEAREST), np.int64),
        num=np.zeros(1, np.int64),
    )


def initial_cuts(index: ReplicaIndex, loads_SE: FloatArray, num_ranks: int, proofs_SR: BoolArray) -> Cuts:
    """All sets of few ranks; of many, the single ranks, all ranks together, and the cuts `proofs_SR` of the steps."""
    cuts = empty_cuts(num_ranks, loads_SE)
    if num_ranks <= MAX_RANKS_ENUMERATED:
        sets_GR = (np.arange(1, 2**num_ranks)[:, None] >> np.arange(num_ranks)) % 2 == 1
    else:
        distinct = {set_R.tobytes(): set_R for set_R in proofs_SR if 1 < set_R.sum() < num_ranks}
        some = list(distinct.values())[: MAX_CUTS // 2]
        sets_GR = np.stack([*np.eye(num_ranks, dtype=bool), np.ones(num_ranks, bool), *some])
    _add_cuts(cuts, index, sets_GR)
    return cuts


@compiled_beside
def _add_cuts(cuts: Cuts, index: ReplicaIndex, sets_GR: BoolArray) -> None:
    for set_R in sets_GR:
        add_cut(cuts, index, set_R)


@compiled_part
def add_cut(cuts: Cuts, index: ReplicaIndex, cut_R: BoolArray) -> None:
    """Add a set."""
    g = cuts.num[0]
    size = 0
    for rank in range(len(cut_R)):
        cuts.outside_RG[rank, g] = 0 if cut_R[rank] else 1
        size += 1 if cut_R[rank] else 0
    cuts.sizes_G[g] = size
    means_S = cuts.means_GS[g]
    for step in range(len(means_S)):
        means_S[step] = 0.0
    for expert in range(len(cuts.loads_ES)):
        missing = 0
        for at in range(index.first_E[expert], index.first_E[expert + 1]):
            missing += cuts.outside_RG[index.ranks_P[index.by_expert_P[at]], g]
        cuts.missing_EG[expert, g] = missing
        if missing == 0:
            loads_S = cuts.loads_ES[expert]
            for step in range(len(means_S)):
                means_S[step] += loads_S[step]
    for step in range(len(means_S)):
        means_S[step] /= size
    cuts.num[0] = g + 1
    _compare(cuts, g)


@compiled_part
def _compare(cuts: Cuts, g: int) -> None:
    """Enter a set among the nearest ones of each step, if it is one; the sets of lower numbers have been entered."""
    means_GS, nearest_SN = cuts.means_GS, cuts.nearest_SN
    for step in range(len(cuts.tops_S)):
        mean, position = means_GS[g, step], min(g, NUM_NEAREST)
        if position == NUM_NEAREST:
            position -= 1
            if mean <= means_GS[nearest_SN[step, position], step]:
                continue
        while position > 0 and means_GS[nearest_SN[step, position - 1], step] < mean:
            nearest_SN[step, position] = nearest_SN[step, position - 1]
            position -= 1
        nearest_SN[step, position] = g
        cuts.tops_S[step] = means_GS[nearest_SN[step, 0], step]


@compiled_part
def update_tops(cuts: Cuts) -> None:
    """Find the sets of the largest means of each step."""
    for g in range(cuts.num[0]):
        _compare(cuts, g)


@compiled_part
def drop_cuts(cuts: Cuts, num_kept: int) -> None:
    """Drop half of the sets, the first `num_kept` aside: those that come least close to being the largest of a step."""
    num = cuts.num[0]
    nearness_G, is_kept_G = np.empty(num), np.zeros(num, np.bool_)
    for g in range(num):
        nearness_G[g] = 1.0 if g < num_kept else -np.inf
        for step in range(len(cuts.tops_S)):
            nearness_G[g] = max(nearness_G[g], cuts.means_GS[g, step] - cuts.tops_S[step])
    for g in heaviest_first(nearness_G)[: num_kept + (num - num_kept) // 2]:
        is_kept_G[g] = True
    to = 0
    for g in range(num):
        if is_kept_G[g]:
            _copy_cut(cuts, g, to)
            to += 1
    cuts.num[0] = to
    update_tops(cuts)


@compiled_part
def _copy_cut(cuts: Cuts, g: int, to: int) -> None:
    cuts.sizes_G[to] = cuts.sizes_G[g]
    for rank in range(len(cuts.outside_RG)):
        cuts.outside_RG[rank, to] = cuts.outside_RG[rank, g]
    for expert in range(len(cuts.missing_EG)):
        cuts.missing_EG[expert, to] = cuts.missing_EG[expert, g]
    for step in range(len(cuts.tops_S)):
        cuts.means_GS[to, step] = cuts.means_GS[g, step]


@compiled_part
def raise_values(cuts: Cuts, changes: Changes, g: int, values_S: FloatArray) -> None:
    """Raise the steps' values to the mean that a set would have with the changes."""
    change_S = np.zeros(len(values_S))
    _add_loads(cuts, changes, _kinds_of_change(cuts, changes, g, g + 1)[0][0], change_S)
    _raise(values_S, cuts.means_GS[g], change_S, 1 / cuts.sizes_G[g])


@compiled
def price_changes(cuts: Cuts, changes: Changes, values_S: FloatArray, limit: float) -> bool:
    """Write each step's largest mean as it would be with the changes; False as soon as their mean reaches a limit.

    All sets that change are looked at, and of the others those that are nearest to being the largest of a step. Only
    where these all change can another one be the largest.
    """
    means_GS, nearest_SN, num_steps = cuts.means_GS, cuts.nearest_SN, len(values_S)
    kind_G, unchanged = _kinds_of_change(cuts, changes, 0, cuts.num[0])
    open_S, num_open = np.empty(num_steps, np.int64), 0
    for step in range(num_steps):
        values_S[step] = 1.0  # the mean of all ranks
        is_open = True
        for g in nearest_SN[step]:
            if kind_G[g] == unchanged:
                values_S[step] = max(means_GS[g, step], 1.0)
                is_open = False
                break
        if is_open:
            open_S[num_open] = step
            num_open += 1
    change_KS, is_known_K = np.zeros((2 * unchanged + 1, num_steps)), np.zeros(2 * unchanged + 1, np.bool_)
    for g in range(len(kind_G)):
        kind = kind_G[g]
        if kind != unchanged:
            if not is_known_K[kind]:
                is_known_K[kind] = True
                _add_loads(cuts, changes, kind, change_KS[kind])
            _raise(values_S, means_GS[g], change_KS[kind], 1 / cuts.sizes_G[g])
    total = 0.0
    for step in range(num_steps):
        total += values_S[step]
    if total >= limit * num_steps:
        return False
    for step in open_S[:num_open]:
        value = values_S[step]
        if value < means_GS[nearest_SN[step, NUM_NEAREST - 1], step]:
            for g in range(len(kind_G)):
                if kind_G[g] == unchanged:
                    value = max(value, means_GS[g, step])
            total += value - values_S[step]
            values_S[step] = value
    return not total >= limit * num_steps


@compiled_part
def _kinds_of_change(cuts: Cuts, changes: Changes, first: int, end: int) -> tuple[npt.NDArray[np.int8], int]:
    """Which experts become confined to each of some sets or are released from it, as a number; and that of no change.

    The number has a digit to the base of 3 for each expert: 0 where it is released, 1 where nothing changes, 2 where it
    becomes confined.
    """
    kind_G, unchanged = np.zeros(end - first, np.int8), 0
    for x in range(len(changes.experts_X)):
        off, on = changes.off_X[x], changes.on_X[x]
        missing_G = cuts.missing_EG[changes.experts_X[x], first:end]
        off_G, on_G, leaves, comes = cuts.outside_RG[off, first:end], cuts.outside_RG[on, first:end], off >= 0, on >= 0
        for g in range(len(kind_G)):
            after = missing_G[g]
            if leaves:
                after -= off_G[g]
            if comes:
                after += on_G[g]
            kind_G[g] = 3 * kind_G[g] + 1 + (1 if after == 0 else 0) - (1 if missing_G[g] == 0 else 0)
        unchanged = 3 * unchanged + 1
    return kind_G, unchanged


@compiled_part
def _add_loads(cuts: Cuts, changes: Changes, kind: int, change_S: FloatArray) -> None:
    """Add what a kind of change does to the load that is confined to a set."""
    for x in range(len(changes.experts_X) - 1, -1, -1):
        kind, digit = kind // 3, kind % 3
        if digit != 1:
            _add(change_S, cuts.loads_ES[changes.experts_X[x]], digit - 1.0)


@compiled_part
def _add(sums_S: FloatArray, loads_S: FloatArray, factor: float) -> None:
    for step in range(len(sums_S)):
        sums_S[step] += factor * loads_S[step]


@compiled_part
def _raise(values_S: FloatArray, means_S: FloatArray, change_S: FloatArray, factor: float) -> None:
    for step in range(len(values_S)):
        values_S[step] = max(values_S[step], means_S[step] + factor * change_S[step])


@compiled_part
def apply_changes(cuts: Cuts, changes: Changes) -> None:
    """Bring the confined loads and their tops up to date with the changes."""
    kind_G, unchanged = _kinds_of_change(cuts, changes, 0, cuts.num[0])
    for g in range(len(kind_G)):
        if kind_G[g] != unchanged:
            change_S = np.zeros(len(cuts.tops_S))
            _add_loads(cuts, changes, kind_G[g], change_S)
            _add(cuts.means_GS[g], change_S, 1 / cuts.sizes_G[g])
    for x in range(len(changes.experts_X)):
        missing_G, off, on = cuts.missing_EG[changes.experts_X[x]], changes.off_X[x], changes.on_X[x]
        for g in range(len(kind_G)):
            if off >= 0:
                missing_G[g] -= cuts.outside_RG[off, g]
            if on >= 0:
                missing_G[g] += cuts.outside_RG[on, g]
    update_tops(cuts)
