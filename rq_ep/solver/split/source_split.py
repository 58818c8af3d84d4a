"""Which source rank sends how many pairs to which replica, once the quota of every replica is decided.

Axes: C replicas sorted by expert.
"""

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.topology import Topology
from rq_ep.solver.compiled import compiled
from rq_ep.solver.split.min_max_split import ByExpert


def in_source_order(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray) -> IntArray:
    """[R, P] pairs from each source rank to each replica: in the order of sources, they fill replicas in their order.

    Args:
        by_expert: the layer's replicas.
        counts_RE: [R, E] pairs of each source rank and expert.
        quotas_C: [C] pairs of each replica; those of an expert sum to its pairs.
    """
    return _assigned(by_expert, counts_RE, quotas_C, np.array([[[0, by_expert.num_ranks]] * by_expert.num_ranks]))


def nearest_first(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray, topology: Topology) -> IntArray:
    """[R, P] as `in_source_order`, but sources fill the replicas on their own rank first, then those on their node."""
    return _assigned(by_expert, counts_RE, quotas_C, topology.neighbors_GR2)


def _assigned(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray, groups_GR2: IntArray) -> IntArray:
    counts_RE = np.require(counts_RE, np.int64, ("C", "W"))
    if counts_RE.shape != (by_expert.num_ranks, by_expert.num_experts):
        expected = f"{by_expert.num_ranks} ranks and {by_expert.num_experts} experts"
        raise UserError(f"counts of shape {counts_RE.shape}: the placement has {expected}")
    assert groups_GR2.shape[1] == by_expert.num_ranks
    pairs_RP = np.zeros((len(counts_RE), len(quotas_C)), np.int64)
    assign_sources(
        counts_RE, by_expert.first_E, by_expert.ranks_C, by_expert.replicas_C, quotas_C, groups_GR2, pairs_RP
    )
    return pairs_RP


@compiled
def assign_sources(
    counts_RE: IntArray,
    first_E: IntArray,
    ranks_C: IntArray,
    replicas_C: IntArray,
    quotas_C: IntArray,
    groups_GR2: IntArray,
    pairs_RP: IntArray,
) -> None:
    """Write `pairs_RP`: in groups that grow turn by turn, replicas take what is left of the sources in their group.

    Args:
        counts_RE: [R, E] pairs of each source rank and expert.
        first_E: [E + 1] index into C of each expert's first replica.
        ranks_C: [C] rank of each replica.
        replicas_C: [C] index into P.
        quotas_C: [C] pairs of each replica.
        groups_GR2: for each turn G and rank, the first rank of its group and the one behind its last.
        pairs_RP: [R, P] zeros.
    """
    num_ranks, num_experts = counts_RE.shape
    for source in range(num_ranks):
        for expert in range(num_experts):
            if first_E[expert + 1] - first_E[expert] == 1:
                pairs_RP[source, replicas_C[first_E[expert]]] = counts_RE[source, expert]
    for expert in range(num_experts):
        first, end = first_E[expert], first_E[expert + 1]  # the expert's replicas, n of them
        if end - first == 1:
            continue
        left_R = counts_RE[:, expert].copy()
        left_n = quotas_C[first:end].copy()
        for turn in range(len(groups_GR2)):
            for n in range(end - first):
                group_2 = groups_GR2[turn, ranks_C[first + n]]
                for source in range(group_2[0], group_2[1]):
                    if left_n[n] == 0:
                        break
                    amount = min(left_R[source], left_n[n])
                    pairs_RP[source, replicas_C[first + n]] += amount
                    left_R[source] -= amount
                    left_n[n] -= amount
