"""What to do with the bytes that homes leave: replicas by gain per byte, over all layers at once; then more bits."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, Addition, LayerSplit
from rq_ep.solver.search.neighborhood import Limits

LEAST_GAIN = 1e-6  # of max/mean: below it a replica is not worth its bytes
SETTLE_EVERY = 8  # additions to a layer between two exact splits of its steps


def fill(layers: Sequence[LayerSplit], limits: Sequence[Limits], is_over: Callable[[], bool]) -> None:
    """Add replicas to `layers`, the largest gain per byte first, while they fit; some at a time where ranks are many.

    Args:
        layers: left with exact splits.
        limits: of each layer; they share `free_R` and `room`, which are kept current.
        is_over: whether the time is.
    """

    def next_of(at: int) -> tuple[float, int, list[Addition]]:
        found = layers[at].best_additions(limits[at]) if layers[at].value > GOOD_ENOUGH else []
        return -found[0].gain if found else 0.0, at, found

    num_added = [0] * len(layers)
    queue = [next_of(at) for at in range(len(layers))]
    heapify(queue)
    while queue and not is_over():
        _, at, wanted = heappop(queue)
        within = limits[at]
        fitting = []
        for one in wanted:
            size = int(within.bytes_E[one.expert])
            moved = 0 if within.present_ER[one.expert, one.rank] else size
            if one.gain * size > LEAST_GAIN and within.free_R[one.rank] >= size and within.room[0] >= moved:
                within.free_R[one.rank] -= size
                within.room[0] -= moved
                fitting.append(one)
        if fitting:
            layers[at].add(fitting)
            num_added[at] += 1
            if num_added[at] % SETTLE_EVERY == 0:
                layers[at].settle()
        if fitting or any(one.gain * within.bytes_E[one.expert] > LEAST_GAIN for one in wanted):
            heappush(queue, next_of(at))
    for layer in layers:
        layer.settle()


def promoted(
    held_LER: BoolArray, low_LE: BoolArray, damage_LE: FloatArray, formats: Formats, free_R: IntArray
) -> BoolArray:
    """[L, E] low experts when those missed most got the bytes that are left: all replicas of one, or none."""
    low_LE, free_R = low_LE.copy(), free_R.copy()
    more = formats.native_bytes - formats.low_bytes
    by_damage = np.argsort(-damage_LE, axis=None, kind="stable")
    for at, expert in zip(*(axis.tolist() for axis in np.unravel_index(by_damage, damage_LE.shape)), strict=True):
        held_R = held_LER[at, expert]
        if low_LE[at, expert] and (free_R[held_R] >= more).all():
            low_LE[at, expert] = False
            free_R[held_R] -= more
    return low_LE
