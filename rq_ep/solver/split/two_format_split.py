"""The split of a step where replicas of an expert come in two formats: at most half of its pairs go to fewer bits.

To the split, an expert that mixes formats is two virtual experts: an upper half of its pairs, which only its replicas
of most bits may compute, and a lower half, which all its replicas may. The split of virtual experts is exact, as any is
(`min_max_split`). It begins with the best split over replicas of most bits alone, so that the others are used only
where they even out a step. Every source sends them the same part of its pairs, and chooses the pairs of lowest gates.

Axes: C replicas sorted by expert, those of fewest bits first; X experts that mix formats; V virtual experts, which are
the upper halves of all experts (the whole where formats do not mix), then the lower halves of the X; W the replicas
that may compute each virtual expert; G groups of replicas that share expert and format.
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
from rq_ep.solver.split.one_rank_per_expert import route_to_one_rank
from rq_ep.solver.split.source_split import nearest_first


class VirtualExperts(NamedTuple):
    """The halves of a layer's experts, for compiled code."""

    mixing_X: IntArray  # experts that mix formats, ascending
    first_V: IntArray  # [V + 1] index into W
    ranks_W: IntArray
    replicas_W: IntArray  # index into C; those of most bits come last in each virtual expert


@dataclass(frozen=True)
class TwoFormatSplit:
    """The splits of a layer that mixes formats: pure functions of the counts, the same on every rank."""

    by_expert: ByExpert
    virtual: VirtualExperts
    upper: ByExpert  # the replicas of most bits, which may compute all pairs of their expert
    groups: ByExpert  # all replicas, with those of a mixing expert as two experts, fewer bits first
    group_X: IntArray  # number of each mixing expert's first group

    @classmethod
    def of(cls, replicas: Replicas, num_ranks: int) -> "TwoFormatSplit":
        """Prepare a layer, some experts of which mix formats."""
        by_expert = ByExpert.of(replicas, num_ranks)
        first_E, mixing_X = by_expert.first_E, np.array(replicas.mixing_experts, np.int64)
        formats_C = np.array(replicas.formats_P)[by_expert.replicas_C]
        whole = [np.arange(first, end) for first, end in pairwise(first_E.tolist())]
        upper = [of_expert[formats_C[of_expert] == formats_C[of_expert[-1]]] for of_expert in whole]
        halves = [*upper, *(whole[expert] for expert in mixing_X.tolist())]
        first_V = np.cumsum([0, *map(len, halves)])
        replicas_W = np.concatenate(halves)
        virtual = VirtualExperts(mixing_X, first_V, by_expert.ranks_C[replicas_W], replicas_W)
        starts = np.unique(np.concatenate([first_E[:-1], [of_expert[0] for of_expert in upper]]))
        return cls(
            by_expert,
            virtual,
            upper=_regrouped(by_expert, np.concatenate(upper), first_V[: len(upper)]),
            groups=_regrouped(by_expert, np.arange(len(formats_C)), starts),
            group_X=np.searchsorted(starts, first_E[mixing_X]),
        )

    def split(self, totals_E: IntArray) -> IntArray:
        """[C] pairs of each replica: the min-max split in which at most half of an expert's pairs go to fewer bits."""
        totals_E = check_totals(self.by_expert, totals_E)
        quotas_C = np.zeros(len(self.by_expert.ranks_C), np.int64)
        split_step_in_two_formats(totals_E, self.virtual, self.by_expert.num_ranks, quotas_C)
        return quotas_C

    def route_to_one_rank(self, totals_E: IntArray, read_s_P: FloatArray) -> IntArray:
        """[C] all pairs of an expert on one replica of most bits, as `one_rank_per_expert` chooses it."""
        quotas_C = np.zeros(len(self.by_expert.ranks_C), np.int64)
        num_upper = len(self.upper.ranks_C)
        quotas_C[self.virtual.replicas_W[:num_upper]] = route_to_one_rank(self.upper, totals_E, read_s_P)
        return quotas_C

    def assign_sources(self, counts_RE: IntArray, quotas_C: IntArray, topology: Topology) -> IntArray:
        """[R, P] pairs from each source rank to each replica: every source sends the same part of them to fewer bits.

        The part is exact to one pair. It lets each source keep the pairs that matter most from replicas of fewer bits.
        Among the replicas of a format, the nearest is filled first.
        """
        first_G, mixing_X, group_X = self.groups.first_E, self.virtual.mixing_X, self.group_X
        low_X = np.add.reduceat(quotas_C, first_G[:-1])[group_X]
        running_RX = np.cumsum(counts_RE[:, mixing_X], axis=0)
        part_X = low_X / np.maximum(running_RX[-1], 1)
        low_RX = np.diff(np.rint(running_RX * part_X).astype(np.int64), axis=0, prepend=0)
        counts_RG = counts_RE[:, self.by_expert.experts_C[first_G[:-1]]]
        counts_RG[:, group_X] = low_RX
        counts_RG[:, group_X + 1] -= low_RX
        return nearest_first(self.groups, counts_RG, quotas_C, topology)


def _regrouped(by_expert: ByExpert, chosen: IntArray, starts: IntArray) -> ByExpert:
    """Some of the replicas, with groups as experts, which begin at `starts`."""
    first_G = np.append(starts, len(chosen))
    groups = np.repeat(np.arange(len(starts)), np.diff(first_G))
    return ByExpert(by_expert.num_ranks, by_expert.replicas_C[chosen], groups, by_expert.ranks_C[chosen], first_G)


@compiled
def split_step_in_two_formats(totals_E: IntArray, virtual: VirtualExperts, num_ranks: int, quotas_C: IntArray) -> int:
    """Split one step over virtual experts; write the quotas and return the pairs of the fullest rank.

    Args:
        totals_E: [E] pairs of each expert.
        virtual: the halves.
        num_ranks: R.
        quotas_C: [C] overwritten.
    """
    num_experts, first_V = len(totals_E), virtual.first_V
    num_upper = first_V[num_experts]
    quotas_W = np.zeros(len(virtual.ranks_W), np.int64)
    loads_R = np.zeros(num_ranks, np.int64)
    cut_R = np.zeros(num_ranks, np.bool_)
    fullest = split_step(
        totals_E, first_V[: num_experts + 1], virtual.ranks_W[:num_upper], quotas_W[:num_upper], loads_R, cut_R
    )
    mean = -(-totals_E.sum() // num_ranks)
    if fullest > mean:
        for x in range(len(virtual.mixing_X)):
            upper, end = first_V[virtual.mixing_X[x]], first_V[num_experts + x + 1]
            num = first_V[virtual.mixing_X[x] + 1] - upper
            rest = totals_E[virtual.mixing_X[x]] // 2
            for n in range(num):
                pairs = min(quotas_W[upper + n], rest)
                quotas_W[upper + n] -= pairs
                quotas_W[end - num + n] = pairs
                rest -= pairs
        fullest = augment(first_V, virtual.ranks_W, quotas_W, loads_R, mean, cut_R)
    quotas_C[:] = 0
    for w in range(len(quotas_W)):
        quotas_C[virtual.replicas_W[w]] += quotas_W[w]
    return fullest


@compiled
def split_steps_in_two_formats(
    totals_SE: IntArray, virtual: VirtualExperts, num_ranks: int, num_replicas: int
) -> tuple[IntArray, IntArray]:
    """Split many steps: [S] pairs of each step's fullest rank, and [C] pairs of each replica, all steps together."""
    fullest_S = np.zeros(len(totals_SE), np.int64)
    pairs_C, quotas_C = np.zeros(num_replicas, np.int64), np.zeros(num_replicas, np.int64)
    for step in range(len(totals_SE)):
        fullest_S[step] = split_step_in_two_formats(totals_SE[step], virtual, num_ranks, quotas_C)
        pairs_C += quotas_C
    return fullest_S, pairs_C
