"""How even a layer's replicas make recorded steps, under the split that its strategy serves them with."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.replicas import Replicas
from rq_ep.solver.compiled import compiled
from rq_ep.solver.split.min_max_split import ByExpert, split_step
from rq_ep.solver.split.one_rank_per_expert import route_to_one_rank
from rq_ep.solver.split.two_format_split import TwoFormatSplit, split_steps_in_two_formats

SplitRule = Literal["home", "even", "exact"]
SPLIT_RULES: dict[SplitRule, str] = {
    "home": "all pairs to the only replica",
    "even": "an expert's pairs evenly over its replicas",
    "exact": "the exact split of each step",
}


class Judgement(NamedTuple):
    """S steps through one layer."""

    ratio_S: FloatArray  # max/mean of pairs over ranks, of whole pairs
    pairs_P: IntArray  # of each replica, all steps together


def judge(replicas: Replicas, counts_SE: IntArray, num_ranks: int, rule: SplitRule) -> Judgement:
    """Split steps that route at least one pair over `replicas`."""
    totals_S = counts_SE.sum(axis=1)
    by_expert = ByExpert.of(replicas, num_ranks)
    if rule == "exact" and replicas.mixing_experts:
        fullest_S, pairs_C = split_steps_in_two_formats(
            np.ascontiguousarray(counts_SE), TwoFormatSplit.of(replicas, num_ranks).virtual, num_ranks, len(replicas)
        )
    elif rule == "exact" and len(replicas) > len(by_expert.first_E) - 1:
        fullest_S, pairs_C = _split_exactly(
            np.ascontiguousarray(counts_SE), by_expert.first_E, by_expert.ranks_C, num_ranks
        )
    else:
        # The quotas of eplb's planner: consecutive intervals of a number that differ by one pair at most.
        totals_SC, number_C, of_C = counts_SE[:, by_expert.experts_C], by_expert.number_C, by_expert.num_replicas_C
        quotas_SC = (number_C + 1) * totals_SC // of_C - number_C * totals_SC // of_C
        on_rank_CR = (by_expert.ranks_C[:, None] == np.arange(num_ranks)).astype(np.float64)
        fullest_S = (quotas_SC @ on_rank_CR).max(axis=1, initial=0.0)
        pairs_C = quotas_SC.sum(axis=0)
    pairs_P = np.zeros_like(pairs_C)
    pairs_P[by_expert.replicas_C] = pairs_C
    return Judgement(fullest_S * num_ranks / totals_S, pairs_P)


@compiled
def _split_exactly(
    counts_SE: IntArray, first_E: IntArray, ranks_C: IntArray, num_ranks: int
) -> tuple[IntArray, IntArray]:
    """[S] pairs of each step's fullest rank, and [C] pairs of each replica."""
    fullest_S = np.zeros(len(counts_SE), np.int64)
    pairs_C = np.zeros(len(ranks_C), np.int64)
    quotas_C = np.zeros(len(ranks_C), np.int64)
    loads_R = np.zeros(num_ranks, np.int64)
    cut_R = np.zeros(num_ranks, np.bool_)
    for step in range(len(counts_SE)):
        loads_R[:] = 0
        fullest_S[step] = split_step(counts_SE[step], first_E, ranks_C, quotas_C, loads_R, cut_R)
        pairs_C += quotas_C
    return fullest_S, pairs_C


def judge_reading(
    replicas: Replicas, counts_SE: IntArray, read_SE: FloatArray, num_ranks: int, rule: SplitRule
) -> Judgement:
    """Steps that wait for weights: a rank's load is what it reads, the whole of each replica that computes a pair.

    The exact split reads every active expert once (`route_to_one_rank`); the others wherever they send a pair.

    Args:
        replicas: of the layer.
        counts_SE: pairs.
        read_SE: bytes or seconds of reading each expert, if it is active; the mean is that of reading each once.
        num_ranks: R.
        rule: the split.
    """
    by_expert = ByExpert.of(replicas, num_ranks)
    number_C, of_C = by_expert.number_C, by_expert.num_replicas_C
    read_once: Callable[[IntArray, FloatArray], IntArray] = partial(route_to_one_rank, by_expert)
    if replicas.mixing_experts:
        read_once = TwoFormatSplit.of(replicas, num_ranks).route_to_one_rank
    ratio_S = np.ones(len(counts_SE))
    pairs_C = np.zeros(len(of_C), np.int64)
    for step, (counts_E, read_E) in enumerate(zip(counts_SE, read_SE, strict=True)):
        if rule == "exact":
            quotas_C = read_once(counts_E, read_E[replicas.experts_P])
        else:
            totals_C = counts_E[by_expert.experts_C]
            quotas_C = (number_C + 1) * totals_C // of_C - number_C * totals_C // of_C
        read_R = np.bincount(by_expert.ranks_C, (quotas_C > 0) * read_E[by_expert.experts_C], minlength=num_ranks)
        ratio_S[step] = read_R.max() * num_ranks / read_E[counts_E > 0].sum()
        pairs_C += quotas_C
    pairs_P = np.zeros_like(pairs_C)
    pairs_P[by_expert.replicas_C] = pairs_C
    return Judgement(ratio_S, pairs_P)
