"""The split of a step that waits for weights: few pairs, so each expert is read on one rank only.

A rank that computes few pairs takes as long as reading the weights of its active replicas; spreading an expert's pairs
over its replicas then only makes more ranks read it (METRO, arXiv 2512.09277: balance activated experts, not tokens).
"""

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.split import SharedExperts


def activate_one(shared: SharedExperts, totals_E: IntArray, read_s_P: FloatArray) -> IntArray:
    """[C] all pairs of an expert on one of its replicas, so that no rank reads much longer than the others.

    Greedy: experts of fewest replicas choose first, each the rank that ends earliest, then the one of fewest pairs.

    Args:
        shared: the layer's experts with several replicas.
        totals_E: [E] pairs of each expert in this step.
        read_s_P: [P] seconds that a replica costs once it computes a pair.
    """
    pairs_R = shared.single_loads(totals_E)
    single_s = read_s_P[shared.single_replicas] * (totals_E[shared.single_experts] > 0)
    seconds_R = np.bincount(shared.single_ranks, single_s, minlength=shared.num_ranks).tolist()
    read_s = read_s_P[shared.replicas_C].tolist()
    totals, first_V = totals_E[shared.experts_V].tolist(), shared.first_V.tolist()
    quotas_C = np.zeros(len(read_s), np.int64)
    for v in sorted(range(len(totals)), key=lambda v: (len(shared.ranks_V[v]), -totals[v])):
        if totals[v]:
            ends = [
                (seconds_R[rank] + read_s[c], pairs_R[rank], c, rank)
                for c, rank in enumerate(shared.ranks_V[v], first_V[v])
            ]
            seconds, _, c, rank = min(ends)
            quotas_C[c] = totals[v]
            seconds_R[rank] = seconds
            pairs_R[rank] += totals[v]
    return quotas_C
