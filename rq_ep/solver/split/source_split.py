"""Who sends to whom: pairs of each source rank dealt to the replicas of the experts, whose quotas are given.

Letters as in `rq_ep.solver.split.min_max_split`: C replicas sorted by expert.
"""

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.topology import Topology
from rq_ep.solver.compiled import compiled
from rq_ep.solver.split.min_max_split import ByExpert


def in_source_order(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray) -> IntArray:
    """[R, P] an expert's pairs, source rank by source rank, fill its replicas in their order.

    Args:
        by_expert: the layer's replicas.
        counts_RE: [R, E] pairs of each source rank and expert.
        quotas_C: [C] pairs of each replica; those of an expert sum to its pairs.
    """
    return _dealt(by_expert, counts_RE, quotas_C, (by_expert.num_ranks,))


def nearest_first(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray, topology: Topology) -> IntArray:
    """[R, P] as `in_source_order`, but a source first fills replicas of its own, then those of its node."""
    return _dealt(by_expert, counts_RE, quotas_C, (1, topology.ranks_per_node, topology.num_ranks))


def _dealt(by_expert: ByExpert, counts_RE: IntArray, quotas_C: IntArray, reaches: tuple[int, ...]) -> IntArray:
    counts_RE = np.require(counts_RE, np.int64, ("C", "W"))
    if counts_RE.shape != (by_expert.num_ranks, by_expert.num_experts):
        wanted = f"{by_expert.num_ranks} ranks and {by_expert.num_experts} experts"
        raise UserError(f"counts of shape {counts_RE.shape}: the placement has {wanted}")
    pairs_RP = np.empty((len(counts_RE), len(quotas_C)), np.int64)
    deal(counts_RE, by_expert.first_E, by_expert.ranks_C, by_expert.replicas_C, quotas_C, np.array(reaches), pairs_RP)
    return pairs_RP


@compiled
def deal(
    counts_RE: IntArray,
    first_E: IntArray,
    ranks_C: IntArray,
    replicas_C: IntArray,
    quotas_C: IntArray,
    reaches: IntArray,
    pairs_RP: IntArray,
) -> None:
    """Write `pairs_RP`: each replica in turn takes what is left of the sources within reach, for every reach in turn.

    Args:
        counts_RE: [R, E] pairs of each source rank and expert.
        first_E: [E + 1] index into C of each expert's first replica.
        ranks_C: [C] rank of each replica.
        replicas_C: [C] index into P.
        quotas_C: [C] pairs of each replica.
        reaches: ascending sizes of groups of neighbouring ranks: sources in a replica's group come first.
        pairs_RP: [R, P] overwritten.
    """
    num_ranks, num_experts = counts_RE.shape
    pairs_RP[:] = 0
    for source in range(num_ranks):
        for expert in range(num_experts):
            if first_E[expert + 1] - first_E[expert] == 1:
                pairs_RP[source, replicas_C[first_E[expert]]] = counts_RE[source, expert]
    for expert in range(num_experts):
        first, end = first_E[expert], first_E[expert + 1]
        if end - first == 1:
            continue
        rest_R = counts_RE[:, expert].copy()
        rest_n = quotas_C[first:end].copy()
        for reach in reaches:
            for n in range(end - first):
                start = ranks_C[first + n] // reach * reach
                for source in range(start, min(start + reach, num_ranks)):
                    if rest_n[n] == 0:
                        break
                    amount = min(rest_R[source], rest_n[n])
                    pairs_RP[source, replicas_C[first + n]] += amount
                    rest_R[source] -= amount
                    rest_n[n] -= amount
