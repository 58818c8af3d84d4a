"""Greedy use of the bytes that first replicas leave: replicas by gain per byte over all layers, then more bits."""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import combinations

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, Addition, LayerSplit
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.solver.workers import Workers

LEAST_GAIN = 1e-6  # of max/mean: below it a replica is not worth its bytes
OPTIMIZE_EVERY = 8  # additions to a layer between two exact splits of its steps


def add_replicas(
    layers: list[LayerSplit],
    limits: Sequence[LayerLimits],
    is_over: Callable[[], bool],
    workers: Workers,
    at_once: int = 1,
) -> None:
    """Add replicas to `layers`, the largest gain per byte first, while they fit; several at a time for many ranks.

    What comes next is seldom in doubt: a layer's next replicas nearly always fit when it is their turn. So workers add
    them to every layer ahead of its turn; only their bytes are taken in order.

    Args:
        layers: replaced by layers with exact splits.
        limits: of each layer; they share `free_R` and `move_budget`, which are kept current.
        is_over: whether the time is over.
        workers: compute layers ahead.
        at_once: how many are added to a layer before their gains are computed anew.
    """
    gains = list(workers.map(lambda layer: layer.gains_ER, layers))
    num_added = [0] * len(layers)
    queue: list[tuple[float, int, list[Addition], Callable[[], tuple[LayerSplit, FloatArray]]]] = []

    def line_up(i: int) -> None:
        layer = layers[i]
        additions = layer.best_additions(gains[i], limits[i], at_once) if layer.value > GOOD_ENOUGH else []
        worthwhile = [one for one in additions if one.gain * limits[i].bytes_E[one.expert] > LEAST_GAIN]
        if worthwhile:
            heappush(queue, (-additions[0].gain, i, worthwhile, add(i, worthwhile)))

    def add(i: int, additions: list[Addition]) -> Callable[[], tuple[LayerSplit, FloatArray]]:
        return workers.ahead(layers[i].with_added, additions, (num_added[i] + 1) % OPTIMIZE_EVERY == 0)

    for i in range(len(layers)):
        line_up(i)
    while queue and not is_over():
        _, i, worthwhile, added = heappop(queue)
        fitting = [one for one in worthwhile if _takes(limits[i], one)]
        if fitting:
            layers[i], gains[i] = (added if fitting == worthwhile else add(i, fitting))()
            num_added[i] += 1
        line_up(i)
    layers[:] = workers.map(LayerSplit.optimized, layers)


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
