"""The split of a memory-bound step: with few pairs, each active expert is read on one rank only.

A rank that computes few pairs takes as long as it reads the weights of its active replicas. To spread an expert's pairs
over its replicas then only makes more ranks read it (METRO, arXiv 2512.09277: balance activated experts, not tokens).

Axes: C replicas sorted by expert.
"""

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.compiled import compiled
from rq_ep.solver.split.min_max_split import ByExpert


def route_to_one_rank(by_expert: ByExpert, totals_E: IntArray, read_s_P: FloatArray) -> IntArray:
    """[C] all pairs of an expert on one of its replicas, so that no rank reads much longer than the others.

    Greedy list scheduling: experts of fewest replicas choose first, then those of most pairs. Each chooses the rank
    that would finish earliest, then the one of fewest pairs.

    Args:
        by_expert: the layer's replicas.
        totals_E: [E] pairs of each expert in this step.
        read_s_P: [P] seconds that a replica costs once it computes a pair.
    """
    first_E = by_expert.first_E
    order_E = np.lexsort((-totals_E, np.diff(first_E)))
    quotas_C = np.zeros(len(by_expert.ranks_C), np.int64)
    read_s_C = read_s_P[by_expert.replicas_C]
    _choose(
        np.require(totals_E, np.int64, ("C", "W")),
        order_E,
        first_E,
        by_expert.ranks_C,
        by_expert.num_ranks,
        read_s_C,
        quotas_C,
    )
    return quotas_C


@compiled
def _choose(
    totals_E: IntArray,
    order_E: IntArray,
    first_E: IntArray,
    ranks_C: IntArray,
    num_ranks: int,
    read_s_C: FloatArray,
    quotas_C: IntArray,
) -> None:
    """Write the quotas, expert by expert in the order given."""
    seconds_R, pairs_R = np.zeros(num_ranks), np.zeros(num_ranks, np.int64)
    for expert in order_E:
        if totals_E[expert] == 0:
            continue
        best = first_E[expert]
        for c in range(first_E[expert] + 1, first_E[expert + 1]):
            ends, earliest = seconds_R[ranks_C[c]] + read_s_C[c], seconds_R[ranks_C[best]] + read_s_C[best]
            if ends < earliest or (ends == earliest and pairs_R[ranks_C[c]] < pairs_R[ranks_C[best]]):
                best = c
        quotas_C[best] = totals_E[expert]
        seconds_R[ranks_C[best]] += read_s_C[best]
        pairs_R[ranks_C[best]] += totals_E[expert]
