"""Local search in one layer: replicas change ranks, or give way to others, where that relieves the fullest ranks.

A move is priced by the listed cuts first, which refuses most in microseconds; what they let through is split, step by
step from the hardest, until it is proven no better. A cut found that way is listed and refuses more of its kind.
"""

from collections.abc import Callable

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.compiled import compiled
from rq_ep.solver.search.cuts import (
    MAX_RANKS_ENUMERATED,
    Cuts,
    change,
    find_tops,
    forget_cuts,
    list_cut,
    price,
    starting_cuts,
)
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.search.max_flow import CLOSE, Index, index_of, pour, settle
from rq_ep.solver.search.neighborhood import NUM_DRAWS, Limits, by_expert, moved_bytes, propose

LEAST_STEP = 1e-5  # of max/mean, mean over steps, that a move must gain
MOVES_AT_ONCE = 1000  # between two looks at the clock
TAIL = 0.1  # the share of steps that the tail is the mean of


def improve(
    layer: LayerSplit,
    limits: Limits,
    tail_weight: float,
    num_moves: int,
    generator: np.random.Generator,
    is_over: Callable[[], bool],
) -> LayerSplit:
    """Try moves, and keep those that pay.

    Args:
        layer: used up.
        limits: what may be, and what is left; kept current.
        tail_weight: of the worst tenth of the steps in what is lowered; the rest is the mean.
        is_over: whether the time is.
    """
    num_ranks = layer.loads_SR.shape[1]
    if not len(layer.values_S) or num_ranks == 1:
        return layer
    cuts_SR = layer.settle()
    cuts = starting_cuts(layer.index, layer.loads_SE, num_ranks, cuts_SR)
    while num_moves > 0 and not is_over() and objective(layer.values_S, tail_weight) > GOOD_ENOUGH:
        draws_ND = generator.random((min(num_moves, MOVES_AT_ONCE), NUM_DRAWS))
        _search(
            layer.index, cuts, layer.loads_SE, layer.quotas_SP, layer.loads_SR, layer.values_S, limits, draws_ND,
            tail_weight,
        )  # fmt: skip
        num_moves -= len(draws_ND)
    # With all sets listed nothing was split, and sums of changes carry rounding errors.
    return LayerSplit.of(layer.loads_SE, layer.held_ER)


@compiled
def objective(values_S: FloatArray, tail_weight: float) -> float:
    """(1 - w) * mean + w * mean of the worst tenth of the steps."""
    mean = float(values_S.mean())
    if tail_weight == 0:
        return mean
    num_worst = max(int(TAIL * len(values_S)), 1)
    worst = float(np.sort(values_S)[len(values_S) - num_worst :].mean())
    return (1 - tail_weight) * mean + tail_weight * worst


@compiled
def _search(
    index: Index,
    cuts: Cuts,
    loads_SE: FloatArray,
    quotas_SP: FloatArray,
    loads_SR: FloatArray,
    values_S: FloatArray,
    limits: Limits,
    draws_ND: FloatArray,
    tail_weight: float,
) -> None:
    num_ranks, num_experts = loads_SR.shape[1], loads_SE.shape[1]
    held_ER = np.zeros((num_experts, num_ranks), np.bool_)
    for p in range(len(index.ranks_P)):
        held_ER[index.experts_P[p], index.ranks_P[p]] = True
    best = objective(values_S, tail_weight)
    priced_S = np.empty_like(values_S)
    slots_N, to_experts_N, to_ranks_N = np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3, np.int64)
    new_quotas_SP, new_loads_SR = quotas_SP.copy(), loads_SR.copy()
    for draws_D in draws_ND:
        if best <= GOOD_ENOUGH:
            break
        num = propose(index, cuts, loads_SE, held_ER, limits, draws_D, slots_N, to_experts_N, to_ranks_N)
        if num == 0:
            continue
        experts_N, off_N, on_N = by_expert(index, slots_N[:num], to_experts_N[:num], to_ranks_N[:num])
        moved = moved_bytes(limits, experts_N, off_N, on_N)
        if moved > limits.room[0]:
            continue
        goal = best - LEAST_STEP - limits.price * moved
        price(cuts, loads_SE, experts_N, off_N, on_N, priced_S)
        if objective(priced_S, tail_weight) >= goal:
            continue
        experts_P, ranks_P = index.experts_P.copy(), index.ranks_P.copy()
        experts_P[slots_N[:num]], ranks_P[slots_N[:num]] = to_experts_N[:num], to_ranks_N[:num]
        new = index_of(experts_P, ranks_P, num_experts, num_ranks)
        if num_ranks > MAX_RANKS_ENUMERATED and not _split_again(
            index, new, cuts, loads_SE, quotas_SP, loads_SR, new_quotas_SP, new_loads_SR,
            slots_N[:num], experts_N, priced_S, tail_weight, goal,
        ):  # fmt: skip
            continue
        best = objective(priced_S, tail_weight)
        limits.room[0] -= moved
        for n in range(num):
            expert, rank = index.experts_P[slots_N[n]], index.ranks_P[slots_N[n]]
            held_ER[expert, rank] = False
            limits.free_R[rank] += limits.bytes_E[expert]
        for n in range(num):
            held_ER[to_experts_N[n], to_ranks_N[n]] = True
            limits.free_R[to_ranks_N[n]] -= limits.bytes_E[to_experts_N[n]]
        index.experts_P[:], index.ranks_P[:] = new.experts_P, new.ranks_P
        index.by_expert_P[:], index.first_E[:] = new.by_expert_P, new.first_E
        index.by_rank_P[:], index.first_R[:] = new.by_rank_P, new.first_R
        quotas_SP[:], loads_SR[:], values_S[:] = new_quotas_SP, new_loads_SR, priced_S
        change(cuts, loads_SE, experts_N, off_N, on_N)


@compiled
def _split_again(
    index: Index,
    new: Index,
    cuts: Cuts,
    loads_SE: FloatArray,
    quotas_SP: FloatArray,
    loads_SR: FloatArray,
    new_quotas_SP: FloatArray,
    new_loads_SR: FloatArray,
    slots_N: IntArray,
    experts_N: IntArray,
    values_S: FloatArray,
    tail_weight: float,
    goal: float,
) -> bool:
    """Split every step for the replicas `new`, from the split for `index`; False as soon as it is not worth it.

    Args:
        values_S: lower bounds; becomes what the steps attain.
        goal: the objective to fall below.
    """
    order_N = np.empty(loads_SR.shape[1], np.int64)
    cut_R = np.empty(loads_SR.shape[1], np.bool_)
    for step in np.argsort(-values_S, kind="mergesort"):
        quotas_P, loads_R = new_quotas_SP[step], new_loads_SR[step]
        quotas_P[:], loads_R[:] = quotas_SP[step], loads_SR[step]
        for slot in slots_N:
            loads_R[index.ranks_P[slot]] -= quotas_P[slot]
            quotas_P[slot] = 0.0
        for expert in experts_N:
            pour(new, expert, loads_SE[step, expert], quotas_P, loads_R, order_N)
        value = settle(new, quotas_P, loads_R, values_S[step], cut_R)
        is_new = value > values_S[step] + 10 * CLOSE
        values_S[step] = value
        if is_new:
            if cuts.num[0] == len(cuts.sizes_G):
                forget_cuts(cuts, loads_SR.shape[1])
            list_cut(cuts, index, loads_SE, cut_R)
            if objective(values_S, tail_weight) >= goal:
                find_tops(cuts)
                return False
    find_tops(cuts)
    return objective(values_S, tail_weight) < goal
