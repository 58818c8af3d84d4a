"""The balance a placement allows, seen from the other side: no split can beat any set of ranks.

Experts whose replicas all lie in a set of ranks must be computed there, so some rank of the set carries at least the
set's mean. The fullest rank of the best split is the maximum of these means over all sets (max-flow min-cut). Up to
`MAX_RANKS_ENUMERATED` ranks every set is listed and the value is exact; beyond, sets are listed as splits return them
as their proof, and the value is a lower bound. A change of a few replicas changes few means, so it is priced in
microseconds, and most changes are refused without any split.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled
from rq_ep.solver.search.max_flow import Index

MAX_RANKS_ENUMERATED = 8
MAX_CUTS = 512  # beside single ranks


class Cuts(NamedTuple):
    """Listed sets of ranks, G of them in arrays that have room for more, and what is confined to each.

    Loads in units of the step's mean rank load.
    """

    outside_RG: npt.NDArray[np.int16]  # 1 where the set lacks the rank
    sizes_G: FloatArray
    missing_EG: npt.NDArray[np.int16]  # replicas of the expert outside the set; confined to it if 0
    means_SG: FloatArray  # load confined to the set over its ranks
    tops_S: FloatArray  # the largest mean of each step
    at_S: IntArray  # and its set
    num: IntArray  # [1] sets listed


def no_cuts(num_ranks: int, num_experts: int, num_steps: int) -> Cuts:
    """An empty list with room for single ranks and `MAX_CUTS` more."""
    room = num_ranks + MAX_CUTS
    return Cuts(
        np.zeros((num_ranks, room), np.int16), np.ones(room), np.zeros((num_experts, room), np.int16),
        np.zeros((num_steps, room)), np.zeros(num_steps), np.zeros(num_steps, np.int64), np.zeros(1, np.int64),
    )  # fmt: skip


def starting_cuts(index: Index, loads_SE: FloatArray, num_ranks: int, found_NR: BoolArray) -> Cuts:
    """All sets for few ranks; else single ranks, all of them together, and those of `found_NR`."""
    cuts = no_cuts(num_ranks, loads_SE.shape[1], len(loads_SE))
    if num_ranks <= MAX_RANKS_ENUMERATED:
        sets_GR = (np.arange(1, 2**num_ranks)[:, None] >> np.arange(num_ranks)) % 2 == 1
    else:
        found = {row.tobytes(): row for row in found_NR if 1 < row.sum() < num_ranks}
        some = list(found.values())[: MAX_CUTS // 2]
        sets_GR = np.stack([*np.eye(num_ranks, dtype=bool), np.ones(num_ranks, bool), *some])
    for set_R in sets_GR:
        list_cut(cuts, index, loads_SE, set_R)
    find_tops(cuts)
    return cuts


@compiled
def list_cut(cuts: Cuts, index: Index, loads_SE: FloatArray, cut_R: BoolArray) -> None:
    """Add a set; the caller finds the tops again."""
    g = cuts.num[0]
    size = 0
    for rank in range(len(cut_R)):
        cuts.outside_RG[rank, g] = 0 if cut_R[rank] else 1
        size += 1 if cut_R[rank] else 0
    cuts.sizes_G[g] = size
    for expert in range(loads_SE.shape[1]):
        missing = 0
        for p in index.by_expert_P[index.first_E[expert] : index.first_E[expert + 1]]:
            missing += cuts.outside_RG[index.ranks_P[p], g]
        cuts.missing_EG[expert, g] = missing
    for step in range(len(loads_SE)):
        confined = 0.0
        for expert in range(loads_SE.shape[1]):
            if cuts.missing_EG[expert, g] == 0:
                confined += loads_SE[step, expert]
        cuts.means_SG[step, g] = confined / size
    cuts.num[0] = g + 1


@compiled
def find_tops(cuts: Cuts) -> None:
    """Note the largest mean of each step."""
    for step in range(len(cuts.tops_S)):
        best = 0
        for g in range(cuts.num[0]):
            if cuts.means_SG[step, g] > cuts.means_SG[step, best]:
                best = g
        cuts.at_S[step] = best
        cuts.tops_S[step] = cuts.means_SG[step, best]


@compiled
def forget_cuts(cuts: Cuts, num_kept: int) -> None:
    """Drop the half of the sets, the first `num_kept` aside, that come least close to being a step's largest."""
    num = cuts.num[0]
    closest_G = np.full(num, np.inf)
    for step in range(len(cuts.tops_S)):
        for g in range(num):
            closest_G[g] = min(closest_G[g], cuts.tops_S[step] - cuts.means_SG[step, g])
    closest_G[:num_kept] = -1.0
    order = np.argsort(closest_G, kind="mergesort")[: num_kept + (num - num_kept) // 2]
    order = np.sort(order)
    for to in range(len(order)):
        g = order[to]
        cuts.sizes_G[to] = cuts.sizes_G[g]
        cuts.outside_RG[:, to] = cuts.outside_RG[:, g]
        cuts.missing_EG[:, to] = cuts.missing_EG[:, g]
        cuts.means_SG[:, to] = cuts.means_SG[:, g]
    cuts.num[0] = len(order)
    find_tops(cuts)


@compiled
def change_signs(cuts: Cuts, expert: int, off: int, on: int, signs_G: npt.NDArray[np.int8]) -> None:
    """For each set: 1 if the expert becomes confined to it, -1 if it is released, by leaving `off` and coming to `on`.

    Args:
        off: a rank, or -1.
        on: a rank, or -1.
        signs_G: overwritten.
    """
    for g in range(cuts.num[0]):
        before = cuts.missing_EG[expert, g]
        after = before
        if off >= 0:
            after -= cuts.outside_RG[off, g]
        if on >= 0:
            after += cuts.outside_RG[on, g]
        signs_G[g] = (1 if after == 0 else 0) - (1 if before == 0 else 0)


@compiled
def price(
    cuts: Cuts, loads_SE: FloatArray, experts_N: IntArray, off_N: IntArray, on_N: IntArray, values_S: FloatArray
) -> None:
    """Write each step's largest mean if N distinct experts left ranks `off_N` and came to `on_N` (-1: none)."""
    num_experts, num = len(experts_N), cuts.num[0]
    signs_NG = np.empty((num_experts, num), np.int8)
    for n in range(num_experts):
        change_signs(cuts, experts_N[n], off_N[n], on_N[n], signs_NG[n])
    changed_C = np.empty(num, np.int64)
    is_changed_G = np.zeros(num, np.bool_)
    num_changed, num_raised = 0, 0
    for raised in (True, False):  # the raised ones first: of the others a step need know only if its top is relieved
        for g in range(num):
            highest, lowest = 0, 0
            for n in range(num_experts):
                highest = max(highest, signs_NG[n, g])
                lowest = min(lowest, signs_NG[n, g])
            if (highest > 0) == raised and (raised or lowest < 0):
                changed_C[num_changed] = g
                num_changed += 1
                is_changed_G[g] = True
        if raised:
            num_raised = num_changed
    for step in range(len(values_S)):
        value = cuts.tops_S[step]
        num_seen = num_raised
        if is_changed_G[cuts.at_S[step]]:
            value = 0.0
            num_seen = num_changed
            for g in range(num):
                if not is_changed_G[g]:
                    value = max(value, cuts.means_SG[step, g])
        for g in changed_C[:num_seen]:
            change = 0.0
            for n in range(num_experts):
                change += signs_NG[n, g] * loads_SE[step, experts_N[n]]
            value = max(value, cuts.means_SG[step, g] + change / cuts.sizes_G[g])
        values_S[step] = value


@compiled
def change(cuts: Cuts, loads_SE: FloatArray, experts_N: IntArray, off_N: IntArray, on_N: IntArray) -> None:
    """Let N distinct experts leave ranks `off_N` and come to `on_N` (-1: none)."""
    signs_G = np.empty(cuts.num[0], np.int8)
    for n in range(len(experts_N)):
        expert = experts_N[n]
        change_signs(cuts, expert, off_N[n], on_N[n], signs_G)
        for g in range(cuts.num[0]):
            if off_N[n] >= 0:
                cuts.missing_EG[expert, g] -= cuts.outside_RG[off_N[n], g]
            if on_N[n] >= 0:
                cuts.missing_EG[expert, g] += cuts.outside_RG[on_N[n], g]
            if signs_G[g] != 0:
                for step in range(len(loads_SE)):
                    cuts.means_SG[step, g] += signs_G[g] * loads_SE[step, expert] / cuts.sizes_G[g]
    find_tops(cuts)
