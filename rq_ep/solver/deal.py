"""Who sends to whom: pairs of each source rank dealt to the replicas of shared experts, whose quotas are given.

Letters as in `rq_ep.solver.split`: V shared experts, C their replicas, sorted by (expert, rank).
"""

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.topology import Topology
from rq_ep.solver.split import SharedExperts


def in_source_order(shared: SharedExperts, supply_RV: IntArray, quotas_C: IntArray) -> IntArray:
    """[R, C] an expert's pairs, source rank by source rank, fill its replicas in the order of their ranks.

    Where supply and quotas of an expert differ in sum, the lesser of the two is dealt.
    """
    ends_RV = np.cumsum(supply_RV, axis=0)
    starts_RC = (ends_RV - supply_RV)[:, shared.groups_C]
    ends_RC = ends_RV[:, shared.groups_C]
    cut_C = np.cumsum(quotas_C)
    before_V = cut_C[shared.first_V] - quotas_C[shared.first_V]
    cut_C -= before_V[shared.groups_C]
    overlap_RC: IntArray = np.minimum(ends_RC, cut_C)
    overlap_RC -= np.maximum(starts_RC, cut_C - quotas_C)
    return overlap_RC.clip(min=0, out=overlap_RC)


def nearest_first(shared: SharedExperts, counts_RE: IntArray, quotas_C: IntArray, topology: Topology) -> IntArray:
    """[R, C] as `in_source_order`, but a source first fills replicas of its own, then those of its node."""
    supply_RV = counts_RE[:, shared.experts_V]
    columns_C = np.arange(len(quotas_C))
    own_C = np.minimum(supply_RV[shared.ranks_C, shared.groups_C], quotas_C)
    supply_RV[shared.ranks_C, shared.groups_C] -= own_C
    pairs_RC = np.zeros((topology.num_ranks, len(quotas_C)), np.int64)
    pairs_RC[shared.ranks_C, columns_C] = own_C
    rest_C = quotas_C - own_C
    if topology.num_nodes > 1:
        node_of_C = topology.nodes_R[shared.ranks_C]
        for node in range(topology.num_nodes):
            here_R = topology.nodes_R == node
            dealt_RC = in_source_order(shared, supply_RV * here_R[:, None], np.where(node_of_C == node, rest_C, 0))
            pairs_RC += dealt_RC
            rest_C -= dealt_RC.sum(axis=0)
            supply_RV -= np.add.reduceat(dealt_RC, shared.first_V, axis=1)
    pairs_RC += in_source_order(shared, supply_RV, rest_C)
    return pairs_RC
