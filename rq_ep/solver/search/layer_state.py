"""One layer in the search: its replicas, the optimal split of its steps, and what another replica would gain.

Axes: P replicas in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled, compiled_beside, compiled_part
from rq_ep.solver.search.max_flow import TOLERANCE, Splits, augment, index_replicas, water_fill
from rq_ep.solver.search.neighborhood import LayerLimits, exceeds_node_spread
from rq_ep.solver.split.augmenting_paths import ReplicaIndex, rank_search
from rq_ep.solver.split.heaviest_first import heaviest_first

GOOD_ENOUGH = 1.0005  # max/mean at which a step needs nothing more
FULL_TOLERANCE = 0.002  # ranks within this of the fullest count as full, so that equally full ones are relieved in turn
LEAST_GAIN = 1e-6  # of max/mean: below it a replica is not worth its bytes
OPTIMIZE_EVERY = 8  # times that replicas are added to a layer between two exact splits of its steps
ROOM = 12  # replicas that a rank must have room for, if one is chosen before its turn: other layers use it as well
SWEEPS = 3  # more of them gain less than the first augmenting path costs
RANKS_PER_ADDITION = 64  # one replica is added at a time for each so many ranks
NEARLY_BEST = 0.5  # of the best gain: what gains less is not added along with it


class Addition(NamedTuple):
    """A new replica and what it is worth, in max/mean (mean over steps) for a byte."""

    gain: float
    expert: int
    rank: int


class Grown(NamedTuple):
    """A layer with further replicas, its `gains_ER`, and those of the replicas that were chosen on the way."""

    layer: "LayerSplit"
    gains_ER: FloatArray
    chosen: list[Addition]


@dataclass
class LayerSplit:
    """Replicas of a layer, and a split of every step that is optimal or close to it.

    Loads are in units of the step's mean rank load: under perfect balance every rank is at 1.
    """

    index: ReplicaIndex
    loads_SE: FloatArray
    quotas_SP: FloatArray
    loads_SR: FloatArray
    values_S: FloatArray  # the fullest rank of each step

    @classmethod
    def of(cls, loads_SE: FloatArray, held_ER: BoolArray) -> "LayerSplit":
        """Split every step exactly."""
        experts_P, ranks_P = (axis.astype(np.int64) for axis in np.nonzero(held_ER))
        index = index_replicas(experts_P, ranks_P, *held_ER.shape)
        num_steps = len(loads_SE)
        quotas_SP, loads_SR = np.zeros((num_steps, len(ranks_P))), np.zeros((num_steps, held_ER.shape[1]))
        layer = cls(index, loads_SE, quotas_SP, loads_SR, np.zeros(num_steps))
        _split_all(layer.splits)
        layer.optimize()
        return layer

    @property
    def value(self) -> float:
        """max/mean over ranks, mean over steps; 1 without steps."""
        return float(self.values_S.mean()) if len(self.values_S) else 1.0

    @property
    def splits(self) -> Splits:
        """The same for compiled code."""
        return Splits(self.index, self.loads_SE, self.quotas_SP, self.loads_SR, self.values_S)

    @property
    def held_ER(self) -> BoolArray:
        """[E, R] whether the rank holds a replica of the expert."""
        held_ER = np.zeros((self.loads_SE.shape[1], self.loads_SR.shape[1]), bool)
        held_ER[self.index.experts_P, self.index.ranks_P] = True
        return held_ER

    def optimize(self) -> BoolArray:
        """Make the split of every step optimal; [S, R] the cuts that prove it."""
        cuts_SR = np.ones(self.loads_SR.shape, bool)
        _optimize_all(self.splits, cuts_SR)
        return cuts_SR

    def optimized(self) -> "LayerSplit":
        """The layer with the optimal split of every step."""
        layer = replace(
            self, quotas_SP=self.quotas_SP.copy(), loads_SR=self.loads_SR.copy(), values_S=self.values_S.copy()
        )
        layer.optimize()
        return layer

    def grown(
        self, additions: Sequence["Addition"], limits: LayerLimits, *, at_once: bool, num_added: int, num_more: int
    ) -> "Grown":
        """The layer with further replicas: the given ones, then at most `num_more`, each the best inside the limits.

        Args:
            additions: given.
            limits: changed, as replicas take their bytes.
            at_once: whether the given ones are added together, else one by one.
            num_added: times that replicas have been added before; every `OPTIMIZE_EVERY`th time, splits become exact.
            num_more: as many as this.
        """
        experts_X, ranks_X = (np.array([one[column] for one in additions], np.int64) for column in (1, 2))
        grown = _grown(self.splits, experts_X, ranks_X, limits, at_once, num_added, num_more)
        splits, gains_ER, gains_Y, experts_Y, ranks_Y = grown
        rows = zip(gains_Y.tolist(), experts_Y.tolist(), ranks_Y.tolist(), strict=True)
        return Grown(LayerSplit(*splits), gains_ER, [Addition(*row) for row in rows])

    @property
    def gains_ER(self) -> FloatArray:
        """[E, R] by how much a new replica of the expert there would relieve the fullest ranks, all steps together."""
        return _gains(self.splits)

    def without(self, dropped_P: IntArray) -> "LayerSplit":
        """The layer without these replicas, of which each expert keeps another; only their experts are filled anew."""
        kept_P = np.ones(len(self.index.ranks_P), bool)
        kept_P[dropped_P] = False
        experts_P, ranks_P = self.index.experts_P, self.index.ranks_P
        index = index_replicas(experts_P[kept_P], ranks_P[kept_P], self.loads_SE.shape[1], self.loads_SR.shape[1])
        loads_SR = self.loads_SR.copy()
        for p in dropped_P.tolist():
            loads_SR[:, ranks_P[p]] -= self.quotas_SP[:, p]
        quotas_SP = np.ascontiguousarray(self.quotas_SP[:, kept_P])
        layer = LayerSplit(index, self.loads_SE, quotas_SP, loads_SR, self.values_S.copy())
        _fill_again(layer.splits, experts_P[dropped_P])
        layer.optimize()
        return layer

    def best_additions(self, gains_ER: FloatArray, limits: LayerLimits, at_once: int = 1) -> list["Addition"]:
        """The replica of the largest gain among those that fit, or as many as asked for `at_once`; none if none gains.

        With many ranks, a few more come along, of other experts on other ranks, which gain nearly as much: to look for
        each anew would take as long as all the rest.
        """
        max_additions = max(self.loads_SR.shape[1] // RANKS_PER_ADDITION, at_once)
        gain_E, rank_E = _best_ranks(gains_ER, self.index, limits, len(self.loads_SE), max_additions > 1)
        additions: dict[int, Addition] = {}
        for expert in np.argsort(-gain_E, kind="stable").tolist():
            if gain_E[expert] <= 0 or gain_E[expert] < NEARLY_BEST * gain_E.max() or len(additions) == max_additions:
                break
            additions.setdefault(int(rank_E[expert]), Addition(float(gain_E[expert]), expert, int(rank_E[expert])))
        return list(additions.values())


@compiled_beside
def _split_all(splits: Splits) -> None:
    """Split every step from zero: experts of one replica, then the others in several sweeps, the heaviest first."""
    index, loads_SE, quotas_SP, loads_SR, _ = splits
    by_load_R, shared_E = np.empty(loads_SR.shape[1], np.int64), np.empty(loads_SE.shape[1], np.int64)
    for step in range(len(loads_SE)):
        num_shared = 0
        for expert in heaviest_first(loads_SE[step]):
            if loads_SE[step, expert] <= 0:
                break
            if index.first_E[expert + 1] - index.first_E[expert] == 1:
                water_fill(index, expert, loads_SE[step, expert], quotas_SP[step], loads_SR[step], by_load_R)
            else:
                shared_E[num_shared] = expert
                num_shared += 1
        for _ in range(SWEEPS):
            for expert in shared_E[:num_shared]:
                water_fill(index, expert, loads_SE[step, expert], quotas_SP[step], loads_SR[step], by_load_R)


@compiled_beside
def _optimize_all(splits: Splits, cuts_SR: BoolArray) -> None:
    index, _, quotas_SP, loads_SR, values_S = splits
    search = rank_search(loads_SR.shape[1], len(index.first_E) - 1)
    for step in range(len(values_S)):
        total = 0.0
        for load in loads_SR[step]:
            total += load
        mean = total / loads_SR.shape[1]
        values_S[step] = augment(index, quotas_SP[step], loads_SR[step], mean, cuts_SR[step], search)


@compiled_beside
def _fill_again(splits: Splits, experts: IntArray) -> None:
    """Fill some experts anew in every step."""
    index, loads_SE, quotas_SP, loads_SR, _ = splits
    by_load_R = np.empty(loads_SR.shape[1], np.int64)
    for step in range(len(loads_SE)):
        for expert in experts:
            water_fill(index, expert, loads_SE[step, expert], quotas_SP[step], loads_SR[step], by_load_R)


@compiled_beside
def _grown(
    splits: Splits,
    experts_X: IntArray,
    ranks_X: IntArray,
    limits: LayerLimits,
    at_once: bool,
    num_added: int,
    num_more: int,
) -> tuple[Splits, FloatArray, FloatArray, IntArray, IntArray]:
    """The splits with further replicas, `gains_ER`, and the gains, experts and ranks of those that were chosen."""
    num, num_given = len(splits.replicas.ranks_P), len(experts_X)
    num_all = num + num_given + num_more
    experts_P, ranks_P, gains_P = np.empty(num_all, np.int64), np.empty(num_all, np.int64), np.empty(num_all)
    quotas_SP = np.zeros((len(splits.values_S), num_all))
    experts_P[:num], ranks_P[:num], quotas_SP[:, :num] = (
        splits.replicas.experts_P,
        splits.replicas.ranks_P,
        splits.quotas_SP,
    )
    experts_P[num : num + num_given], ranks_P[num : num + num_given] = experts_X, ranks_X
    loads_SR, values_S, cuts_SR = (
        splits.loads_SR.copy(),
        splits.values_S.copy(),
        np.empty(splits.loads_SR.shape, np.bool_),
    )
    num_experts, num_ranks = splits.loads_SE.shape[1], loads_SR.shape[1]
    given, first_more = num + num_given, num + num_given
    new, gains_ER = splits, np.zeros((0, 0))
    while True:
        if num < given:
            before, num = num, given if at_once else num + 1
        elif num < num_all:
            total = 0.0
            for value in values_S:
                total += value
            if total <= GOOD_ENOUGH * len(values_S):
                break
            gain_E, rank_E = _best_ranks(gains_ER, new.replicas, limits, len(values_S), False)
            best = np.argmax(gain_E)
            size = limits.bytes_E[best]
            if gain_E[best] * size <= LEAST_GAIN or limits.free_R[rank_E[best]] < ROOM * size:
                break
            experts_P[num], ranks_P[num], gains_P[num] = best, rank_E[best], gain_E[best]
            before, num = num, num + 1
        else:
            break
        for p in range(before, num):
            size = limits.bytes_E[experts_P[p]]
            limits.free_R[ranks_P[p]] -= size
            if not limits.present_ER[experts_P[p], ranks_P[p]]:
                limits.move_budget[0] -= size
        index = index_replicas(experts_P[:num], ranks_P[:num], num_experts, num_ranks)
        new = Splits(index, splits.loads_SE, quotas_SP, loads_SR, values_S)
        _refill(new, experts_P[before:num])
        num_added += 1
        if num_added % OPTIMIZE_EVERY == 0:
            _optimize_all(new, cuts_SR)
        if num >= given:
            gains_ER = _gains(new)
    new = Splits(new.replicas, splits.loads_SE, quotas_SP[:, :num].copy(), loads_SR, values_S)
    return new, gains_ER, gains_P[first_more:num], experts_P[first_more:num], ranks_P[first_more:num]


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
