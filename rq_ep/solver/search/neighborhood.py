"""The neighborhood of the local search in one layer: random moves of replicas, and which of them are allowed.

Axes: P replicas in any order; X experts whose replicas change, 3 at most; U random numbers that a move is made from; H
nodes.
"""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled, compiled_part
from rq_ep.solver.search.cuts import Changes, Cuts
from rq_ep.solver.split.augmenting_paths import ReplicaIndex

NUM_DRAWS = 8  # random numbers that a move is made from
FEW_STEPS = 4  # up to which ejection chains are tried; of many steps they over-fit the recorded ones
REPLACE, SHIFT = 0.3, 0.1  # share of moves that take another replica's place, and of moves to a rank with free bytes


class LayerLimits(NamedTuple):
    """Where replicas may be, and the bytes the layer may still spend; `free_R` and `move_budget` are kept current."""

    bytes_E: IntArray  # of one replica
    free_R: IntArray  # bytes left on each rank
    allowed_ER: BoolArray
    fixed_ER: BoolArray  # replicas that must stay
    nodes_R: IntArray
    num_nodes: int  # over which replicas of an expert must spread; 1: they need not
    present_ER: BoolArray  # replicas that the rank holds in this format already: they need not be moved there
    price: float  # of moving a byte, in max/mean
    move_budget: IntArray  # [1] bytes that may still be moved


def fits(limits: LayerLimits, expert: int, rank: int) -> bool:
    """Whether the bytes are left for a new replica."""
    size = limits.bytes_E[expert]
    if limits.free_R[rank] < size:
        return False
    return bool(limits.present_ER[expert, rank] or limits.move_budget[0] >= size)


@compiled_part
def take(limits: LayerLimits, expert: int, rank: int) -> None:
    """Take the bytes of a new replica."""
    limits.free_R[rank] -= limits.bytes_E[expert]
    if not limits.present_ER[expert, rank]:
        limits.move_budget[0] -= limits.bytes_E[expert]


@compiled_part
def propose(
    index: ReplicaIndex,
    cuts: Cuts,
    loads_SE: FloatArray,
    loads_SR: FloatArray,
    held_ER: BoolArray,
    limits: LayerLimits,
    draws_U: FloatArray,
    changes: Changes,
) -> int:
    """Propose a random move of an expert that is confined to the fullest set of ranks of some step.

    One of its replicas is swapped with one outside the set, or moves there where bytes are free; or the expert takes
    the place of a replica there whose expert has others. Where sizes differ, a second replica may go back along with
    the first; and where bytes are not free and steps are few, an ejection chain is tried. Of two ranks outside the set
    the emptier is taken, by `loads_SR`, which need not be up to date.

    Returns:
        The number of experts whose replicas change, written to `changes`; 0 if the draws make no allowed move.
    """
    step, one, fullest = _draw_expert(cuts, loads_SE, draws_U)
    to_rank = _draw_outside(cuts, fullest, draws_U[2]) if one >= 0 else -1
    if to_rank >= 0:
        second = _draw_outside(cuts, fullest, draws_U[7])
        if loads_SR[step, second] < loads_SR[step, to_rank]:
            to_rank = second
    if to_rank < 0 or held_ER[one, to_rank] or not limits.allowed_ER[one, to_rank]:
        return 0
    free_R, bytes_E = limits.free_R, limits.bytes_E
    num_there = index.first_R[to_rank + 1] - index.first_R[to_rank]
    two = -1
    if num_there > 0:
        two = index.experts_P[index.by_rank_P[index.first_R[to_rank] + int(draws_U[5] * num_there)]]
    if draws_U[4] < REPLACE:
        if two < 0 or free_R[to_rank] + bytes_E[two] < bytes_E[one]:
            return 0
        if exceeds_node_spread(index, limits, one, -1, to_rank) or not may_leave(index, limits, two, to_rank):
            return 0
        _change(changes, 0, two, to_rank, -1)
        _change(changes, 1, one, -1, to_rank)
        return 2
    num = index.first_E[one + 1] - index.first_E[one]
    from_rank = index.ranks_P[index.by_expert_P[index.first_E[one] + int(draws_U[3] * num)]]
    shifts = two < 0 or draws_U[4] < REPLACE + SHIFT
    if shifts and two >= 0 and free_R[to_rank] < bytes_E[one] and len(loads_SE) <= FEW_STEPS:
        return _propose_chain(index, limits, held_ER, one, two, to_rank, from_rank, draws_U[6], changes)
    if limits.fixed_ER[one, from_rank] or exceeds_node_spread(index, limits, one, from_rank, to_rank):
        return 0
    _change(changes, 0, one, from_rank, to_rank)
    if shifts:
        return 1 if free_R[to_rank] >= bytes_E[one] else 0
    if not _may_move(index, limits, held_ER, two, to_rank, from_rank):
        return 0
    _change(changes, 1, two, to_rank, from_rank)
    more = bytes_E[one] - bytes_E[two]  # bytes that `to_rank` takes more and `from_rank` less
    if -free_R[from_rank] <= more <= free_R[to_rank]:
        return 2
    giver, taker = (to_rank, from_rank) if more > 0 else (from_rank, to_rank)
    num_there = index.first_R[giver + 1] - index.first_R[giver]
    three = index.experts_P[index.by_rank_P[index.first_R[giver] + int(draws_U[6] * num_there)]]
    if three in (one, two) or not _may_move(index, limits, held_ER, three, giver, taker):
        return 0
    _change(changes, 2, three, giver, taker)
    more += -bytes_E[three] if giver == to_rank else bytes_E[three]
    return 3 if -free_R[from_rank] <= more <= free_R[to_rank] else 0


@compiled_part
def _propose_chain(
    index: ReplicaIndex,
    limits: LayerLimits,
    held_ER: BoolArray,
    one: int,
    two: int,
    to_rank: int,
    from_rank: int,
    draw: float,
    changes: Changes,
) -> int:
    """Propose an ejection chain (Glover 1996): another replica of `one` takes the place of `two` on `to_rank`.

    `two` goes to `from_rank`, which holds `one`, in the place of a third expert that has other replicas, or where bytes
    are free. None of these changes alone relieves the fullest rank.
    """
    free_R, bytes_E = limits.free_R, limits.bytes_E
    if free_R[to_rank] + bytes_E[two] < bytes_E[one] or exceeds_node_spread(index, limits, one, -1, to_rank):
        return 0
    if not _may_move(index, limits, held_ER, two, to_rank, from_rank):
        return 0
    num = 0
    if free_R[from_rank] < bytes_E[two]:
        num_there = index.first_R[from_rank + 1] - index.first_R[from_rank]
        three = index.experts_P[index.by_rank_P[index.first_R[from_rank] + int(draw * num_there)]]
        if three == one or free_R[from_rank] + bytes_E[three] < bytes_E[two]:
            return 0
        if not may_leave(index, limits, three, from_rank):
            return 0
        _change(changes, 0, three, from_rank, -1)
        num = 1
    _change(changes, num, one, -1, to_rank)
    _change(changes, num + 1, two, to_rank, from_rank)
    return num + 2


@compiled_part
def _draw_expert(cuts: Cuts, loads_SE: FloatArray, draws_U: FloatArray) -> tuple[int, int, int]:
    """Draw a step by its excess over balance, and then by its load an expert confined to the step's fullest set.

    Returns:
        The step, the expert and the set; all are -1 if every step is balanced.
    """
    excess = 0.0
    for top in cuts.tops_S:
        excess += max(top - 1, 0.0)
    if excess <= 0:
        return -1, -1, -1
    left, step = draws_U[0] * excess, 0
    while step < len(loads_SE) - 1 and left >= max(cuts.tops_S[step] - 1, 0.0):
        left -= max(cuts.tops_S[step] - 1, 0.0)
        step += 1
    fullest = cuts.nearest_SN[step, 0]
    left, one = draws_U[1] * cuts.means_GS[fullest, step] * cuts.sizes_G[fullest], -1
    for expert in range(loads_SE.shape[1]):
        if cuts.missing_EG[expert, fullest] == 0 and loads_SE[step, expert] > 0:
            one = expert
            left -= loads_SE[step, expert]
            if left < 0:
                break
    return step, one, fullest


@compiled_part
def _draw_outside(cuts: Cuts, g: int, draw: float) -> int:
    """Draw a rank outside the set; -1 if there is none."""
    skip, rank = int(draw * (len(cuts.outside_RG) - cuts.sizes_G[g])), -1
    for other in range(len(cuts.outside_RG)):
        if cuts.outside_RG[other, g] == 1:
            rank = other
            if skip == 0:
                break
            skip -= 1
    return rank


@compiled_part
def _may_move(index: ReplicaIndex, limits: LayerLimits, held_ER: BoolArray, expert: int, off: int, on: int) -> bool:
    """Whether a replica of the expert may leave rank `off` for rank `on`."""
    if limits.fixed_ER[expert, off] or held_ER[expert, on] or not limits.allowed_ER[expert, on]:
        return False
    return not exceeds_node_spread(index, limits, expert, off, on)


@compiled
def may_leave(index: ReplicaIndex, limits: LayerLimits, expert: int, rank: int) -> bool:
    """Whether the expert's replica on the rank is not fixed, and its others keep to the spread over nodes."""
    if limits.fixed_ER[expert, rank] or index.first_E[expert + 1] - index.first_E[expert] == 1:
        return False
    return not exceeds_node_spread(index, limits, expert, rank, -1)


@compiled
def exceeds_node_spread(index: ReplicaIndex, limits: LayerLimits, expert: int, off: int, on: int) -> bool:
    """Whether the expert, without rank `off` and with rank `on` (-1: none), has more replicas on a node than allowed.

    Allowed is an even spread over nodes, rounded up.
    """
    if limits.num_nodes == 1:
        return False
    on_node_H = np.zeros(limits.num_nodes, np.int64)
    num = 0
    for p in index.by_expert_P[index.first_E[expert] : index.first_E[expert + 1]]:
        if index.ranks_P[p] != off:
            on_node_H[limits.nodes_R[index.ranks_P[p]]] += 1
            num += 1
    if on >= 0:
        on_node_H[limits.nodes_R[on]] += 1
        num += 1
    allowed = -(-num // limits.num_nodes)
    for number in on_node_H:  # noqa: SIM110 - numba compiles no generator
        if number > allowed:
            return True
    return False


@compiled_part
def _change(changes: Changes, x: int, expert: int, off: int, on: int) -> None:
    changes.experts_X[x], changes.off_X[x], changes.on_X[x] = expert, off, on


@compiled_part
def removal(expert: int, rank: int) -> Changes:
    """The change in which the expert leaves the rank."""
    return Changes(np.full(1, expert), np.full(1, rank), np.full(1, -1))


@compiled_part
def moved_bytes(limits: LayerLimits, changes: Changes) -> int:
    """Bytes that have to be moved in addition; negative if the changes save moves."""
    more = 0
    for x in range(len(changes.experts_X)):
        expert, off, on = changes.experts_X[x], changes.off_X[x], changes.on_X[x]
        if on >= 0 and not limits.present_ER[expert, on]:
            more += limits.bytes_E[expert]
        if off >= 0 and not limits.present_ER[expert, off]:
            more -= limits.bytes_E[expert]
    return more
