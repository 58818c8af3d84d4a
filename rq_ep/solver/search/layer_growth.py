"""A layer that grows by replicas: what another one would gain, and the best ones added in a row.

Axes: P replicas in any order; X given replicas; Y turns, in each of which some of these are added together; M replicas
that are chosen on the way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.compiled import compiled, compiled_beside, compiled_part
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit, optimize_all
from rq_ep.solver.search.max_flow import TOLERANCE, Splits, index_replicas, water_fill
from rq_ep.solver.search.neighborhood import LayerLimits, exceeds_node_spread
from rq_ep.solver.split.augmenting_paths import ReplicaIndex

FULL_TOLERANCE = 0.002  # ranks within this of the fullest count as full, so that equally full ones are relieved in turn
LEAST_GAIN = 1e-6  # of max/mean: below it a replica is not worth its bytes
OPTIMIZE_EVERY = 8  # turns between two exact splits of the steps
ROOM = 12  # replicas that a rank must have room for, if one is chosen before its turn: other layers use it as well
RANKS_PER_ADDITION = 64  # one replica is added at a time for each so many ranks
NEARLY_BEST = 0.5  # of the best gain: what gains less is not added along with it


class Addition(NamedTuple):
    """A new replica and what it is worth, in max/mean (mean over steps) for a byte."""

    gain: float
    expert: int
    rank: int


class Growth(NamedTuple):
    """A layer that has grown so far."""

    layer: LayerSplit
    gains_ER: FloatArray  # by how much a new replica there would relieve the fullest ranks, all steps together
    num_turns: int = 0  # in which replicas have been added
    turns: Sequence[Sequence[Addition]] = ()  # those since the growth that this one was made from

    @classmethod
    def of(cls, layer: LayerSplit) -> "Growth":
        return cls(layer, _gains(layer.splits))

    def best(self, limits: LayerLimits, at_once: int = 1) -> list[Addition]:
        """The replica of the largest gain among those that fit, or as many as asked for `at_once`; none if none gains.

        With many ranks, a few more come along, of other experts on other ranks, which gain nearly as much: to look for
        each anew would take as long as all the rest.
        """
        max_additions = max(self.layer.loads_SR.shape[1] // RANKS_PER_ADDITION, at_once)
        index, num_steps = self.layer.index, len(self.layer.loads_SE)
        gain_E, rank_E = _best_ranks(self.gains_ER, index, limits, num_steps, max_additions > 1)
        additions: dict[int, Addition] = {}
        for expert in np.argsort(-gain_E, kind="stable").tolist():
            if gain_E[expert] <= 0 or gain_E[expert] < NEARLY_BEST * gain_E.max() or len(additions) == max_additions:
                break
            additions.setdefault(int(rank_E[expert]), Addition(float(gain_E[expert]), expert, int(rank_E[expert])))
        return list(additions.values())

    def grown(self, turns: Sequence[Sequence[Addition]], limits: LayerLimits, num_more: int = 0) -> "Growth":
        """With the replicas of these turns, and then at most `num_more`, each in a turn of its own and the best then.

        Args:
            turns: what is given.
            limits: what is left beside it; changed as others take their bytes.
            num_more: as many as this.
        """
        given = [one for turn in turns for one in turn]
        experts_X, ranks_X = (np.array([one[column] for one in given], np.int64) for column in (1, 2))
        ends_Y = np.cumsum([len(turn) for turn in turns], dtype=np.int64)
        splits, gains_ER, gains_M, experts_M, ranks_M = _grown(
            self.layer.splits, self.gains_ER, limits, experts_X, ranks_X, ends_Y, self.num_turns, num_more
        )
        rows = zip(gains_M.tolist(), experts_M.tolist(), ranks_M.tolist(), strict=True)
        all_turns = [*turns, *([Addition(*row)] for row in rows)]
        return Growth(LayerSplit(*splits), gains_ER, self.num_turns + len(all_turns), all_turns)


@compiled_beside
def _grown(
    splits: Splits,
    gains_ER: FloatArray,
    limits: LayerLimits,
    experts_X: IntArray,
    ranks_X: IntArray,
    ends_Y: IntArray,
    num_turns: int,
    num_more: int,
) -> tuple[Splits, FloatArray, FloatArray, IntArray, IntArray]:
    """The splits with further replicas, `gains_ER`, and the gains, experts and ranks of those that were chosen."""
    first, end = len(splits.replicas.ranks_P), len(splits.replicas.ranks_P) + len(experts_X)
    experts_P, ranks_P = np.empty(end + num_more, np.int64), np.empty(end + num_more, np.int64)
    quotas_SP, gains_M = np.zeros((len(splits.values_S), end + num_more)), np.empty(num_more)
    experts_P[:first], experts_P[first:end] = splits.replicas.experts_P, experts_X
    ranks_P[:first], ranks_P[first:end] = splits.replicas.ranks_P, ranks_X
    quotas_SP[:, :first] = splits.quotas_SP
    new = Splits(splits.replicas, splits.loads_SE, quotas_SP, splits.loads_SR.copy(), splits.values_S.copy())
    num = first
    for end_y in ends_Y:
        before, num = num, first + end_y
        num_turns += 1
        new = _joined(new, experts_P[:num], ranks_P[:num], before, num_turns)
    if num > first:
        gains_ER = _gains(new)
    for m in range(num_more):
        gains_M[m], experts_P[num], ranks_P[num] = _chosen(new, gains_ER, limits)
        if gains_M[m] <= 0:
            break
        _take(limits, experts_P[num], ranks_P[num])
        num += 1
        num_turns += 1
        new = _joined(new, experts_P[:num], ranks_P[:num], num - 1, num_turns)
        gains_ER = _gains(new)
    new = Splits(new.replicas, new.loads_SE, quotas_SP[:, :num].copy(), new.loads_SR, new.values_S)
    return new, gains_ER, gains_M[: num - end], experts_P[end:num], ranks_P[end:num]


@compiled_part
def _joined(splits: Splits, experts_P: IntArray, ranks_P: IntArray, before: int, num_turns: int) -> Splits:
    """The splits with these replicas, the first `before` of which they had; quotas have room for all."""
    num_experts, num_ranks = splits.loads_SE.shape[1], splits.loads_SR.shape[1]
    index = index_replicas(experts_P, ranks_P, num_experts, num_ranks)
    new = Splits(index, splits.loads_SE, splits.quotas_SP, splits.loads_SR, splits.values_S)
    _refill(new, experts_P[before:])
    if num_turns % OPTIMIZE_EVERY == 0:
        optimize_all(new, np.empty(splits.loads_SR.shape, np.bool_))
    return new


@compiled_part
def _chosen(splits: Splits, gains_ER: FloatArray, limits: LayerLimits) -> tuple[float, int, int]:
    """The gain, expert and rank of the best new replica; a gain of 0 if none is worth its bytes or room is scarce."""
    total = 0.0
    for value in splits.values_S:
        total += value
    if total <= GOOD_ENOUGH * len(splits.values_S):
        return 0.0, 0, 0
    gain_E, rank_E = _best_ranks(gains_ER, splits.replicas, limits, len(splits.values_S), False)
    best = int(np.argmax(gain_E))
    size = limits.bytes_E[best]
    if gain_E[best] * size <= LEAST_GAIN or limits.free_R[rank_E[best]] < ROOM * size:
        return 0.0, 0, 0
    return gain_E[best], best, rank_E[best]


@compiled_part
def _take(limits: LayerLimits, expert: int, rank: int) -> None:
    """Take the bytes of a new replica."""
    limits.free_R[rank] -= limits.bytes_E[expert]
    if not limits.present_ER[expert, rank]:
        limits.move_budget[0] -= limits.bytes_E[expert]


@compiled_part
def _refill(splits: Splits, experts: IntArray) -> None:
    """Fill some experts anew, then every one of several replicas once, in the steps that are not balanced."""
    index, loads_SE, quotas_SP, loads_SR, values_S = splits
    by_load_R = np.empty(loads_SR.shape[1], np.int64)
    for step in range(len(loads_SE)):
        load = 0.0
        for expert in experts:
            load += loads_SE[step, expert]
        if load > 0 and values_S[step] > 1 + TOLERANCE:
            for expert in experts:
                water_fill(index, expert, loads_SE[step, expert], quotas_SP[step], loads_SR[step], by_load_R)
            for other in range(loads_SE.shape[1]):
                if index.first_E[other + 1] - index.first_E[other] > 1:
                    water_fill(index, other, loads_SE[step, other], quotas_SP[step], loads_SR[step], by_load_R)
            values_S[step] = 0.0
            for rank_load in loads_SR[step]:
                values_S[step] = max(values_S[step], rank_load)


@compiled
def _best_ranks(
    gains_ER: FloatArray, index: ReplicaIndex, limits: LayerLimits, num_steps: int, scatters: bool
) -> tuple[FloatArray, IntArray]:
    """[E] gain per byte of each expert's best new replica, and [E] its rank, -1 if none gains.

    Of equally good ranks the first is taken or, where it `scatters`, a different one for each expert.
    """
    num_experts, num_ranks = limits.allowed_ER.shape
    best_E, rank_E = np.zeros(num_experts), np.empty(num_experts, np.int64)
    for expert in range(num_experts):
        rank_E[expert] = -1
        size = limits.bytes_E[expert]
        best_tie, least_gain = -1, 0.0
        for rank in range(num_ranks):
            if gains_ER[expert, rank] <= 0 or gains_ER[expert, rank] < least_gain:  # most of them: refused at once
                continue
            tie = _tie_break(expert, rank) if scatters else 0
            gain = gains_ER[expert, rank] / (size * num_steps)
            if not limits.present_ER[expert, rank]:
                gain -= limits.price
            if gain <= 0 or gain < best_E[expert] or (gain == best_E[expert] and tie <= best_tie):
                continue
            if limits.free_R[rank] < size or not limits.allowed_ER[expert, rank]:
                continue
            if not limits.present_ER[expert, rank] and limits.move_budget[0] < size:
                continue
            if not exceeds_node_spread(index, limits, expert, -1, rank):
                best_E[expert], rank_E[expert], best_tie = gain, rank, tie
                if limits.price == 0:
                    least_gain = gains_ER[expert, rank]
    return best_E, rank_E


@compiled_beside
def _gains(splits: Splits) -> FloatArray:
    """[E, R] load that the full ranks could hand over to a new replica of the expert there, all steps together.

    It is limited by the room below the fullest rank. The full ranks of a step share its gain: its maximum falls only
    when all of them are relieved. Where the expert has a replica it is 0.
    """
    index, loads_SE, quotas_SP, loads_SR, values_S = splits
    num_experts, num_ranks = loads_SE.shape[1], loads_SR.shape[1]
    gains_ER = np.zeros((num_experts, num_ranks))
    on_full_E = np.zeros(num_experts)
    touched_E = np.empty(num_experts, np.int64)
    for step in range(len(values_S)):
        fullest = values_S[step]
        if fullest <= GOOD_ENOUGH:
            continue
        num_full, num_touched = 0, 0
        for rank in range(num_ranks):
            if loads_SR[step, rank] >= fullest * (1 - FULL_TOLERANCE):
                num_full += 1
                for p in index.by_rank_P[index.first_R[rank] : index.first_R[rank + 1]]:
                    if quotas_SP[step, p] > 0:
                        expert = index.experts_P[p]
                        if on_full_E[expert] == 0:
                            touched_E[num_touched] = expert
                            num_touched += 1
                        on_full_E[expert] += quotas_SP[step, p]
        for expert in touched_E[:num_touched]:
            for rank in range(num_ranks):
                slack = fullest - loads_SR[step, rank]
                if slack > fullest * FULL_TOLERANCE:
                    gains_ER[expert, rank] += min(on_full_E[expert], slack) / num_full
            on_full_E[expert] = 0.0
    for p in range(len(index.ranks_P)):
        gains_ER[index.experts_P[p], index.ranks_P[p]] = 0.0
    return gains_ER


@compiled_part
def _tie_break(expert: int, rank: int) -> int:
    """A hash that puts the ranks in another order for each expert.

    Additions made together must be on different ranks. Where many ranks are equally empty, as at first, the first of
    them would be the best for every expert. The factors are primes; the modulus is the largest prime below 2**16.
    """
    return (expert * 7919 + rank * 104729) % 65521
