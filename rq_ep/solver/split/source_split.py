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
    return _assigned(by_expert, counts_RE, quotas_C, (by_expert.num_ranks,))


def nearest_first(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray, topology: Topology) -> IntArray:
    """[R, P] as `in_source_order`, but sources fill the replicas on their own rank first, then those on their node."""
    return _assigned(by_expert, counts_RE, quotas_C, (1, topology.ranks_per_node, topology.num_ranks))


def _assigned(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray, group_sizes: tuple[int, ...]) -> IntArray:
    counts_RE = np.require(counts_RE, np.int64, ("C", "W"))
    if counts_RE.shape != (by_expert.num_ranks, by_expert.num_experts):
        expected = f"{by_expert.num_ranks} ranks and {by_expert.num_experts} experts"
        raise UserError(f"counts of shape {counts_RE.shape}: the placement has {expected}")
    pairs_RP = np.empty((len(counts_RE), len(quotas_C)), np.int64)
    assign_sources(
        counts_RE, by_expert.first_E, by_expert.ranks_C, by_expert.replicas_C, quotas_C, np.array(group_sizes), pairs_RP
    )
    return pairs_RP


@compiled
def assign_sources(
    counts_RE: IntArray,
    first_E: IntArray,
    ranks_C: IntArray,
    replicas_C: IntArray,
    quotas_C: IntArray,
    group_sizes: IntArray,
    pairs_RP: IntArray,
) -> None:
    """Write `pairs_RP`: for each group size in turn, replicas take what is left of the sources in their group.

    Args:
        counts_RE: [R, E] pairs of each source rank and expert.
        first_E: [E + 1] index into C of each expert's first replica.
        ranks_C: [C] rank of each replica.
        replicas_C: [C] index into P.
        quotas_C: [C] pairs of each replica.
        group_sizes: ascending sizes of groups of neighboring ranks; a replica serves the smaller group first.
        pairs_RP: [R, P] overwritten.
    """
    num_ranks, num_experts = counts_RE.shape
    pairs_RP[:] = 0
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
        for group_size in group_sizes:
            for n in range(end - first):
                start = ranks_C[first + n] // group_size * group_size
                for source in range(start, min(start + group_size, num_ranks)):
                    if left_n[n] == 0:
                        break
                    amount = min(left_R[source], left_n[n])
                    pairs_RP[source, replicas_C[first + n]] += amount
                    left_R[source] -= amount
                    left_n[n] -= amount
