"""The min-max split of one step (a parametric max-flow): pairs for each replica, so that the fullest rank has least.

Water filling comes close; augmenting paths finish. Where no path is left, a cut proves a lower bound: its ranks hold
every replica of what they compute, so one of them carries at least their mean. Raising the target to it is a step of
Newton's method (Dinkelbach). The result is exact: its maximum is the optimum of the linear program, rounded up.

Axes: C replicas sorted by expert, those of expert e from `first_E[e]` up to `first_E[e + 1]`, where `first_E` has E + 1
entries; X experts with several replicas; Y replicas of these, sorted by rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.replicas import Replicas
from rq_ep.solver.compiled import compiled, compiled_beside, compiled_part
from rq_ep.solver.split.augmenting_paths import ReplicaIndex, push_or_cut, rank_search
from rq_ep.solver.split.heaviest_first import heaviest_first

NUM_SWEEPS = 3  # more of them gain less than the first augmenting path costs


@dataclass(frozen=True)
class ByExpert:
    """The replicas of a layer sorted by expert, in the order in which sources fill them."""

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
        return cls(
            num_ranks, replicas_C, replicas.experts_P[replicas_C], replicas.ranks_P[replicas_C], replicas.first_E
        )

    @property
    def num_experts(self) -> int:
        return len(self.first_E) - 1

    @property
    def number_C(self) -> IntArray:
        """[C] number of each replica among those of its expert, from 0."""
        return np.arange(len(self.experts_C)) - self.first_E[self.experts_C]

    @property
    def num_replicas_C(self) -> IntArray:
        """[C] how many replicas the expert of each replica has."""
        return np.diff(self.first_E)[self.experts_C]


class Split(NamedTuple):
    """An optimal split, and the cut that proves it."""

    quotas_C: IntArray  # pairs of each replica; an expert's quotas sum to its total
    fullest: int  # pairs of the fullest rank: attained, and the least over all splits
    cut: tuple[int, ...]  # ranks that alone hold experts of so many pairs that their mean, rounded up, is `fullest`


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
    """Counts as contiguous int64 for compiled code; a `UserError` unless they are counts of the layer's experts."""
    totals_E = np.require(totals_E, np.int64, ("C", "W"))
    if totals_E.shape != (by_expert.num_experts,):
        raise UserError(f"counts of {totals_E.size} experts: the placement has {by_expert.num_experts}")
    if totals_E.min(initial=0) < 0:
        expert = int(totals_E.argmin())
        raise UserError(f"expert {expert} has {totals_E[expert]} pairs: counts must be at least 0")
    return totals_E


@compiled_beside
def split_steps(
    totals_SE: IntArray, first_E: IntArray, ranks_C: IntArray, num_ranks: int
) -> tuple[IntArray, IntArray, BoolArray]:
    """Split many steps.

    Returns:
        [S] pairs of each step's fullest rank; [C] pairs of each replica, all steps together; [S, R] the cut that proves
        each step's optimum.
    """
    num_steps = len(totals_SE)
    fullest_S = np.zeros(num_steps, np.int64)
    pairs_C = np.zeros(len(ranks_C), np.int64)
    cuts_SR = np.zeros((num_steps, num_ranks), np.bool_)
    quotas_C = np.zeros(len(ranks_C), np.int64)
    loads_R = np.zeros(num_ranks, np.int64)
    for step in range(num_steps):
        for rank in range(num_ranks):
            loads_R[rank] = 0
        fullest_S[step] = split_step(totals_SE[step], first_E, ranks_C, quotas_C, loads_R, cuts_SR[step])
        for c in range(len(pairs_C)):
            pairs_C[c] += quotas_C[c]
    return fullest_S, pairs_C, cuts_SR


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
    num_shared, total = 0, 0
    shared_X = np.empty(len(totals_E), np.int64)
    weights_X = np.empty(len(totals_E), np.int64)
    for expert in range(len(totals_E)):
        first, end = first_E[expert], first_E[expert + 1]
        for c in range(first, end):
            quotas_C[c] = 0
        if end - first == 1:
            quotas_C[first] = totals_E[expert]
            loads_R[ranks_C[first]] += totals_E[expert]
        elif totals_E[expert] > 0:
            shared_X[num_shared] = expert
            weights_X[num_shared] = totals_E[expert]
            total += totals_E[expert]
            num_shared += 1
    for rank in range(len(loads_R)):
        total += loads_R[rank]
    target = -(-total // len(loads_R))
    order_X = heaviest_first(weights_X[:num_shared])
    by_load_R = np.empty(len(loads_R), np.int64)
    for _ in range(NUM_SWEEPS):
        for x in order_X:
            expert = shared_X[x]
            _water_fill(totals_E[expert], first_E[expert], first_E[expert + 1], ranks_C, quotas_C, loads_R, by_load_R)
        if _keeps_to(loads_R, target):
            break
    return augment(first_E, ranks_C, quotas_C, loads_R, target, cut_R)


@compiled_part
def _keeps_to(loads_R: IntArray, target: int) -> bool:
    """Whether no rank exceeds the target."""
    for load in loads_R:  # noqa: SIM110 - numba compiles no generator
        if load > target:
            return False
    return True


@compiled_part
def _water_fill(
    pairs: int, first: int, end: int, ranks_C: IntArray, quotas_C: IntArray, loads_R: IntArray, by_load_R: IntArray
) -> None:
    """Water filling: take an expert's pairs off its ranks and fill these again, the emptiest first, to one level."""
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
        position = num
        while position > 0 and loads_R[ranks_C[by_load_R[position - 1]]] > load:
            by_load_R[position] = by_load_R[position - 1]
            position -= 1
        by_load_R[position] = c
        num += 1
    volume, num_filled = pairs, 0
    while num_filled < num:
        load = loads_R[ranks_C[by_load_R[num_filled]]]
        if num_filled > 0 and load * num_filled >= volume:
            break
        volume += load
        num_filled += 1
    level, extra = volume // num_filled, volume % num_filled
    for position in range(num_filled):
        c = by_load_R[position]
        quotas_C[c] = level + (1 if position < extra else 0) - loads_R[ranks_C[c]]
        loads_R[ranks_C[c]] += quotas_C[c]


@compiled_part
def augment(
    first_E: IntArray, ranks_C: IntArray, quotas_C: IntArray, loads_R: IntArray, target: int, cut_R: BoolArray
) -> int:
    """Move pairs along augmenting paths until no rank exceeds `target`; raise it where a cut proves it too low.

    Changes `quotas_C` and `loads_R`, writes `cut_R`, and returns the final target, which the cut proves.
    """
    for rank in range(len(cut_R)):
        cut_R[rank] = True
    if _keeps_to(loads_R, target):
        return target
    index = _index(first_E, ranks_C, len(loads_R))
    search = rank_search(len(loads_R), len(first_E) - 1)
    while True:
        num_cut, confined = push_or_cut(index, quotas_C, loads_R, target, 0, 0, search)
        if num_cut == 0:
            return target
        target = int(-(-confined // num_cut))
        for rank in range(len(cut_R)):
            cut_R[rank] = search.is_reached_R[rank]


@compiled_part
def _index(first_E: IntArray, ranks_C: IntArray, num_ranks: int) -> ReplicaIndex:
    """The index of replicas sorted by expert; by rank, only those of experts that leave a choice."""
    num_replicas = len(ranks_C)
    experts_C, by_expert_C = np.empty(num_replicas, np.int64), np.empty(num_replicas, np.int64)
    end_R = np.zeros(num_ranks + 1, np.int64)
    for expert in range(len(first_E) - 1):
        first, end = first_E[expert], first_E[expert + 1]
        for c in range(first, end):
            experts_C[c], by_expert_C[c] = expert, c
            if end - first > 1:
                end_R[ranks_C[c]] += 1
    for rank in range(num_ranks):
        end_R[rank + 1] += end_R[rank]
    by_rank_Y = np.empty(end_R[num_ranks], np.int64)
    for c in range(num_replicas - 1, -1, -1):
        if first_E[experts_C[c] + 1] - first_E[experts_C[c]] > 1:
            end_R[ranks_C[c]] -= 1
            by_rank_Y[end_R[ranks_C[c]]] = c
    return ReplicaIndex(experts_C, ranks_C, by_expert_C, first_E, by_rank_Y, end_R)
