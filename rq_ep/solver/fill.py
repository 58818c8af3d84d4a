"""What to do with the bytes that homes leave: replicas by gain per byte, over all layers at once; then more bits."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.layer import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.moves import Limits
from rq_ep.solver.precision import Formats

LEAST_GAIN = 1e-6  # of max/mean: below it a replica is not worth its bytes
SETTLE_EVERY = 8  # replicas added to a layer between two exact splits of its steps


def fill(layers: Sequence[LayerSplit], limits: Sequence[Limits], is_over: Callable[[], bool]) -> None:
    """Add replicas to `layers`, the largest gain per byte first, while they fit.

    Args:
        layers: left with exact splits.
        limits: of each layer; they share `free_R` and `room`, which are kept current.
        is_over: whether the time is.
    """

    def next_of(at: int) -> tuple[float, int, int, int]:
        if layers[at].value <= GOOD_ENOUGH:
            return 0.0, at, -1, -1
        gain, expert, rank = layers[at].best_addition(limits[at])
        return -gain, at, expert, rank

    num_added = [0] * len(layers)
    queue = [next_of(at) for at in range(len(layers))]
    heapify(queue)
    while queue and not is_over():
        gain, at, expert, rank = heappop(queue)
        within = limits[at]
        size = int(within.bytes_E[expert])
        if expert < 0 or -gain * size <= LEAST_GAIN:
            continue
        moved = 0 if within.present_ER[expert, rank] else size
        if within.free_R[rank] >= size and within.room[0] >= moved:
            layers[at].add(expert, rank)
            within.free_R[rank] -= size
            within.room[0] -= moved
            num_added[at] += 1
            if num_added[at] % SETTLE_EVERY == 0:
                layers[at].settle()
        heappush(queue, next_of(at))
    for layer in layers:
        layer.settle()


def promote(
    held_LER: npt.NDArray[np.bool_],
    low_LE: npt.NDArray[np.bool_],
    damage_LE: FloatArray,
    formats: Formats,
    free_R: IntArray,
) -> None:
    """Give bytes that are left to the low experts missed most: all replicas of one turn native, or none."""
    more = formats.native_bytes - formats.low_bytes
    by_damage = np.argsort(-damage_LE, axis=None, kind="stable")
    for at, expert in zip(*(axis.tolist() for axis in np.unravel_index(by_damage, damage_LE.shape)), strict=True):
        held_R = held_LER[at, expert]
        if low_LE[at, expert] and (free_R[held_R] >= more).all():
            low_LE[at, expert] = False
            free_R[held_R] -= more
