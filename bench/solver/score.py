"""Balance of held-out steps under a placement: max/mean of pairs over ranks, by an even split and by the exact one."""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.placement import Placement
from rq_ep.solver.split.min_max_split import ByExpert, split_steps

PARTS = 1024  # a pair is split into, so that whole parts are as good as fractions


class Score(NamedTuple):
    """Mean over steps and layers of max/mean over ranks."""

    even: float  # replicas of an expert share its pairs evenly
    fractional: float  # best split, pairs divisible
    integer: float  # best split of whole pairs
    cvar90: float  # of `fractional`: mean of the worst tenth of the steps


def score(placement: Placement, counts_SLE: IntArray) -> Score:
    """Score `placement` on these steps."""
    num_ranks = placement.topology.num_ranks
    even, fractional, integer, worst = [], [], [], []
    for at, layer in enumerate(placement.layers):
        table = layer.replicas
        by_expert = ByExpert.of(table, num_ranks)
        counts_SE = counts_SLE[:, at]
        counts_SE = counts_SE[counts_SE.any(axis=1)]
        means_S = counts_SE.sum(axis=1) / num_ranks
        on_rank_ER = np.zeros((layer.num_experts, num_ranks))
        on_rank_ER[table.experts_P, table.ranks_P] = 1
        even_S = (counts_SE @ (on_rank_ER / on_rank_ER.sum(axis=1, keepdims=True))).max(axis=1) / means_S
        parts_S, _, _ = split_steps(
            np.ascontiguousarray(counts_SE * PARTS), by_expert.first_E, by_expert.ranks_C, num_ranks
        )
        ratio_S = parts_S / PARTS / means_S
        even.append(even_S.mean())
        fractional.append(ratio_S.mean())
        integer.append((np.ceil(parts_S / PARTS) / means_S).mean())  # the least whole maximum: that one rounded up
        worst.append(np.sort(ratio_S)[-max(len(ratio_S) // 10, 1) :].mean())
    return Score(*(float(np.mean(ratios)) for ratios in (even, fractional, integer, worst)))
