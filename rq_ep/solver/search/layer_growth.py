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
from rq_ep.solver.search.neighborhood import LayerLimits, exceeds_node_spread, take
from rq_ep.solver.split.augmenting_paths import ReplicaIndex

FULL_TOLERANCE = 0.002  # ranks within this of the fullest count as full, so that equally full ones are relieved in turn
LEAST_GAIN = 1e-6  # of max/mean: below it a replica is not worth its bytes
OPTIMIZE_EVERY = 8  # turns between two exact splits of the steps
NEARLY_BEST = 0.5  # of the best gain: what gains less is not added along with it
NO_MORE = np.zeros(0)


class Addition(NamedTuple):
    """A new replica and what it is worth, in max/mean (mean over steps) for a byte."""

    gain: float
    expert: int
    rank: int


class Additions(NamedTuple):
    """The same of several, for compiled code."""

    gains_M: FloatArray
    experts_M: IntArray
    ranks_M: IntArray

    def rows(self) -> list[Addition]:
        return list(map(Addition, self.gains_M.tolist(), self.experts_M.tolist(), self.ranks_M.tolist()))


class Growth(NamedTuple):
    """A layer that has grown so far."""

    layer: LayerSplit
    gains_ER: FloatArray = np.zeros((0, 0))  # by how much a new replica there would relieve the fullest ranks
    coming: Sequence[Addition] = ()  # what is best now, beside the bytes that were left; none if none is worth it
    num_turns: int = 0  # in which replicas have been added
    turns: Sequence[Sequence[Addition]] = ()  # those since the growth that this one was made from

    @classmethod
    def of(cls, layer: LayerSplit, limits: LayerLimits, at_once: int = 1) -> "Growth":
        """A layer that has not grown yet, with as many replicas to come as are added `at_once`."""
        return cls(layer).grown([], limits, at_once)

    def best(self, limits: LayerLimits, at_once: int = 1) -> Sequence[Addition]:
        """What is to come now that other layers have taken some of the bytes."""
        return _best(self.layer.splits, self.gains_ER, limits, at_once).rows()

    def grown(
        self, turns: Sequence[Sequence[Addition]], limits: LayerLimits, at_once: int = 1, rooms_M: FloatArray = NO_MORE
    ) -> "Growth":
        """With the replicas of these turns, and then some more, each in a turn of its own and the best then.

        Args:
            turns: what is given.
            limits: what is left beside it; changed as others take their bytes.
            at_once: how many are to come together afterwards.
            rooms_M: one more for each of these, as long as its rank has room for so many replicas.
        """
        given = [one for turn in turns for one in turn]
        experts_X, ranks_X = (np.array([one[column] for one in given], np.int64) for column in (1, 2))
        ends_Y = np.cumsum([len(turn) for turn in turns], dtype=np.int64)
        splits, gains_ER, chosen, coming = _grown(
            self.layer.splits, limits, experts_X, ranks_X, ends_Y, self.num_turns, at_once, rooms_M
        )
        all_turns = [*turns, *([one] for one in chosen.rows())]
        layer, num_turns = LayerSplit(*splits), self.num_turns + len(all_turns)
        return Growth(layer, gains_ER, coming.rows(), num_turns, all_turns)


@compiled_beside
def _grown(
    splits: Splits,
    limits: LayerLimits,
    experts_X: IntArray,
    ranks_X: IntArray,
    ends_Y: IntArray,
    num_turns: int,
    at_once: int,
    rooms_M: FloatArray,
) -> tuple[Splits, FloatArray, Additions, Additions]:
    """The splits with further replicas, what others would gain, those that were chosen, and what is to come."""
    first, num_more = len(splits.replicas.ranks_P), len(rooms_M)
    end = first + len(experts_X)
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
    gains_ER = _gains(new)
    coming = _best(new, gains_ER, limits, at_once)
    while num < end + num_more and _has_room(coming, limits, rooms_M[num - end]):
        gains_M[num - end], experts_P[num], ranks_P[num] = coming.gains_M[0], coming.experts_M[0], coming.ranks_M[0]
        take(limits, experts_P[num], ranks_P[num])
        num += 1
        num_turns += 1
        new = _joined(new, experts_P[:num], ranks_P[:num], num - 1, num_turns)
        gains_ER = _gains(new)
        coming = _best(new, gains_ER, limits, at_once)
    new = Splits(new.replicas, new.loads_SE, quotas_SP[:, :num].copy(), new.loads_SR, new.values_S)
    return new, gains_ER, Additions(gains_M[: num - end], experts_P[end:num], ranks_P[end:num]), coming


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
def _has_room(coming: Additions, limits: LayerLimits, room: float) -> bool:
    """Whether there is something to come, on a rank with room for so many replicas."""
    if len(coming.ranks_M) == 0:
        return False
    return bool(limits.free_R[coming.ranks_M[0]] >= room * limits.bytes_E[coming.experts_M[0]])


@compiled
def _best(splits: Splits, gains_ER: FloatArray, limits: LayerLimits, at_once: int) -> Additions:
    """The best new replicas among those that fit, as far as they are worth their bytes.

    Where several are added at once, they are of different experts on different ranks, and all gain nearly as much as
    the best: to look for each anew would take as long as all the rest.
    """
    gains_M, experts_M, ranks_M = np.empty(at_once), np.empty(at_once, np.int64), np.empty(at_once, np.int64)
    num, total = 0, 0.0
    for value in splits.values_S:
        total += value
    if total > GOOD_ENOUGH * len(splits.values_S):
        gain_E, rank_E = _best_ranks(gains_ER, splits.replicas, limits, len(splits.values_S), at_once > 1)
        nearly_best, is_taken_R = NEARLY_BEST * gain_E.max(), np.zeros(len(limits.free_R), np.bool_)
        while num < at_once:
            expert = int(np.argmax(gain_E))
            gain, rank = gain_E[expert], rank_E[expert]
            if gain * limits.bytes_E[expert] <= LEAST_GAIN or gain < nearly_best:
                break
            gain_E[expert] = 0.0
            if not is_taken_R[rank]:
                is_taken_R[rank] = True
                gains_M[num], experts_M[num], ranks_M[num] = gain, expert, rank
                num += 1
    return Additions(gains_M[:num], experts_M[:num], ranks_M[:num])


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


@compiled_part
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
