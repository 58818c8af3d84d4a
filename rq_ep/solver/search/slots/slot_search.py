"""A local search over slots that split an expert's pairs evenly: it lowers what a step waits for, its fullest rank.

Replicas change ranks, or give way to those of another expert; experts that are busy in the same steps thus part. A move
takes the best of one rank's slots if it improves. Simulated annealing was tried and was no better at equal time.

Axes: J slots of a rank; A attempted moves.
"""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled_beside, compiled_part
from rq_ep.solver.objective.calibration_steps import LayerSteps

LEAST_GAIN = 1e-6  # of the mean of max/mean: smaller gains are rounding errors


def improve_slots(
    steps: LayerSteps,
    slots_RJ: IntArray,
    allowed_ER: BoolArray,
    draws_A3: FloatArray,
    price_ER: FloatArray | None = None,
) -> IntArray:
    """[R, J] the expert in each slot after a search from `slots_RJ`, in which no rank holds an expert twice.

    Args:
        steps: what the layer is balanced for.
        slots_RJ: the initial placement.
        allowed_ER: the ranks that each expert may be moved to.
        draws_A3: numbers in [0, 1) for each move attempted.
        price_ER: by how much an expert on a rank must lower the mean of max/mean; 0 where it is already; default: 0.
    """
    if not len(steps.counts_SE):
        return slots_RJ
    num_experts, num_ranks = allowed_ER.shape
    held_ER = held_experts(slots_RJ, num_experts)
    assert held_ER.sum() == slots_RJ.size, "a rank holds an expert twice"
    copies_E = held_ER.sum(axis=1)
    loads_ES = np.ascontiguousarray(steps.loads_SE.T)
    shares_ES = loads_ES / copies_E[:, None]
    state = _SlotState(
        loads_ES=loads_ES,
        shares_ES=shares_ES,
        loads_SR=np.ascontiguousarray(shares_ES[slots_RJ].sum(axis=1).T),  # in one order everywhere, unlike BLAS
        slots_RJ=slots_RJ.copy(),
        held_ER=held_ER,
        copies_E=copies_E,
        fullest_S3=np.zeros((len(steps.counts_SE), 3), np.int64),
        price_ER=np.zeros((num_experts, num_ranks)) if price_ER is None else price_ER * len(steps.counts_SE),
    )
    _search(state, allowed_ER, draws_A3)
    return state.slots_RJ


def held_experts(slots_RJ: IntArray, num_experts: int) -> BoolArray:
    """[E, R] which rank holds which expert."""
    held_ER = np.zeros((num_experts, len(slots_RJ)), bool)
    held_ER[slots_RJ, np.arange(len(slots_RJ))[:, None]] = True
    return held_ER


def even_imbalance(steps: LayerSteps, slots_RJ: IntArray) -> float:
    """max/mean of pairs over ranks, mean over steps, where an expert's slots share its pairs evenly."""
    if not len(steps.counts_SE):
        return 1.0
    num_ranks, num_slots = slots_RJ.shape
    copies_E = np.bincount(slots_RJ.ravel(), minlength=steps.counts_SE.shape[1])
    loads_SRJ = (steps.loads_SE / np.maximum(copies_E, 1))[:, slots_RJ.ravel()].reshape(-1, num_ranks, num_slots)
    return float(loads_SRJ.sum(axis=2).max(axis=1).mean())


class _SlotState(NamedTuple):
    """A layer in search. Loads are in units of the step's mean rank load."""

    loads_ES: FloatArray
    shares_ES: FloatArray  # of each slot of an expert
    loads_SR: FloatArray
    slots_RJ: IntArray
    held_ER: BoolArray
    copies_E: IntArray
    fullest_S3: IntArray  # the three fullest ranks; a swap of two ranks leaves one of them alone
    price_ER: FloatArray  # of an expert on a rank, in the unit of the sum over steps


@compiled_beside
def _search(state: _SlotState, allowed_ER: BoolArray, draws_A3: FloatArray) -> None:
    """Attempt moves: for a heavy expert on the fullest rank of some step, the best exchange with a slot elsewhere."""
    num_steps, num_ranks = state.loads_SR.shape
    total = _rank_by_load(state)
    for a in range(len(draws_A3)):
        step = _draw_step(state, draws_A3[a, 0] * (total - num_steps))
        source = state.fullest_S3[step, 0]
        j = _draw_slot(state, step, source, draws_A3[a, 1] * state.loads_SR[step, source])
        expert = state.slots_RJ[source, j]
        target = int(draws_A3[a, 2] * num_ranks)
        if state.held_ER[expert, target] or not allowed_ER[expert, target]:
            continue
        best, best_j, is_swap = total - LEAST_GAIN * num_steps, -1, False
        for other_j in range(state.slots_RJ.shape[1]):
            other = state.slots_RJ[target, other_j]
            price = state.price_ER[expert, target] - state.price_ER[other, target]
            if not state.held_ER[other, source] and allowed_ER[other, source]:
                price_both = price + state.price_ER[other, source] - state.price_ER[expert, source]
                value = _total_swapped(state, expert, source, other, target, best - price_both)
                if value < best - price_both:
                    best, best_j, is_swap = value + price_both, other_j, True
            if state.copies_E[other] > 1:
                value = _total_replaced(state, expert, other, target, best - price)
                if value < best - price:
                    best, best_j, is_swap = value + price, other_j, False
        if best_j < 0:
            continue
        other = state.slots_RJ[target, best_j]
        state.slots_RJ[target, best_j] = expert
        if is_swap:
            state.slots_RJ[source, j] = other
            _drop(state, expert, source)
            _drop(state, other, target)
            _hold(state, expert, target)
            _hold(state, other, source)
        else:
            _drop(state, other, target)
            _hold(state, expert, target)
        total = _rank_by_load(state)


@compiled_part
def _rank_by_load(state: _SlotState) -> float:
    """Find the three fullest ranks of every step; the sum over steps of the fullest one's load."""
    num_steps, num_ranks = state.loads_SR.shape
    total = 0.0
    for step in range(num_steps):
        first, second, third = -1, -1, -1
        for rank in range(num_ranks):
            load = state.loads_SR[step, rank]
            if first < 0 or load > state.loads_SR[step, first]:
                first, second, third = rank, first, second
            elif second < 0 or load > state.loads_SR[step, second]:
                second, third = rank, second
            elif third < 0 or load > state.loads_SR[step, third]:
                third = rank
        state.fullest_S3[step, 0], state.fullest_S3[step, 1], state.fullest_S3[step, 2] = first, second, third
        total += state.loads_SR[step, first]
    return total


@compiled_part
def _draw_step(state: _SlotState, threshold: float) -> int:
    """The step at which the running sum of what the fullest ranks carry above the mean exceeds `threshold`."""
    num_steps = len(state.fullest_S3)
    running = 0.0
    for step in range(num_steps):
        running += state.loads_SR[step, state.fullest_S3[step, 0]] - 1
        if running > threshold:
            return step
    return num_steps - 1


@compiled_part
def _draw_slot(state: _SlotState, step: int, rank: int, threshold: float) -> int:
    """The slot of `rank` at which the running sum of its slots' loads in this step exceeds `threshold`."""
    num_slots = len(state.slots_RJ[rank])
    running = 0.0
    for j in range(num_slots):
        running += state.shares_ES[state.slots_RJ[rank, j], step]
        if running > threshold:
            return j
    return num_slots - 1


@compiled_part
def _total_swapped(state: _SlotState, one: int, one_rank: int, two: int, two_rank: int, limit: float) -> float:
    """Sum of the fullest ranks' loads if two slots changed places; `limit` if it would be at least that."""
    num_steps = len(state.loads_SR)
    total = 0.0
    for step in range(num_steps):
        more = state.shares_ES[two, step] - state.shares_ES[one, step]
        fullest = max(state.loads_SR[step, one_rank] + more, state.loads_SR[step, two_rank] - more)
        for position in range(min(3, state.loads_SR.shape[1])):
            rank = state.fullest_S3[step, position]
            if rank != one_rank and rank != two_rank:
                fullest = max(fullest, state.loads_SR[step, rank])
                break
        total += fullest
        if total + (num_steps - 1 - step) >= limit:  # no step can be below its mean, 1
            return limit
    return total


@compiled_part
def _total_replaced(state: _SlotState, new: int, old: int, rank: int, limit: float) -> float:
    """Sum of the fullest ranks' loads if a slot of `old` on `rank` went to `new`; `limit` if at least that."""
    num_steps, num_ranks = state.loads_SR.shape
    total = 0.0
    for step in range(num_steps):
        new_share = state.loads_ES[new, step] / (state.copies_E[new] + 1)
        old_share = state.loads_ES[old, step] / (state.copies_E[old] - 1)
        new_less = state.shares_ES[new, step] - new_share
        old_more = old_share - state.shares_ES[old, step]
        fullest = state.loads_SR[step, rank] - state.shares_ES[old, step] + new_share
        for other in range(num_ranks):
            if other != rank:
                load = state.loads_SR[step, other]
                if state.held_ER[new, other]:
                    load -= new_less
                if state.held_ER[old, other]:
                    load += old_more
                fullest = max(fullest, load)
        total += fullest
        if total + (num_steps - 1 - step) >= limit:
            return limit
    return total


@compiled_part
def _drop(state: _SlotState, expert: int, rank: int) -> None:
    """Take a replica away; with the last one its load goes nowhere until another is held."""
    for step in range(len(state.loads_SR)):
        state.loads_SR[step, rank] -= state.shares_ES[expert, step]
    state.held_ER[expert, rank] = False
    _share(state, expert, state.copies_E[expert] - 1)


@compiled_part
def _hold(state: _SlotState, expert: int, rank: int) -> None:
    """Add a replica."""
    _share(state, expert, state.copies_E[expert] + 1)
    state.held_ER[expert, rank] = True
    for step in range(len(state.loads_SR)):
        state.loads_SR[step, rank] += state.shares_ES[expert, step]


@compiled_part
def _share(state: _SlotState, expert: int, copies: int) -> None:
    """Spread an expert's load evenly over `copies` replicas, on the ranks that hold it now."""
    num_steps, num_ranks = state.loads_SR.shape
    state.copies_E[expert] = copies
    for step in range(num_steps):
        share = state.loads_ES[expert, step] / max(copies, 1)
        for rank in range(num_ranks):
            if state.held_ER[expert, rank]:
                state.loads_SR[step, rank] += share - state.shares_ES[expert, step]
        state.shares_ES[expert, step] = share
