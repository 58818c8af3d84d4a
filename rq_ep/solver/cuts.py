"""The balance a placement allows, seen from the other side: no split can beat any set of ranks.

Experts whose replicas all lie in a set of ranks must be computed there, so some rank of the set carries at least the
set's mean. The fullest rank of the best split is the maximum of these means over all sets (max-flow min-cut). Up to
`MAX_RANKS_ENUMERATED` ranks every set is listed and the value is exact; beyond, sets are generated: those that the
exact split returns as its proof. Adding or moving a replica changes a column, so it is priced in microseconds.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import FloatArray
from rq_ep.solver.split import ByExpert, split
from rq_ep.solver.steps import LayerSteps
from rq_ep.solver.tables import replicas_of

BoolArray = npt.NDArray[np.bool_]

MAX_RANKS_ENUMERATED = 8
SHARPNESS = 60.0  # of the soft maximum: sets within some 1/60 of the fullest count as well
TINY = 1e-300
EXPERTS_PRICED = 16  # experts whose gain is computed exactly, the first by their linear estimate


def starting_sets(num_ranks: int) -> BoolArray:
    """[G, R] sets of ranks to begin with: all of them for few ranks, else single ranks, all but one, and all."""
    if num_ranks <= MAX_RANKS_ENUMERATED:
        numbers_G = np.arange(1, 2**num_ranks)
        sets_GR: BoolArray = (numbers_G[:, None] >> np.arange(num_ranks)) % 2 == 1
        return sets_GR
    single = np.eye(num_ranks, dtype=bool)
    return np.concatenate([single, ~single, np.ones((1, num_ranks), bool)])


@dataclass
class LayerBalance:
    """The balance of one layer while it is being placed: who holds what, and the load confined to each set of ranks.

    G sets of ranks; loads in units of the step's mean rank load.
    """

    steps: LayerSteps
    held_ER: BoolArray
    sets_GR: BoolArray

    def __post_init__(self) -> None:
        self._recount()

    def _recount(self) -> None:
        self.outside_RG: FloatArray = (~self.sets_GR.T).astype(np.float64)
        self.sizes_G: FloatArray = self.sets_GR.sum(axis=1).astype(np.float64)
        self.confined_EG: FloatArray = self._confined(self.held_ER)
        self.means_SG: FloatArray = self.steps.loads_SE @ (self.confined_EG / self.sizes_G)

    def _confined(self, held_ER: BoolArray) -> FloatArray:
        return np.asarray(held_ER @ self.outside_RG == 0, np.float64)

    @property
    def is_exact(self) -> bool:
        """Whether every set of ranks is listed."""
        return len(self.sets_GR) == (1 << self.steps.num_ranks) - 1

    @property
    def imbalance(self) -> float:
        """max/mean over ranks of the best split, mean over steps; over the listed sets, so a lower bound beyond."""
        return _mean_maximum(self.means_SG)

    def means_with(self, experts: list[int], held_nR: BoolArray) -> FloatArray:
        """[S, G] the means if `experts` were held by the ranks of `held_nR` instead."""
        change_nG = (self._confined(held_nR) - self.confined_EG[experts]) / self.sizes_G
        means_SG: FloatArray = self.means_SG + self.steps.loads_SE[:, experts] @ change_nG
        return means_SG

    def imbalance_with(self, experts: list[int], held_nR: BoolArray) -> float:
        return _mean_maximum(self.means_with(experts, held_nR))

    def hold(self, experts: list[int], held_nR: BoolArray) -> None:
        """Let `experts` be held by the ranks of `held_nR`."""
        self.means_SG = self.means_with(experts, held_nR)
        self.held_ER[experts] = held_nR
        self.confined_EG[experts] = self._confined(held_nR)

    def gains_ER(self, bytes_E: FloatArray) -> FloatArray:
        """[E, R] fall of the soft maximum, per byte, if rank r also held expert e; 0 where that was not worth pricing.

        The soft maximum log(sum(exp(SHARPNESS * mean))) / SHARPNESS sees sets that are second by little, so that two
        equally overloaded ranks can be relieved one after the other.
        """
        gains_ER = np.zeros(self.held_ER.shape)
        if not len(self.means_SG):
            return gains_ER
        loads_SE = self.steps.loads_SE
        weight_SG = np.exp(SHARPNESS * (self.means_SG - self.means_SG.max(axis=1, keepdims=True)))
        weight_SG /= weight_SG.sum(axis=1, keepdims=True)
        pull_EG = (loads_SE.T @ weight_SG) * (self.confined_EG / self.sizes_G)
        linear_E = (pull_EG @ self.outside_RG.T).max(axis=1) / bytes_E
        for expert in np.argsort(-linear_E, kind="stable")[:EXPERTS_PRICED].tolist():
            if linear_E[expert] <= 0:
                break
            confined_G = self.confined_EG[expert] > 0
            kept_SG = weight_SG[:, confined_G]
            left_SG = kept_SG * np.exp(-SHARPNESS * loads_SE[:, expert, None] / self.sizes_G[confined_G])
            outside_RG = self.outside_RG[:, confined_G]
            after_SR = weight_SG[:, ~confined_G].sum(axis=1)[:, None] + kept_SG @ (1 - outside_RG.T)
            after_SR += left_SG @ outside_RG.T
            gains_ER[expert] = -np.log(after_SR.clip(min=TINY)).mean(axis=0) / (SHARPNESS * bytes_E[expert])
        gains_ER[self.held_ER] = 0  # not by the rounding of a sum either
        return gains_ER

    def refine(self, give_up_at: float = math.inf) -> float:
        """Split every step exactly, list the sets that prove it, and return the exact imbalance.

        Once the imbalance is known to reach `give_up_at`, the steps that are left are not split.
        """
        if self.is_exact or not len(self.means_SG):
            return self.imbalance
        num_ranks = self.steps.num_ranks
        by_expert = ByExpert.of(replicas_of(self.held_ER), num_ranks)
        listed_S = self.means_SG.max(axis=1)
        exact = float(listed_S.mean())
        cuts = set()
        for counts_E, listed in zip(self.steps.counts_SE, listed_S.tolist(), strict=True):
            best = split(by_expert, counts_E)
            ratio = best.fullest * num_ranks / int(counts_E.sum())
            exact += max(ratio - listed, 0) / len(listed_S)
            if ratio > listed * 1.001:
                cuts.add(best.cut)
            if exact >= give_up_at:
                break
        if cuts:
            new_GR = np.zeros((len(cuts), num_ranks), bool)
            for row, cut in zip(new_GR, sorted(cuts), strict=True):
                row[list(cut)] = True
            self.sets_GR = np.unique(np.concatenate([self.sets_GR, new_GR]), axis=0)
            self._recount()
        return exact


def _mean_maximum(means_SG: FloatArray) -> float:
    return float(means_SG.max(axis=1).mean()) if len(means_SG) else 1.0
