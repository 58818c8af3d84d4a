"""The min-max split of one step: pairs for each replica of a shared expert, so that the fullest rank has the fewest.

Water-filling comes close; augmenting paths finish. A path that is not found proves a lower bound: the ranks reached
hold every replica of what they compute, so one of them carries at least their mean (a cut; raising the target to it
is a Newton step). The result is exact: its maximum is the optimum of the linear programme, rounded up.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.replicas import Replicas

NUM_SWEEPS = 3  # more of them gain less than the first augmenting path costs


@dataclass(frozen=True)
class SharedExperts:
    """The part of a layer that leaves a choice: experts with two or more replicas.

    V shared experts, C their replicas, sorted by (expert, rank). The other experts load their only rank.
    """

    num_ranks: int
    replicas_C: IntArray  # index into P
    experts_C: IntArray
    ranks_C: IntArray
    groups_C: IntArray  # index into V
    first_V: IntArray  # index into C of each shared expert's first replica
    experts_V: IntArray
    ranks_V: tuple[tuple[int, ...], ...]
    single_experts: IntArray
    single_ranks: IntArray
    single_replicas: IntArray  # index into P

    @classmethod
    def of(cls, replicas: Replicas, num_ranks: int) -> "SharedExperts":
        order_P = replicas.by_expert_P
        experts_P, ranks_P = replicas.experts_P[order_P], replicas.ranks_P[order_P]
        num_replicas_E = np.bincount(experts_P)
        shared_P = num_replicas_E[experts_P] > 1
        experts_C, ranks_C = experts_P[shared_P], ranks_P[shared_P]
        experts_V, first_V, groups_C = np.unique(experts_C, return_index=True, return_inverse=True)
        ranks_V = tuple(tuple(part.tolist()) for part in np.split(ranks_C, first_V[1:])) if len(first_V) else ()
        return cls(
            num_ranks, order_P[shared_P], experts_C, ranks_C, groups_C, first_V, experts_V, ranks_V,
            experts_P[~shared_P], ranks_P[~shared_P], order_P[~shared_P],
        )  # fmt: skip

    @property
    def number_C(self) -> IntArray:
        """[C] place of each replica among its expert's, from 0."""
        return np.arange(len(self.groups_C)) - self.first_V[self.groups_C]

    @property
    def num_replicas_C(self) -> IntArray:
        """[C] replicas of each replica's expert."""
        return np.bincount(self.groups_C)[self.groups_C]

    def single_loads(self, totals_E: IntArray) -> list[int]:
        """Pairs per rank that leave no choice; float64 sums are exact below 2^53."""
        weights = totals_E[self.single_experts]
        loads_R = np.bincount(self.single_ranks, weights, minlength=self.num_ranks)
        return [int(load) for load in loads_R.tolist()]


class Split(NamedTuple):
    """An optimal split and its proof."""

    quotas_C: IntArray  # pairs of each replica; an expert's quotas sum to its total
    fullest: int  # pairs of the fullest rank, attained and least over all splits
    cut: tuple[int, ...]  # ranks that hold every replica of so much that their mean, rounded up, is `fullest`


def split(shared: SharedExperts, totals_E: IntArray) -> Split:
    """Spread a step's pairs over the replicas of shared experts so that the fullest rank is as empty as can be.

    Args:
        shared: the layer's experts with several replicas.
        totals_E: [E] pairs of each expert in this step.
    """
    loads = shared.single_loads(totals_E)
    totals = totals_E[shared.experts_V].tolist()
    target = max(-(-(sum(loads) + sum(totals)) // shared.num_ranks), 0)
    quotas: list[dict[int, int]] = [dict.fromkeys(ranks, 0) for ranks in shared.ranks_V]
    heaviest_first = sorted(range(len(totals)), key=lambda v: -totals[v])
    for _ in range(NUM_SWEEPS):
        for v in heaviest_first:
            _water_fill(totals[v], quotas[v], loads)
        if max(loads) <= target:
            break
    fullest, cut = augment(quotas, loads, target)
    return Split(np.array([quota for by_rank in quotas for quota in by_rank.values()], np.int64), fullest, cut)


def _water_fill(pairs: int, quotas: dict[int, int], loads: list[int]) -> None:
    """Take an expert's pairs off its ranks and pour them back, the emptiest rank first, to a common level."""
    if not pairs:
        return
    if len(quotas) == 2:
        (one, old_one), (two, old_two) = quotas.items()
        free_one, free_two = loads[one] - old_one, loads[two] - old_two
        first = min(max((pairs + free_two - free_one + 1) >> 1, 0), pairs)
        quotas[one], quotas[two] = first, pairs - first
        loads[one], loads[two] = free_one + first, free_two + pairs - first
        return
    for rank, quota in quotas.items():
        loads[rank] -= quota
        quotas[rank] = 0
    by_load = sorted(quotas, key=loads.__getitem__)
    volume = pairs
    for num_filled, rank in enumerate(by_load):
        if num_filled and loads[rank] * num_filled >= volume:
            by_load = by_load[:num_filled]
            break
        volume += loads[rank]
    level, extra = divmod(volume, len(by_load))
    for position, rank in enumerate(by_load):
        quotas[rank] = level + (position < extra) - loads[rank]
        loads[rank] += quotas[rank]


def augment(quotas: Sequence[dict[int, int]], loads: list[int], target: int) -> tuple[int, tuple[int, ...]]:
    """Push pairs along shortest chains of replicas until no rank exceeds `target`; raise it where a cut proves it low.

    Changes `quotas` and `loads`; returns the target in the end and the cut that proves it.
    """
    cut = tuple(range(len(loads)))
    over = [rank for rank, load in enumerate(loads) if load > target]
    if not over:
        return target, cut
    held: list[list[dict[int, int]]] = [[] for _ in loads]
    for by_rank in quotas:
        for rank in by_rank:
            held[rank].append(by_rank)
    while over:
        came_from: dict[int, tuple[int, dict[int, int]] | None] = dict.fromkeys(over)
        found = _nearest_below(held, loads, target, came_from)
        if found is None:
            cut = tuple(sorted(came_from))
            target = -(-sum(loads[rank] for rank in cut) // len(cut))
        else:
            _push(came_from, found, loads, target)
        over = [rank for rank in over if loads[rank] > target]
    return target, cut


def _nearest_below(
    held: list[list[dict[int, int]]],
    loads: list[int],
    target: int,
    came_from: dict[int, tuple[int, dict[int, int]] | None],
) -> int | None:
    """Breadth first from the ranks in `came_from`, which grows, to a rank below `target`; None if there is none."""
    queue = deque(came_from)
    while queue:
        rank = queue.popleft()
        for by_rank in held[rank]:
            if by_rank[rank]:
                for other in by_rank:
                    if other not in came_from:
                        came_from[other] = (rank, by_rank)
                        if loads[other] < target:
                            return other
                        queue.append(other)
    return None


def _push(came_from: dict[int, tuple[int, dict[int, int]] | None], found: int, loads: list[int], target: int) -> None:
    """Move as many pairs as fit along the chain that ends in `found`."""
    chain = []
    rank = found
    while (step := came_from[rank]) is not None:
        chain.append((step[0], rank, step[1]))
        rank = step[0]
    amount = min(loads[rank] - target, target - loads[found], *(by_rank[source] for source, _, by_rank in chain))
    for source, destination, by_rank in chain:
        by_rank[source] -= amount
        by_rank[destination] += amount
    loads[rank] -= amount
    loads[found] += amount
