"""The split of a step where replicas of an expert come in two formats: at most half of its pairs go to fewer bits.

An expert that mixes formats is two experts to the split: an upper half of its pairs, which its replicas of most bits
compute, and a lower half, which all of them may. The split of these is exact, as any is (`min_max_split`). It
begins with the best split over replicas of most bits alone, so that the others are used where they even out a step.
Every source sends them the same part of its pairs, and chooses those of the lowest gates.

Letters as in `min_max_split`: C replicas sorted by expert, those of fewest bits first. V halves: the upper ones of
all experts, which are the whole where formats do not mix, then the lower ones of the M experts that mix. D replicas
that may compute them.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.replicas import Replicas
from rq_ep.core.topology import Topology
from rq_ep.solver.compiled import compiled
from rq_ep.solver.split.min_max_split import ByExpert, augment, check_totals, split_step
from rq_ep.solver.split.one_rank_per_expert import activate_one
from rq_ep.solver.split.source_split import nearest_first


class Tables(NamedTuple):
    """The halves of a layer's experts, for compiled code."""

    mixing_M: IntArray  # experts that mix formats, ascending
    first_V: IntArray  # [V + 1] index into D
    ranks_D: IntArray
    replicas_D: IntArray  # index into C; for each half those of most bits come last


@dataclass(frozen=True)
class Halves:
    """What `rq` decides a step with in a layer that mixes formats. Pure, and the same on every rank."""

    by_expert: ByExpert
    tables: Tables
    upper: ByExpert  # replicas that may compute all pairs of their expert
    groups: ByExpert  # with the replicas of a mixing expert as two experts, fewer bits first
    group_M: IntArray  # number of each mixing expert's first group

    @classmethod
    def of(cls, replicas: Replicas, num_ranks: int) -> "Halves":
        """The tables of a layer, some experts of which mix formats."""
        by_expert = ByExpert.of(replicas, num_ranks)
        first_E, mixing_M = by_expert.first_E, np.array(replicas.mixing_experts, np.int64)
        formats_C = np.array(replicas.formats_P)[by_expert.replicas_C]
        whole = [np.arange(first, end) for first, end in pairwise(first_E.tolist())]
        upper = [of_expert[formats_C[of_expert] == formats_C[of_expert[-1]]] for of_expert in whole]
        halves = [*upper, *(whole[expert] for expert in mixing_M.tolist())]
        first_V = np.cumsum([0, *map(len, halves)])
        replicas_D = np.concatenate(halves)
        tables = Tables(mixing_M, first_V, by_expert.ranks_C[replicas_D], replicas_D)
        starts = np.unique(np.concatenate([first_E[:-1], [of_expert[0] for of_expert in upper]]))
        return cls(
            by_expert,
            tables,
            upper=_regrouped(by_expert, np.concatenate(upper), first_V[: len(upper)]),
            groups=_regrouped(by_expert, np.arange(len(formats_C)), starts),
            group_M=np.searchsorted(starts, first_E[mixing_M]),
        )

    def split(self, totals_E: IntArray) -> IntArray:
        """[C] pairs of each replica, so that the fullest rank is as empty as halves allow."""
        totals_E = check_totals(self.by_expert, totals_E)
        quotas_C = np.zeros(len(self.by_expert.ranks_C), np.int64)
        split_halves(totals_E, self.tables, self.by_expert.num_ranks, quotas_C)
        return quotas_C

    def activate_one(self, totals_E: IntArray, read_s_P: FloatArray) -> IntArray:
        """[C] all pairs of an expert on one replica of most bits, as `one_rank_per_expert` chooses it."""
        quotas_C = np.zeros(len(self.by_expert.ranks_C), np.int64)
        num_upper = len(self.upper.ranks_C)
        quotas_C[self.tables.replicas_D[:num_upper]] = activate_one(self.upper, totals_E, read_s_P)
        return quotas_C

    def deal(self, counts_RE: IntArray, quotas_C: IntArray, topology: Topology) -> IntArray:
        """[R, P] who sends to whom: replicas of fewer bits get the same part of every source's pairs, to one pair.

        Only so can each source keep the pairs that matter most from them. Among replicas of a format the nearest is
        filled first.
        """
        first_G, mixing_M, group_M = self.groups.first_E, self.tables.mixing_M, self.group_M
        low_M = np.add.reduceat(quotas_C, first_G[:-1])[group_M]
        running_RM = np.cumsum(counts_RE[:, mixing_M], axis=0)
        part_M = low_M / np.maximum(running_RM[-1], 1)
        low_RM = np.diff(np.rint(running_RM * part_M).astype(np.int64), axis=0, prepend=0)
        counts_RG = counts_RE[:, self.by_expert.experts_C[first_G[:-1]]]
        counts_RG[:, group_M] = low_RM
        counts_RG[:, group_M + 1] -= low_RM
        return nearest_first(self.groups, counts_RG, quotas_C, topology)


def _regrouped(by_expert: ByExpert, chosen_N: IntArray, starts: IntArray) -> ByExpert:
    """Some of the replicas, with new experts that begin at `starts`."""
    first = np.append(starts, len(chosen_N))
    experts_N = np.repeat(np.arange(len(starts)), np.diff(first))
    return ByExpert(by_expert.num_ranks, by_expert.replicas_C[chosen_N], experts_N, by_expert.ranks_C[chosen_N], first)


@compiled
def split_halves(totals_E: IntArray, tables: Tables, num_ranks: int, quotas_C: IntArray) -> int:
    """Split one step; write the quotas and return the pairs of the fullest rank.

    Args:
        totals_E: [E] pairs of each expert.
        tables: the halves.
        num_ranks: R.
        quotas_C: [C] overwritten.
    """
    num_experts, first_V = len(totals_E), tables.first_V
    num_upper = first_V[num_experts]
    quotas_D = np.zeros(len(tables.ranks_D), np.int64)
    loads_R = np.zeros(num_ranks, np.int64)
    cut_R = np.zeros(num_ranks, np.bool_)
    fullest = split_step(
        totals_E, first_V[: num_experts + 1], tables.ranks_D[:num_upper], quotas_D[:num_upper], loads_R, cut_R
    )
    mean = -(-totals_E.sum() // num_ranks)
    if fullest > mean:
        for m in range(len(tables.mixing_M)):
            upper, end = first_V[tables.mixing_M[m]], first_V[num_experts + m + 1]
            num = first_V[tables.mixing_M[m] + 1] - upper
            rest = totals_E[tables.mixing_M[m]] // 2
            for n in range(num):
                pairs = min(quotas_D[upper + n], rest)
                quotas_D[upper + n] -= pairs
                quotas_D[end - num + n] = pairs
                rest -= pairs
        fullest = augment(first_V, tables.ranks_D, quotas_D, loads_R, mean, cut_R)
    quotas_C[:] = 0
    for d in range(len(quotas_D)):
        quotas_C[tables.replicas_D[d]] += quotas_D[d]
    return fullest


@compiled
def split_steps_by_halves(
    totals_SE: IntArray, tables: Tables, num_ranks: int, num_replicas: int
) -> tuple[IntArray, IntArray]:
    """Many steps: [S] pairs of each step's fullest rank, and [C] pairs of each replica in all of them."""
    fullest_S = np.zeros(len(totals_SE), np.int64)
    pairs_C, quotas_C = np.zeros(num_replicas, np.int64), np.zeros(num_replicas, np.int64)
    for step in range(len(totals_SE)):
        fullest_S[step] = split_halves(totals_SE[step], tables, num_ranks, quotas_C)
        pairs_C += quotas_C
    return fullest_S, pairs_C
