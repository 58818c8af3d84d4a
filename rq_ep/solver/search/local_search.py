"""Local search in one layer: replicas change ranks, or give way to others, where that relieves the fullest ranks.

The listed cuts price a move first and refuse most moves in microseconds. What they let through is split, step by
step from that of the largest gain, until it is proven no better or the first steps have kept too little of the gain
that the cuts promised. A cut found by a split is listed, and refuses more of its kind.

Axes: P replicas in any order; A attempted moves; U random numbers of each; X experts whose replicas a move changes.
"""

from collections.abc import Callable

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled, compiled_beside, compiled_part
from rq_ep.solver.search.cuts import (
    MAX_RANKS_ENUMERATED,
    Changes,
    Cuts,
    add_cut,
    apply_changes,
    drop_cuts,
    initial_cuts,
    price_changes,
    raise_values,
)
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.search.max_flow import TOLERANCE, Splits, augment, index_replicas, water_fill
from rq_ep.solver.search.neighborhood import (
    NUM_DRAWS,
    LayerLimits,
    may_leave,
    moved_bytes,
    propose,
    removal,
)
from rq_ep.solver.split.augmenting_paths import Loads, ReplicaIndex, rank_search
from rq_ep.solver.split.heaviest_first import heaviest_first

LEAST_GAIN = 1e-5  # of the objective, that a move must gain
LEAST_SPLIT = 3  # steps that are split before the others are expected to disappoint as much
MOVES_AT_ONCE = 1000  # between two looks at the clock
TAIL = 0.1  # share of the steps that are the tail


def improve(
    layer: LayerSplit,
    limits: LayerLimits,
    tail_weight: float,
    num_moves: int,
    generator: np.random.Generator,
    is_over: Callable[[], bool],
) -> LayerSplit:
    """Attempt random moves, and keep those that improve the objective (first improvement).

    Where moving has a price, replicas that were moved and do not pay it are dropped in the end.

    Args:
        layer: where the search begins; not to be used afterwards.
        limits: where replicas may be, and the bytes left; kept current.
        tail_weight: weight of the tail in the objective, `tail_weighted_mean`.
        num_moves: moves to attempt.
        generator: of the moves.
        is_over: whether the time is over.
    """
    num_ranks = layer.loads_SR.shape[1]
    if not len(layer.values_S) or num_ranks == 1:
        return layer
    cuts_SR = layer.optimize()
    cuts = initial_cuts(layer.index, layer.loads_SE, num_ranks, cuts_SR)
    while num_moves > 0 and not is_over() and tail_weighted_mean(layer.values_S, tail_weight) > GOOD_ENOUGH:
        draws_AU = generator.random((min(num_moves, MOVES_AT_ONCE), NUM_DRAWS))
        layer = LayerSplit(*_search(layer.splits, layer.held_ER, cuts, limits, draws_AU, tail_weight))
        num_moves -= len(draws_AU)
    if num_ranks <= MAX_RANKS_ENUMERATED:  # nothing was split
        layer = LayerSplit.of(layer.loads_SE, layer.held_ER)
    return layer if limits.price == 0 else _without_dear(layer, cuts, limits, tail_weight)


def _without_dear(layer: LayerSplit, cuts: Cuts, limits: LayerLimits, tail_weight: float) -> LayerSplit:
    """The layer without replicas that have to be moved and relieve less than their bytes cost."""
    before = tail_weighted_mean(layer.values_S, tail_weight)
    dear_P = _dear(layer.splits, cuts, limits, tail_weight)
    while len(dear_P):
        experts_P, ranks_P = layer.index.experts_P[dear_P], layer.index.ranks_P[dear_P]
        without = layer.without(dear_P)
        bytes_R = np.bincount(ranks_P, limits.bytes_E[experts_P], len(limits.free_R)).astype(np.int64)
        if tail_weighted_mean(without.values_S, tail_weight) < before + limits.price * bytes_R.sum():
            limits.free_R[:] += bytes_R
            limits.move_budget[0] += bytes_R.sum()
            return without
        dear_P = dear_P[: len(dear_P) // 2]  # the listed cuts have promised too much
    return layer


@compiled_beside
def _dear(splits: Splits, cuts: Cuts, limits: LayerLimits, tail_weight: float) -> IntArray:
    """Replicas to drop, one of an expert at most, the lightest experts first; `cuts` is brought up to date."""
    index, loads_SE = splits.replicas, splits.loads_SE
    best, values_S = tail_weighted_mean(cuts.tops_S, tail_weight), np.empty(len(cuts.tops_S))
    dear_P, num, lightness_E = np.empty(len(index.ranks_P), np.int64), 0, np.zeros(loads_SE.shape[1])
    for loads_E in loads_SE:
        for expert in range(len(loads_E)):
            lightness_E[expert] -= loads_E[expert]
    for expert in heaviest_first(lightness_E):
        first, end = index.first_E[expert], index.first_E[expert + 1]
        for p in index.by_expert_P[first:end]:
            rank = index.ranks_P[p]
            if limits.present_ER[expert, rank] or not may_leave(index, limits, expert, rank):
                continue
            drop = removal(expert, rank)
            goal = best + limits.price * limits.bytes_E[expert] - LEAST_GAIN
            if price_changes(cuts, drop, values_S, goal) and tail_weighted_mean(values_S, tail_weight) < goal:
                best = tail_weighted_mean(values_S, tail_weight)
                apply_changes(cuts, drop)
                dear_P[num] = p
                num += 1
                break
    return dear_P[:num]


@compiled
def tail_weighted_mean(values_S: FloatArray, tail_weight: float) -> float:
    """(1 - w) * mean + w * CVaR: the mean of the worst tenth of the steps (conditional value at risk)."""
    total, worst = 0.0, 0.0
    for value in values_S:
        total += value
    mean = total / len(values_S)
    if tail_weight == 0:
        return mean
    num_worst = max(int(TAIL * len(values_S)), 1)
    order_S = heaviest_first(values_S)
    for position in range(num_worst - 1, -1, -1):
        worst += values_S[order_S[position]]
    return (1 - tail_weight) * mean + tail_weight * (worst / num_worst)


@compiled_beside
def _search(
    splits: Splits, held_ER: BoolArray, cuts: Cuts, limits: LayerLimits, draws_AU: FloatArray, tail_weight: float
) -> Splits:
    """Attempt a move for every row of random numbers; all but `splits`, which becomes work space, is kept current."""
    loads_SE, (num_steps, num_ranks) = splits.loads_SE, splits.loads_SR.shape
    best = tail_weighted_mean(splits.values_S, tail_weight)
    new_quotas_SP, new_loads_SR = splits.quotas_SP.copy(), splits.loads_SR.copy()
    new_values_S = np.empty(num_steps)
    proposal = Changes(np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3, np.int64))
    for draws_U in draws_AU:
        if best <= GOOD_ENOUGH:
            break
        num = propose(splits.replicas, cuts, loads_SE, splits.loads_SR, held_ER, limits, draws_U, proposal)
        if num == 0:
            continue
        changes = Changes(proposal.experts_X[:num], proposal.off_X[:num], proposal.on_X[:num])
        moved = moved_bytes(limits, changes)
        if moved > limits.move_budget[0]:
            continue
        goal = best - LEAST_GAIN - limits.price * moved
        if not price_changes(cuts, changes, new_values_S, goal):
            continue
        if tail_weighted_mean(new_values_S, tail_weight) >= goal:
            continue
        index = _changed_index(splits.replicas, changes, num_ranks)
        if len(index.ranks_P) != new_quotas_SP.shape[1]:
            new_quotas_SP = np.empty((num_steps, len(index.ranks_P)))
        new = Splits(index, loads_SE, new_quotas_SP, new_loads_SR, new_values_S)
        if num_ranks > MAX_RANKS_ENUMERATED and not _split_again(splits, new, cuts, changes, tail_weight, goal):
            continue
        best = tail_weighted_mean(new_values_S, tail_weight)
        limits.move_budget[0] -= moved
        _move_replicas(changes, held_ER, limits)
        apply_changes(cuts, changes)
        splits, new_quotas_SP, new_loads_SR, new_values_S = new, splits.quotas_SP, splits.loads_SR, splits.values_S
    return splits


@compiled_part
def _changed_index(index: ReplicaIndex, changes: Changes, num_ranks: int) -> ReplicaIndex:
    """The index of the replicas after the changes: one that comes takes the number of one that left, or the next."""
    more = 0
    for x in range(len(changes.experts_X)):
        more += (1 if changes.on_X[x] >= 0 else 0) - (1 if changes.off_X[x] >= 0 else 0)
    number = len(index.ranks_P)
    experts_P, ranks_P = np.empty(number + more, np.int64), np.empty(number + more, np.int64)
    _copy(index.experts_P, experts_P)
    _copy(index.ranks_P, ranks_P)
    for x in range(len(changes.experts_X)):
        expert, off, on = changes.experts_X[x], changes.off_X[x], changes.on_X[x]
        if off >= 0:
            number = _number_of(index, expert, off)
        if on >= 0:
            experts_P[number], ranks_P[number] = expert, on
    return index_replicas(experts_P, ranks_P, len(index.first_E) - 1, num_ranks)


@compiled_part
def _number_of(index: ReplicaIndex, expert: int, rank: int) -> int:
    """The number of the expert's replica on the rank, which holds one."""
    at = index.first_E[expert]
    while index.ranks_P[index.by_expert_P[at]] != rank:
        at += 1
    return int(index.by_expert_P[at])


@compiled_part
def _move_replicas(changes: Changes, held_ER: BoolArray, limits: LayerLimits) -> None:
    """Bring `held_ER` and the free bytes up to date with the changes."""
    for x in range(len(changes.experts_X)):
        expert, off, on = changes.experts_X[x], changes.off_X[x], changes.on_X[x]
        if off >= 0:
            held_ER[expert, off] = False
            limits.free_R[off] += limits.bytes_E[expert]
        if on >= 0:
            held_ER[expert, on] = True
            limits.free_R[on] -= limits.bytes_E[expert]


@compiled_part
def _copy(values_X: Loads, to_X: Loads) -> None:
    for x in range(len(values_X)):
        to_X[x] = values_X[x]


@compiled_part
def _split_again(old: Splits, new: Splits, cuts: Cuts, changes: Changes, tail_weight: float, goal: float) -> bool:
    """Split every step anew after a move, beginning from the old split; False as soon as it seems not worth it.

    Steps come in the order of the gain that the cuts promise. Most moves that the cuts let through are bad ones, and
    their first steps show it: the others are expected to keep the same share of their gain.

    Args:
        old: the replicas and the split before the move.
        new: the replicas after it; its quotas and loads are overwritten. Its values are lower bounds at first, and
            become what the steps attain.
        cuts: new ones are added.
        changes: the move.
        tail_weight: of the objective.
        goal: the objective to fall below.
    """
    values_S = new.values_S
    by_load_R = np.empty(new.loads_SR.shape[1], np.int64)
    cut_R, search = np.empty(new.loads_SR.shape[1], np.bool_), rank_search(new.loads_SR.shape[1], new.loads_SE.shape[1])
    promised_S, is_split_S = np.empty(len(values_S)), np.zeros(len(values_S), np.bool_)
    for step in range(len(values_S)):
        promised_S[step] = old.values_S[step] - values_S[step]
    promised, kept = 0.0, 0.0
    for num_split in range(len(values_S)):
        step = -1
        for other in range(len(values_S)):
            if not is_split_S[other] and (step < 0 or promised_S[other] > promised_S[step]):
                step = other
        is_split_S[step] = True
        is_touched = False
        for expert in changes.experts_X:
            is_touched |= new.loads_SE[step, expert] > 0
        quotas_P, loads_R = new.quotas_SP[step], new.loads_SR[step]
        quotas_P[len(old.replicas.ranks_P) :] = 0.0
        _copy(old.quotas_SP[step], quotas_P)
        _copy(old.loads_SR[step], loads_R)
        if not is_touched:
            values_S[step] = old.values_S[step]
            continue
        for x in range(len(changes.experts_X)):
            if changes.off_X[x] >= 0:
                replica = _number_of(old.replicas, changes.experts_X[x], changes.off_X[x])
                loads_R[changes.off_X[x]] -= quotas_P[replica]
                quotas_P[replica] = 0.0
        for expert in changes.experts_X:
            water_fill(new.replicas, expert, new.loads_SE[step, expert], quotas_P, loads_R, by_load_R)
        value = augment(new.replicas, quotas_P, loads_R, values_S[step], cut_R, search)
        is_new_cut = value > values_S[step] + 10 * TOLERANCE
        values_S[step] = value
        promised += promised_S[step]
        kept += old.values_S[step] - value
        if is_new_cut:
            if cuts.num[0] == len(cuts.sizes_G):
                drop_cuts(cuts, len(loads_R))
            add_cut(cuts, old.replicas, cut_R)
            raise_values(cuts, changes, cuts.num[0] - 1, values_S)
            share = min(max(kept, 0.0) / promised, 1.0) if num_split + 1 >= LEAST_SPLIT and promised > 0 else 1.0
            if tail_weighted_mean(_expected(old.values_S, values_S, is_split_S, share), tail_weight) >= goal:
                return False
    return tail_weighted_mean(values_S, tail_weight) < goal


@compiled_part
def _expected(before_S: FloatArray, promised_S: FloatArray, is_split_S: BoolArray, share: float) -> FloatArray:
    """The values to expect if of what is promised for the steps that are not split yet only a share comes true."""
    expected_S = promised_S.copy()
    for step in range(len(expected_S)):
        if not is_split_S[step] and promised_S[step] < before_S[step]:
            expected_S[step] = before_S[step] - share * (before_S[step] - promised_S[step])
    return expected_S
