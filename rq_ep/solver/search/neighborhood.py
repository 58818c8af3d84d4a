"""Moves of replicas in one layer: which there are, and which of them are allowed."""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled
from rq_ep.solver.search.cuts import Cuts
from rq_ep.solver.search.max_flow import Index

NUM_DRAWS = 7  # random numbers that a move is made from
REPLACE, SHIFT = 0.3, 0.1  # share of moves that take another replica's place, and of those to a rank with room


class Limits(NamedTuple):
    """Where replicas of a layer may be, and what it may still spend; `free_R` and `room` are kept current."""

    bytes_E: IntArray  # of one replica
    free_R: IntArray  # bytes left on each rank
    allowed_ER: BoolArray
    fixed_ER: BoolArray
    nodes_R: IntArray
    num_nodes: int  # that replicas of an expert must spread over; 1: they need not
    present_ER: BoolArray  # replicas that need not be moved there, as they are there in this format
    price: float  # of moving a byte, in max/mean
    room: IntArray  # [1] bytes that may still be moved


@compiled
def propose(
    index: Index,
    cuts: Cuts,
    loads_SE: FloatArray,
    held_ER: BoolArray,
    limits: Limits,
    draws_D: FloatArray,
    slots_N: IntArray,
    to_experts_N: IntArray,
    to_ranks_N: IntArray,
) -> int:
    """A random move of an expert that a full set of ranks cannot get rid of.

    Its replica is swapped with one outside the set, or goes there where there is room; or the expert gets the place of
    a replica that leaves others. Where sizes differ, a second replica may go back along with the first.

    Returns:
        How many replicas change, 0 if the draws make no allowed move; of each the index in P, and the expert and the
        rank it changes to, are written.
    """
    one, fullest = _draw_expert(cuts, loads_SE, draws_D)
    to_rank = _draw_outside(cuts, fullest, draws_D[2]) if one >= 0 else -1
    if to_rank < 0 or held_ER[one, to_rank] or not limits.allowed_ER[one, to_rank]:
        return 0
    free_R, bytes_E = limits.free_R, limits.bytes_E
    num_there = index.first_R[to_rank + 1] - index.first_R[to_rank]
    other, two = -1, -1
    if num_there > 0:
        other = index.by_rank_P[index.first_R[to_rank] + int(draws_D[5] * num_there)]
        two = index.experts_P[other]
    if draws_D[4] < REPLACE:
        if two < 0 or limits.fixed_ER[two, to_rank] or index.first_E[two + 1] - index.first_E[two] == 1:
            return 0
        if free_R[to_rank] + bytes_E[two] < bytes_E[one]:
            return 0
        if crowded(index, limits, one, -1, to_rank) or crowded(index, limits, two, to_rank, -1):
            return 0
        slots_N[0], to_experts_N[0], to_ranks_N[0] = other, one, to_rank
        return 1
    num = index.first_E[one + 1] - index.first_E[one]
    slot = index.by_expert_P[index.first_E[one] + int(draws_D[3] * num)]
    from_rank = index.ranks_P[slot]
    if limits.fixed_ER[one, from_rank] or crowded(index, limits, one, from_rank, to_rank):
        return 0
    slots_N[0], to_experts_N[0], to_ranks_N[0] = slot, one, to_rank
    if two < 0 or draws_D[4] < REPLACE + SHIFT:
        return 1 if free_R[to_rank] >= bytes_E[one] else 0
    if not _may_move(index, limits, held_ER, two, to_rank, from_rank):
        return 0
    slots_N[1], to_experts_N[1], to_ranks_N[1] = other, two, from_rank
    more = bytes_E[one] - bytes_E[two]  # bytes that `to_rank` takes more and `from_rank` less
    if -free_R[from_rank] <= more <= free_R[to_rank]:
        return 2
    giver, taker = (to_rank, from_rank) if more > 0 else (from_rank, to_rank)
    num_there = index.first_R[giver + 1] - index.first_R[giver]
    third = index.by_rank_P[index.first_R[giver] + int(draws_D[6] * num_there)]
    three = index.experts_P[third]
    if three in (one, two) or not _may_move(index, limits, held_ER, three, giver, taker):
        return 0
    slots_N[2], to_experts_N[2], to_ranks_N[2] = third, three, taker
    more += -bytes_E[three] if giver == to_rank else bytes_E[three]
    return 3 if -free_R[from_rank] <= more <= free_R[to_rank] else 0


@compiled
def _draw_expert(cuts: Cuts, loads_SE: FloatArray, draws_D: FloatArray) -> tuple[int, int]:
    """An expert by its load among those confined to the fullest set of a step, drawn by its excess; and that set."""
    excess = 0.0
    for top in cuts.tops_S:
        excess += max(top - 1, 0.0)
    if excess <= 0:
        return -1, -1
    wanted, step = draws_D[0] * excess, 0
    while step < len(loads_SE) - 1 and wanted >= max(cuts.tops_S[step] - 1, 0.0):
        wanted -= max(cuts.tops_S[step] - 1, 0.0)
        step += 1
    fullest = cuts.at_S[step]
    wanted, one = draws_D[1] * cuts.means_SG[step, fullest] * cuts.sizes_G[fullest], -1
    for expert in range(loads_SE.shape[1]):
        if cuts.missing_EG[expert, fullest] == 0 and loads_SE[step, expert] > 0:
            one = expert
            wanted -= loads_SE[step, expert]
            if wanted < 0:
                break
    return one, fullest


@compiled
def _draw_outside(cuts: Cuts, g: int, draw: float) -> int:
    """A rank outside a set, -1 if there is none."""
    skip, rank = int(draw * (len(cuts.outside_RG) - cuts.sizes_G[g])), -1
    for other in range(len(cuts.outside_RG)):
        if cuts.outside_RG[other, g] == 1:
            rank = other
            if skip == 0:
                break
            skip -= 1
    return rank


@compiled
def _may_move(index: Index, limits: Limits, held_ER: BoolArray, expert: int, off: int, on: int) -> bool:
    if limits.fixed_ER[expert, off] or held_ER[expert, on] or not limits.allowed_ER[expert, on]:
        return False
    return not crowded(index, limits, expert, off, on)


@compiled
def crowded(index: Index, limits: Limits, expert: int, off: int, on: int) -> bool:
    """Whether the expert, off rank `off` and on rank `on`, has more replicas on a node than an even spread allows."""
    if limits.num_nodes == 1:
        return False
    on_node_N = np.zeros(limits.num_nodes, np.int64)
    num = 0
    for p in index.by_expert_P[index.first_E[expert] : index.first_E[expert + 1]]:
        if index.ranks_P[p] != off:
            on_node_N[limits.nodes_R[index.ranks_P[p]]] += 1
            num += 1
    if on >= 0:
        on_node_N[limits.nodes_R[on]] += 1
        num += 1
    return bool(on_node_N.max() > -(-num // limits.num_nodes))


@compiled
def by_expert(
    index: Index, slots_N: IntArray, to_experts_N: IntArray, to_ranks_N: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """A move as its experts see it: for each the rank it leaves and the one it comes to, -1 for none."""
    if len(slots_N) == 1 and to_experts_N[0] != index.experts_P[slots_N[0]]:
        rank = to_ranks_N[0]
        experts_N = np.array([index.experts_P[slots_N[0]], to_experts_N[0]])
        return experts_N, np.array([rank, -1]), np.array([-1, rank])
    return to_experts_N.copy(), index.ranks_P[slots_N], to_ranks_N.copy()


@compiled
def moved_bytes(limits: Limits, experts_N: IntArray, off_N: IntArray, on_N: IntArray) -> int:
    """Bytes that must be moved more than before."""
    more = 0
    for n in range(len(experts_N)):
        expert = experts_N[n]
        if on_N[n] >= 0 and not limits.present_ER[expert, on_N[n]]:
            more += limits.bytes_E[expert]
        if off_N[n] >= 0 and not limits.present_ER[expert, off_N[n]]:
            more -= limits.bytes_E[expert]
    return more
