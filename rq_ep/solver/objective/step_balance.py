"""The balance of recorded steps over a layer's replicas, under the split that a strategy serves them with.

A split is evaluated in two ways: by what ranks compute, and by the experts whose weights they read. Closed rules are
evaluated here, for many steps at once; a strategy without one by `planner_replay`.

Axes: C replicas sorted by expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.replicas import Replicas
from rq_ep.solver.split.min_max_split import ByExpert, split_steps
from rq_ep.solver.split.one_rank_per_expert import route_to_one_rank

# A certificate's `split` -> what it says.
SPLITS = {
    "home": "all pairs to the only replica",
    "even": "an expert's pairs evenly over its replicas",
    "exact": "the exact split of each step",
    "planner": "the strategy's own planner, replayed step by step",
}
SCALE = 2**20  # whole parts that a step's mean expert is cut into, where pairs do not weigh alike


class StepBalance(NamedTuple):
    """The balance of S steps of one layer."""

    ratio_S: FloatArray  # max/mean load over ranks
    pairs_P: IntArray  # that each resident replica computes, all steps together


class SplitEvaluator(Protocol):
    """How a strategy splits steps over a layer. Every step routes at least one pair."""

    @property
    def rule(self) -> str:
        """A key of `SPLITS`."""

    def by_pairs(self, layer: LayerPlacement, counts_SE: IntArray, weight_SE: FloatArray | None = None) -> StepBalance:
        """Balance of what ranks compute.

        Args:
            layer: the replicas.
            counts_SE: pairs.
            weight_SE: what an expert's pairs weigh, all together, such as seconds; None: each pair weighs one.
        """

    def by_reading(self, layer: LayerPlacement, counts_SE: IntArray, read_SE: FloatArray) -> StepBalance:
        """Balance of memory-bound steps: a rank reads the whole of each replica that computes a pair.

        Args:
            layer: the replicas.
            counts_SE: pairs.
            read_SE: bytes or seconds of reading each active expert; the mean is that of reading each once.
        """


@dataclass(frozen=True)
class _ClosedSplit(ABC):
    """A rule that splits an expert's pairs over resident replicas alone."""

    num_ranks: int

    @abstractmethod
    def balance(self, replicas: Replicas, counts_SE: IntArray) -> StepBalance:
        """Balance of whole pairs."""

    @abstractmethod
    def _quotas_to_read(self, replicas: Replicas) -> Callable[[IntArray, FloatArray], IntArray]:
        """([E] pairs, [E] weights to read) -> [C] pairs of each replica in a memory-bound step."""

    def by_pairs(self, layer: LayerPlacement, counts_SE: IntArray, weight_SE: FloatArray | None = None) -> StepBalance:
        balance = self.balance(layer.replicas, counts_SE)
        if weight_SE is None:
            return balance
        return balance._replace(ratio_S=self.balance(layer.replicas, _whole(weight_SE)).ratio_S)

    def by_reading(self, layer: LayerPlacement, counts_SE: IntArray, read_SE: FloatArray) -> StepBalance:
        by_expert, quotas_to_read = ByExpert.of(layer.replicas, self.num_ranks), self._quotas_to_read(layer.replicas)
        ratio_S = np.ones(len(counts_SE))
        pairs_C = np.zeros(len(layer.replicas), np.int64)
        for step, (counts_E, read_E) in enumerate(zip(counts_SE, read_SE, strict=True)):
            quotas_C = quotas_to_read(counts_E, read_E)
            read_C = (quotas_C > 0) * read_E[by_expert.experts_C]
            read_R = np.bincount(by_expert.ranks_C, read_C, minlength=self.num_ranks)
            ratio_S[step] = read_R.max() * self.num_ranks / read_E[counts_E > 0].sum()
            pairs_C += quotas_C
        return StepBalance(ratio_S, _in_replica_order(by_expert, pairs_C))


@dataclass(frozen=True)
class EvenSplit(_ClosedSplit):
    """Consecutive intervals of an expert's pairs, whose sizes differ by one pair at most, as `eplb` plans them.

    With one replica of each expert this is the rule `home`.
    """

    rule: str = "even"

    def balance(self, replicas: Replicas, counts_SE: IntArray) -> StepBalance:
        by_expert = ByExpert.of(replicas, self.num_ranks)
        quotas_SC = _even_quotas(by_expert, counts_SE)
        on_rank_CR = (by_expert.ranks_C[:, None] == np.arange(self.num_ranks)).astype(np.float64)
        fullest_S = (quotas_SC @ on_rank_CR).max(axis=1, initial=0.0)
        pairs_P = _in_replica_order(by_expert, quotas_SC.sum(axis=0))
        return StepBalance(fullest_S * self.num_ranks / counts_SE.sum(axis=1), pairs_P)

    def _quotas_to_read(self, replicas: Replicas) -> Callable[[IntArray, FloatArray], IntArray]:
        by_expert = ByExpert.of(replicas, self.num_ranks)
        return lambda counts_E, read_E: _even_quotas(by_expert, counts_E)


@dataclass(frozen=True)
class ExactSplit(_ClosedSplit):
    """The min-max split of each step; in a memory-bound step, each active expert on one rank."""

    rule: str = "exact"

    def balance(self, replicas: Replicas, counts_SE: IntArray) -> StepBalance:
        num_ranks, by_expert = self.num_ranks, ByExpert.of(replicas, self.num_ranks)
        counts_SE = np.ascontiguousarray(counts_SE)
        if len(replicas) > by_expert.num_experts:
            fullest_S, pairs_C, _ = split_steps(counts_SE, by_expert.first_E, by_expert.ranks_C, num_ranks)
        else:
            return EvenSplit(num_ranks).balance(replicas, counts_SE)
        return StepBalance(fullest_S * num_ranks / counts_SE.sum(axis=1), _in_replica_order(by_expert, pairs_C))

    def _quotas_to_read(self, replicas: Replicas) -> Callable[[IntArray, FloatArray], IntArray]:
        read_once = partial(route_to_one_rank, ByExpert.of(replicas, self.num_ranks))
        return lambda counts_E, read_E: read_once(counts_E, read_E[replicas.experts_P])


def _even_quotas(by_expert: ByExpert, counts_E: IntArray) -> IntArray:
    """[..., C] pairs of each replica, from [..., E] pairs."""
    totals_C, number_C, of_C = counts_E[..., by_expert.experts_C], by_expert.number_C, by_expert.num_replicas_C
    quotas_C: IntArray = (number_C + 1) * totals_C // of_C - number_C * totals_C // of_C
    return quotas_C


def _in_replica_order(by_expert: ByExpert, pairs_C: IntArray) -> IntArray:
    """[P] the pairs of replicas sorted by expert, in the order of the layer's replicas."""
    pairs_P = np.zeros_like(pairs_C)
    pairs_P[by_expert.replicas_C] = pairs_C
    return pairs_P


def _whole(weight_SE: FloatArray) -> IntArray:
    """[S, E] weights in whole parts, fine enough that splits of parts are as good as splits of fractions."""
    mean_S1 = weight_SE.mean(axis=1, keepdims=True)
    whole_SE: IntArray = np.rint(weight_SE / mean_S1 * SCALE).astype(np.int64)
    return whole_SE
