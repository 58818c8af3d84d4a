"""Renumbering of a new placement's ranks so that least has to move: the linear assignment problem (Hungarian method).

Ranks are alike unless rules tell them apart, so the parts of a placement may be assigned to ranks in any order.
DeepSeek's EPLB places as if ranks held nothing yet, so that nearly everything moves (EPLB issue 25).

Axes: H nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rq_ep.core.arrays import BoolArray, IntArray
from rq_ep.core.moves import Held
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.replicas import Replicas, replica_bytes
from rq_ep.core.topology import Topology

MAX_RANKS = 512  # for an assignment in each layer: their time grows with the cube


def relabel_ranks(
    before: Held,
    layers: Sequence[LayerPlacement],
    budget_R: Sequence[int] | None,
    topology: Topology,
    expert_bytes: Mapping[str, int],
    native_format: str,
) -> list[LayerPlacement]:
    """`layers` with their ranks renumbered, one way for all and then layer by layer, as far as budgets allow.

    Args:
        before: replicas of each layer that the ranks hold now.
        layers: the new placement.
        budget_R: bytes of each rank; None: no limit.
        topology: with several nodes, ranks of a node stay together, so that replicas keep their spread over nodes.
        expert_bytes: format -> bytes of one expert.
        native_format: the one from which a rank makes every other itself.
    """
    num_ranks = topology.num_ranks
    kept = [
        _kept_RR(replicas, layer, num_ranks, expert_bytes, native_format)
        for replicas, layer in zip(before, layers, strict=True)
    ]
    bytes_LR = np.stack([replica_bytes(layer.replicas, num_ranks, expert_bytes) for layer in layers])
    limit_R = np.full(num_ranks, np.iinfo(np.int64).max) if budget_R is None else np.array(budget_R, np.int64)
    whole_RR = bytes_LR.sum(axis=0)[:, None] <= limit_R
    common_R = _assign(np.sum(kept, axis=0), whole_RR, topology, np.arange(num_ranks))
    order_R = np.argsort(common_R)  # the part that each rank takes
    bytes_R = bytes_LR.sum(axis=0)[order_R]
    result = []
    for layer, kept_RR, of_layer_R in zip(layers, kept, bytes_LR, strict=True):
        to_R = common_R
        if num_ranks <= MAX_RANKS:
            without_R = bytes_R - of_layer_R[order_R]
            to_R = _assign(kept_RR, of_layer_R[:, None] + without_R <= limit_R, topology, common_R)
            bytes_R = without_R + of_layer_R[np.argsort(to_R)]
        result.append(_relabel_layer(layer, to_R))
    return result


def _kept_RR(
    before: Sequence[tuple[int, int, str]],
    layer: LayerPlacement,
    num_ranks: int,
    expert_bytes: Mapping[str, int],
    native_format: str,
) -> IntArray:
    """[R, R] bytes of the first rank's part of the solution that need not move if the second rank takes it."""
    table = layer.replicas
    sizes_P = np.array([expert_bytes[name] for name in table.formats_P], np.int64)
    kept_RR = np.zeros((num_ranks, num_ranks))
    for name in sorted(set(table.formats_P)):
        is_P = np.array([other == name for other in table.formats_P])
        target_RE = np.zeros((num_ranks, layer.num_experts))
        target_RE[table.ranks_P[is_P], table.experts_P[is_P]] = sizes_P[is_P]
        stored_RE = np.zeros((num_ranks, layer.num_experts))
        for rank, expert, stored in before:
            stored_RE[rank, expert] = stored in (name, native_format)
        kept_RR += target_RE @ stored_RE.T
    return kept_RR.astype(np.int64)


def _assign(kept_RR: IntArray, fits_RR: BoolArray, topology: Topology, fallback_R: IntArray) -> IntArray:
    """[R] the rank that takes each part, so that most bytes are kept; parts of a node go to ranks of one node.

    `fallback_R` where no assignment fits. With several nodes, ranks are assigned for each pair of nodes, then nodes.
    """
    from scipy.optimize import linear_sum_assignment

    nodes_R = topology.nodes_R
    forbidden = int(kept_RR.sum()) + 1
    cost_RR = np.where(fits_RR, -kept_RR, forbidden)
    to_R = np.arange(topology.num_ranks)
    if topology.num_nodes == 1:
        to_R[:] = linear_sum_assignment(cost_RR)[1]
    else:
        inner = {}
        num_nodes = topology.num_nodes
        cost_HH = np.full((num_nodes, num_nodes), float(forbidden * topology.num_ranks))
        for one in range(num_nodes):
            for other in range(num_nodes):
                mine, theirs = np.flatnonzero(nodes_R == one), np.flatnonzero(nodes_R == other)
                if len(mine) == len(theirs):
                    rows, columns = linear_sum_assignment(cost_RR[np.ix_(mine, theirs)])
                    inner[one, other] = theirs[columns]
                    cost_HH[one, other] = cost_RR[mine[rows], theirs[columns]].sum()
        for one, other in zip(*linear_sum_assignment(cost_HH), strict=True):
            to_R[nodes_R == one] = inner[one, other]
    return to_R if fits_RR[np.arange(len(to_R)), to_R].all() else fallback_R


def _relabel_layer(layer: LayerPlacement, to_R: IntArray) -> LayerPlacement:
    """The layer with each rank's replicas on the rank `to_R` names."""
    ranks_P = to_R[layer.replicas.ranks_P]
    order_P = np.lexsort((layer.replicas.experts_P, ranks_P))
    table = Replicas(
        ranks_P[order_P],
        layer.replicas.experts_P[order_P],
        tuple(layer.replicas.formats_P[p] for p in order_P.tolist()),
        layer.replicas.mixed_formats,
    )
    return replace(layer, replicas=table, shares_P=layer.shares_P[order_P])
