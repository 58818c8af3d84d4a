"""One layer in the search: its replicas, and the optimal split of its steps.

Axes: P replicas in any order.
"""

from dataclasses import dataclass, replace

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled_beside
from rq_ep.solver.search.max_flow import Splits, augment, index_replicas, water_fill
from rq_ep.solver.split.augmenting_paths import ReplicaIndex, rank_search
from rq_ep.solver.split.heaviest_first import heaviest_first

GOOD_ENOUGH = 1.0005  # max/mean at which a step needs nothing more
SWEEPS = 3  # more of them gain less than the first augmenting path costs


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
        optimize_all(self.splits, cuts_SR)
        return cuts_SR

    def optimized(self) -> "LayerSplit":
        """The layer with the optimal split of every step."""
        layer = replace(
            self, quotas_SP=self.quotas_SP.copy(), loads_SR=self.loads_SR.copy(), values_S=self.values_S.copy()
        )
        layer.optimize()
        return layer

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
def optimize_all(splits: Splits, cuts_SR: BoolArray) -> None:
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
