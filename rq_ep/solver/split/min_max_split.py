"""The min-max split of one step: pairs for each replica of an expert, so that the fullest rank has the fewest.

Water-filling comes close; augmenting paths finish. A path that is not found proves a lower bound: the ranks reached
hold every replica of what they compute, so one of them carries at least their mean (a cut; raising the target to it
is a Newton step). The result is exact: its maximum is the optimum of the linear programme, rounded up.

C replicas sorted by expert, those of expert e from `first_E[e]` up to `first_E[e + 1]`; `first_E` has E + 1 entries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.replicas import Replicas
from rq_ep.solver.compiled import compiled

NUM_SWEEPS = 3  # more of them gain less than the first augmenting path costs


@dataclass(frozen=True)
class ByExpert:
    """The replicas of a layer as the split sees them: sorted by expert, in the order in which sources fill them."""

    num_ranks: int
    replicas_C: IntArray  # index into P
    experts_C: IntArray
    ranks_C: IntArray
    first_E: IntArray  # [E + 1]

    @classmethod
    def of(cls, replicas: Replicas, num_ranks: int) -> "ByExpert":
        last = int(replicas.ranks_P.max(initial=0))
        if last >= num_ranks:
            raise UserError(f"a replica on rank {last}: there are {num_ranks} ranks")
        replicas_C = replicas.by_expert_P
        experts_C = replicas.experts_P[replicas_C]
        num_experts = int(experts_C[-1]) + 1 if len(experts_C) else 0
        first_E = np.searchsorted(experts_C, np.arange(num_experts + 1))
        return cls(num_ranks, replicas_C, experts_C, replicas.ranks_P[replicas_C], first_E)

    @property
    def num_experts(self) -> int:
        return len(self.first_E) - 1

    @property
    def number_C(self) -> IntArray:
        """[C] place of each replica among its expert's, from 0."""
        return np.arange(len(self.experts_C)) - self.first_E[self.experts_C]

    @property
    def num_replicas_C(self) -> IntArray:
        """[C] replicas of each replica's expert."""
        return np.diff(self.first_E)[self.experts_C]


class Split(NamedTuple):
    """An optimal split and its proof."""

    quotas_C: IntArray  # pairs of each replica; an expert's quotas sum to its total
    fullest: int  # pairs of the fullest rank, attained and least over all splits
    cut: tuple[int, ...]  # ranks that hold every replica of so much that their mean, rounded up, is `fullest`


def split(by_expert: ByExpert, totals_E: IntArray) -> Split:
    """Spread a step's pairs over the replicas of each expert so that the fullest rank is as empty as can be.

    Args:
        by_expert: the layer's replicas.
        totals_E: [E] pairs of each expert in this step.

    Raises:
        UserError: counts are not those of the layer's experts.
    """
    totals_E = check_totals(by_expert, totals_E)
    quotas_C = np.zeros(len(by_expert.ranks_C), np.int64)
    loads_R = np.zeros(by_expert.num_ranks, np.int64)
    cut_R = np.zeros(by_expert.num_ranks, np.bool_)
    fullest = split_step(totals_E, by_expert.first_E, by_expert.ranks_C, quotas_C, loads_R, cut_R)
    return Split(quotas_C, int(fullest), tuple(np.flatnonzero(cut_R).tolist()))


def check_totals(by_expert: ByExpert, totals_E: IntArray) -> IntArray:
    """The counts as compiled code wants them; raises a `UserError` unless they are those of the layer's experts."""
    totals_E = np.require(totals_E, np.int64, ("C", "W"))
    if totals_E.shape != (by_expert.num_experts,):
        raise UserError(f"counts of {totals_E.size} experts: the placement has {by_expert.num_experts}")
    if totals_E.min(initial=0) < 0:
        expert = int(totals_E.argmin())
        raise UserError(f"expert {expert} has {totals_E[expert]} pairs: counts must be at least 0")
    return totals_E


@compiled
def split_steps(
    totals_SE: IntArray, first_E: IntArray, ranks_C: IntArray, num_ranks: int
) -> tuple[IntArray, BoolArray]:
    """Many steps at once: [S] pairs of each step's fullest rank, and [S, R] the cuts that prove them."""
    num_steps = len(totals_SE)
    fullest_S = np.zeros(num_steps, np.int64)
    cuts_SR = np.zeros((num_steps, num_ranks), np.bool_)
    quotas_C = np.zeros(len(ranks_C), np.int64)
    loads_R = np.zeros(num_ranks, np.int64)
    for step in range(num_steps):
        loads_R[:] = 0
        fullest_S[step] = split_step(totals_SE[step], first_E, ranks_C, quotas_C, loads_R, cuts_SR[step])
    return fullest_S, cuts_SR


@compiled
def split_step(
    totals_E: IntArray, first_E: IntArray, ranks_C: IntArray, quotas_C: IntArray, loads_R: IntArray, cut_R: BoolArray
) -> int:
    """Split one step; write quotas, loads and cut, and return the pairs of the fullest rank.

    Args:
        totals_E: [E] pairs of each expert.
        first_E: [E + 1] index into C of each expert's first replica.
        ranks_C: [C] rank of each replica; those of an expert are on distinct ranks.
        quotas_C: [C] overwritten.
        loads_R: [R] what the ranks carry already, in general zeros; the quotas are added.
        cut_R: [R] overwritten.
    """
    num_shared = 0
    shared_V = np.empty(len(totals_E), np.int64)
    weights_V = np.empty(len(totals_E), np.int64)
    for expert in range(len(totals_E)):
        first, end = first_E[expert], first_E[expert + 1]
        quotas_C[first:end] = 0
        if end - first == 1:
            quotas_C[first] = totals_E[expert]
            loads_R[ranks_C[first]] += totals_E[expert]
        elif totals_E[expert] > 0:
            shared_V[num_shared] = expert
            weights_V[num_shared] = totals_E[expert]
            num_shared += 1
    total = loads_R.sum() + weights_V[:num_shared].sum()
    target = -(-total // len(loads_R))
    heaviest_first_V = shared_V[:num_shared][np.argsort(-weights_V[:num_shared], kind="mergesort")]
    by_load = np.empty(len(loads_R), np.int64)
    for _ in range(NUM_SWEEPS):
        for expert in heaviest_first_V:
            _water_fill(totals_E[expert], first_E[expert], first_E[expert + 1], ranks_C, quotas_C, loads_R, by_load)
        if loads_R.max() <= target:
            break
    return augment(first_E, ranks_C, quotas_C, loads_R, target, cut_R)


@compiled
def _water_fill(
    pairs: int, first: int, end: int, ranks_C: IntArray, quotas_C: IntArray, loads_R: IntArray, by_load: IntArray
) -> None:
    """Take an expert's pairs off its ranks and pour them back, the emptiest rank first, to a common level."""
    if end - first == 2:
        one, two = ranks_C[first], ranks_C[first + 1]
        free_one, free_two = loads_R[one] - quotas_C[first], loads_R[two] - quotas_C[first + 1]
        share = min(max((pairs + free_two - free_one + 1) >> 1, 0), pairs)
        quotas_C[first], quotas_C[first + 1] = share, pairs - share
        loads_R[one], loads_R[two] = free_one + share, free_two + pairs - share
        return
    num = 0
    for c in range(first, end):  # insertion by load; the first of equals stays first
        load = loads_R[ranks_C[c]] - quotas_C[c]
        loads_R[ranks_C[c]] = load
        quotas_C[c] = 0
        place = num
        while place > 0 and loads_R[ranks_C[by_load[place - 1]]] > load:
            by_load[place] = by_load[place - 1]
            place -= 1
        by_load[place] = c
        num += 1
    volume, num_filled = pairs, 0
    while num_filled < num:
        load = loads_R[ranks_C[by_load[num_filled]]]
        if num_filled > 0 and load * num_filled >= volume:
            break
        volume += load
        num_filled += 1
    level, extra = volume // num_filled, volume % num_filled
    for place in range(num_filled):
        c = by_load[place]
        quotas_C[c] = level + (1 if place < extra else 0) - loads_R[ranks_C[c]]
        loads_R[ranks_C[c]] += quotas_C[c]


@compiled
def augment(
    first_E: IntArray, ranks_C: IntArray, quotas_C: IntArray, loads_R: IntArray, target: int, cut_R: BoolArray
) -> int:
    """Push pairs along shortest chains of replicas until no rank exceeds `target`; raise it where a cut proves it low.

    Changes `quotas_C` and `loads_R`, writes `cut_R`, and returns the target in the end, which the cut proves.
    """
    cut_R[:] = True
    if loads_R.max() <= target:
        return target
    num_ranks = len(loads_R)
    experts_C, first_R, held_H = _by_rank(first_E, ranks_C, num_ranks)
    giver_R = np.empty(num_ranks, np.int64)  # the chain that reached a rank: whose replica gives,
    taker_R = np.empty(num_ranks, np.int64)  # and the rank's own replica of the same expert
    queue_R = np.empty(num_ranks, np.int64)
    reached_R = np.empty(num_ranks, np.bool_)
    while True:
        num_over = 0
        for rank in range(num_ranks):
            reached_R[rank] = loads_R[rank] > target
            if reached_R[rank]:
                giver_R[rank] = -1
                queue_R[num_over] = rank
                num_over += 1
        if num_over == 0:
            return target
        num_reached, found = num_over, -1
        place = 0
        while place < num_reached and found < 0:
            rank = queue_R[place]
            place += 1
            for c in held_H[first_R[rank] : first_R[rank + 1]]:
                if quotas_C[c] == 0:
                    continue
                for other in range(first_E[experts_C[c]], first_E[experts_C[c] + 1]):
                    taker = ranks_C[other]
                    if not reached_R[taker]:
                        reached_R[taker] = True
                        giver_R[taker], taker_R[taker] = c, other
                        queue_R[num_reached] = taker
                        num_reached += 1
                        if found < 0 and loads_R[taker] < target:
                            found = taker
                if found >= 0:
                    break
        if found >= 0:
            _push(found, giver_R, taker_R, ranks_C, quotas_C, loads_R, target)
        else:
            confined = 0
            for rank in queue_R[:num_reached]:
                confined += loads_R[rank]
            target = -(-confined // num_reached)
            cut_R[:] = reached_R


@compiled
def _by_rank(first_E: IntArray, ranks_C: IntArray, num_ranks: int) -> tuple[IntArray, IntArray, IntArray]:
    """[C] the expert of each replica, and the replicas of rank r that leave a choice: `held_H[first_R[r] : ...]`."""
    experts_C = np.empty(len(ranks_C), np.int64)
    end_R = np.zeros(num_ranks + 1, np.int64)
    for expert in range(len(first_E) - 1):
        experts_C[first_E[expert] : first_E[expert + 1]] = expert
        if first_E[expert + 1] - first_E[expert] > 1:
            for c in range(first_E[expert], first_E[expert + 1]):
                end_R[ranks_C[c]] += 1
    end_R = np.cumsum(end_R)
    held_H = np.empty(end_R[num_ranks], np.int64)
    for c in range(len(ranks_C) - 1, -1, -1):
        if first_E[experts_C[c] + 1] - first_E[experts_C[c]] > 1:
            end_R[ranks_C[c]] -= 1
            held_H[end_R[ranks_C[c]]] = c
    return experts_C, end_R, held_H


@compiled
def _push(
    found: int,
    giver_R: IntArray,
    taker_R: IntArray,
    ranks_C: IntArray,
    quotas_C: IntArray,
    loads_R: IntArray,
    target: int,
) -> None:
    """Move as many pairs as fit along the chain that ends in rank `found`."""
    amount, rank = target - loads_R[found], found
    while giver_R[rank] >= 0:
        amount = min(amount, quotas_C[giver_R[rank]])
        rank = ranks_C[giver_R[rank]]
    amount = min(amount, loads_R[rank] - target)
    loads_R[rank] -= amount
    loads_R[found] += amount
    rank = found
    while giver_R[rank] >= 0:
        quotas_C[giver_R[rank]] -= amount
        quotas_C[taker_R[rank]] += amount
        rank = ranks_C[giver_R[rank]]
