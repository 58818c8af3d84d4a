"""One layer while it is being placed: who holds what, the best split of its steps, what another replica would gain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled
from rq_ep.solver.search.max_flow import CLOSE, Index, index_of, pour, settle
from rq_ep.solver.search.neighborhood import Limits, crowded

GOOD_ENOUGH = 1.0005  # max/mean at which a step needs nothing more
TIGHT = 0.002  # ranks within this of the fullest count as full, so that equally full ones are relieved in turn
SWEEPS = 3  # more of them gain less than the first augmenting path costs
RANKS_AN_ADDITION = 64  # one replica is added at a time for each so many
NEARLY = 0.5  # of the best gain


class Addition(NamedTuple):
    """A new replica and what it is worth, in max/mean (mean over steps) for a byte."""

    gain: float
    expert: int
    rank: int


@dataclass
class LayerSplit:
    """Replicas of a layer, and a split of every step that is the best or close to it.

    Loads in units of the step's mean rank load: under perfect balance every rank is at 1.
    """

    loads_SE: FloatArray
    index: Index
    quotas_SP: FloatArray
    loads_SR: FloatArray
    values_S: FloatArray  # the fullest rank of each step

    @classmethod
    def of(cls, loads_SE: FloatArray, held_ER: BoolArray) -> "LayerSplit":
        """Split every step exactly."""
        experts_P, ranks_P = (axis.astype(np.int64) for axis in np.nonzero(held_ER))
        index = index_of(experts_P, ranks_P, *held_ER.shape)
        num_steps = len(loads_SE)
        quotas_SP, loads_SR = np.zeros((num_steps, len(ranks_P))), np.zeros((num_steps, held_ER.shape[1]))
        _split_all(index, loads_SE, quotas_SP, loads_SR)
        layer = cls(loads_SE, index, quotas_SP, loads_SR, np.zeros(num_steps))
        layer.settle()
        return layer

    @property
    def value(self) -> float:
        """max/mean over ranks, mean over steps; 1 without steps."""
        return float(self.values_S.mean()) if len(self.values_S) else 1.0

    @property
    def held_ER(self) -> BoolArray:
        held_ER = np.zeros((self.loads_SE.shape[1], self.loads_SR.shape[1]), bool)
        held_ER[self.index.experts_P, self.index.ranks_P] = True
        return held_ER

    def settle(self) -> BoolArray:
        """Make the split of every step the best; [S, R] the sets of ranks that prove it."""
        cuts_SR = np.ones(self.loads_SR.shape, bool)
        _settle_all(self.index, self.quotas_SP, self.loads_SR, self.values_S, cuts_SR)
        return cuts_SR

    def add(self, additions: Sequence["Addition"]) -> None:
        """More replicas; the splits are brought close to the best again."""
        experts_N, ranks_N = (np.array(column, np.int64) for column in list(zip(*additions, strict=True))[1:])
        experts_P, ranks_P = np.append(self.index.experts_P, experts_N), np.append(self.index.ranks_P, ranks_N)
        self.index = index_of(experts_P, ranks_P, self.loads_SE.shape[1], self.loads_SR.shape[1])
        self.quotas_SP = np.concatenate([self.quotas_SP, np.zeros((len(self.quotas_SP), len(additions)))], axis=1)
        _pour_again(self.index, experts_N, self.loads_SE, self.quotas_SP, self.loads_SR, self.values_S)

    def best_additions(self, limits: Limits) -> list["Addition"]:
        """The replica worth most among those that fit, none if there is none.

        With many ranks, a few more of other experts on other ranks that are worth nearly as much: looking for each anew
        would take as long as all the rest.
        """
        wanted = max(self.loads_SR.shape[1] // RANKS_AN_ADDITION, 1)
        gain_E, rank_E = _best_ranks(self.index, self.quotas_SP, self.loads_SR, self.values_S, limits, wanted > 1)
        found: dict[int, Addition] = {}
        for expert in np.argsort(-gain_E, kind="stable").tolist():
            if gain_E[expert] <= 0 or gain_E[expert] < NEARLY * gain_E.max() or len(found) == wanted:
                break
            found.setdefault(int(rank_E[expert]), Addition(float(gain_E[expert]), expert, int(rank_E[expert])))
        return list(found.values())


@compiled
def _split_all(index: Index, loads_SE: FloatArray, quotas_SP: FloatArray, loads_SR: FloatArray) -> None:
    """Split every step from zero: experts of one replica, then the others some times over, the heaviest first."""
    order_N = np.empty(loads_SR.shape[1], np.int64)
    for step in range(len(loads_SE)):
        heaviest_first = np.argsort(-loads_SE[step], kind="mergesort")
        for sweep in range(SWEEPS + 1):
            for expert in heaviest_first:
                num = index.first_E[expert + 1] - index.first_E[expert]
                if (num == 1) == (sweep == 0) and loads_SE[step, expert] > 0:
                    pour(index, expert, loads_SE[step, expert], quotas_SP[step], loads_SR[step], order_N)


@compiled
def _settle_all(
    index: Index, quotas_SP: FloatArray, loads_SR: FloatArray, values_S: FloatArray, cuts_SR: BoolArray
) -> None:
    for step in range(len(values_S)):
        values_S[step] = settle(index, quotas_SP[step], loads_SR[step], loads_SR[step].mean(), cuts_SR[step])


@compiled
def _pour_again(
    index: Index,
    experts_N: IntArray,
    loads_SE: FloatArray,
    quotas_SP: FloatArray,
    loads_SR: FloatArray,
    values_S: FloatArray,
) -> None:
    """Pour some experts anew, then every shared one once, in the steps that are not balanced."""
    order_N = np.empty(loads_SR.shape[1], np.int64)
    for step in range(len(loads_SE)):
        load = 0.0
        for expert in experts_N:
            load += loads_SE[step, expert]
        if load > 0 and values_S[step] > 1 + CLOSE:
            for expert in experts_N:
                pour(index, expert, loads_SE[step, expert], quotas_SP[step], loads_SR[step], order_N)
            for other in range(loads_SE.shape[1]):
                if index.first_E[other + 1] - index.first_E[other] > 1:
                    pour(index, other, loads_SE[step, other], quotas_SP[step], loads_SR[step], order_N)
            values_S[step] = loads_SR[step].max()


@compiled
def _best_ranks(
    index: Index, quotas_SP: FloatArray, loads_SR: FloatArray, values_S: FloatArray, limits: Limits, spreads: bool
) -> tuple[FloatArray, IntArray]:
    """[E] gain per byte of each expert's best new replica, and its rank: what full ranks could hand over to its slack.

    A step's gain is shared by its full ranks: its maximum falls when all of them are relieved. Of equally good ranks
    the first is taken, or, where it `spreads`, another one for each expert.
    """
    num_experts, num_ranks = limits.allowed_ER.shape
    gains_ER = np.zeros((num_experts, num_ranks))
    on_full_E = np.zeros(num_experts)
    touched_E = np.empty(num_experts, np.int64)
    for step in range(len(values_S)):
        fullest = values_S[step]
        if fullest <= GOOD_ENOUGH:
            continue
        num_full, num_touched = 0, 0
        for rank in range(num_ranks):
            if loads_SR[step, rank] >= fullest * (1 - TIGHT):
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
                if slack > fullest * TIGHT:
                    gains_ER[expert, rank] += min(on_full_E[expert], slack) / num_full
            on_full_E[expert] = 0.0
    for p in range(len(index.ranks_P)):
        gains_ER[index.experts_P[p], index.ranks_P[p]] = 0.0
    best_E, rank_E = np.zeros(num_experts), np.full(num_experts, -1)
    for expert in range(num_experts):
        size = limits.bytes_E[expert]
        best_key = -1
        for rank in range(num_ranks):
            key = (expert * 7919 + rank * 104729) % 65521 if spreads else 0
            gain = gains_ER[expert, rank] / (size * len(values_S))
            if not limits.present_ER[expert, rank]:
                gain -= limits.price
            if gain <= 0 or gain < best_E[expert] or (gain == best_E[expert] and key <= best_key):
                continue
            if limits.free_R[rank] < size or not limits.allowed_ER[expert, rank]:
                continue
            if not limits.present_ER[expert, rank] and limits.room[0] < size:
                continue
            if not crowded(index, limits, expert, -1, rank):
                best_E[expert], rank_E[expert], best_key = gain, rank, key
    return best_E, rank_E
