"""Greedy use of the bytes that first replicas leave: replicas by gain per byte over all layers, then more bits."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import combinations

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, Addition, LayerSplit
from rq_ep.solver.search.neighborhood import LayerLimits

LEAST_GAIN = 1e-6  # of max/mean: below it a replica is not worth its bytes
OPTIMIZE_EVERY = 8  # additions to a layer between two exact splits of its steps


def add_replicas(
    layers: Sequence[LayerSplit], limits: Sequence[LayerLimits], is_over: Callable[[], bool], at_once: int = 1
) -> None:
    """Add replicas to `layers`, the largest gain per byte first, while they fit; several at a time for many ranks.

    Args:
        layers: left with exact splits.
        limits: of each layer; they share `free_R` and `move_budget`, which are kept current.
        is_over: whether the time is over.
        at_once: how many are added to a layer before their gains are computed anew.
    """

    def next_additions(i: int) -> tuple[float, int, list[Addition]]:
        additions = layers[i].best_additions(limits[i], at_once) if layers[i].value > GOOD_ENOUGH else []
        return -additions[0].gain if additions else 0.0, i, additions

    num_added = [0] * len(layers)
    queue = [next_additions(i) for i in range(len(layers))]
    heapify(queue)
    while queue and not is_over():
        _, i, additions = heappop(queue)
        worthwhile = [one for one in additions if one.gain * limits[i].bytes_E[one.expert] > LEAST_GAIN]
        fitting = [one for one in worthwhile if _takes(limits[i], one)]
        if fitting:
            layers[i].add(fitting)
            num_added[i] += 1
            if num_added[i] % OPTIMIZE_EVERY == 0:
                layers[i].optimize()
        if worthwhile:
            heappush(queue, next_additions(i))
    for layer in layers:
        layer.optimize()


def _takes(limits: LayerLimits, addition: Addition) -> bool:
    """Take the bytes of a new replica off the limits; False if these have too few."""
    size = int(limits.bytes_E[addition.expert])
    moved = 0 if limits.present_ER[addition.expert, addition.rank] else size
    if limits.free_R[addition.rank] < size or limits.move_budget[0] < moved:
        return False
    limits.free_R[addition.rank] -= size
    limits.move_budget[0] -= moved
    return True


def raise_formats(
    held_LER: BoolArray, format_LE: IntArray, damage_FLE: FloatArray, formats: Formats, free_R: IntArray
) -> IntArray:
    """[L, E] the formats after experts got more bytes of those left: all replicas of one, or none.

    Where a byte spares most damage, it goes first.
    """
    format_LE, free_R = format_LE.copy(), free_R.copy()
    layers, experts = np.nonzero(format_LE)
    rises = []
    for before, after in combinations(reversed(range(len(formats.names))), 2):
        more = int(formats.bytes_F[after] - formats.bytes_F[before])
        if more > 0:
            spared = (damage_FLE[before, layers, experts] - damage_FLE[after, layers, experts]) / more
            rises += [(-spared[at], at, before, after, more) for at in range(len(layers))]
    for _, at, before, after, more in sorted(rises):
        expert = layers[at], experts[at]
        held_R = held_LER[expert]
        if format_LE[expert] == before and (free_R[held_R] >= more).all():
            format_LE[expert] = after
            free_R[held_R] -= more
    return format_LE
