"""Greedy use of the bytes that first replicas leave: replicas by gain per byte over all layers, then more bits."""

from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace
from itertools import combinations

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LEAST_GAIN, RANKS_PER_ADDITION, Addition, Grown, LayerSplit
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.solver.workers import ALONE, Workers

AHEAD = 8  # replicas that are added to a layer ahead of their turn
FOR_WORKERS = 2**17  # steps times experts and ranks of a layer; in less, a replica takes 0.1 ms, as to ask a worker


def add_replicas(
    layers: list[LayerSplit],
    limits: Sequence[LayerLimits],
    is_over: Callable[[], bool],
    workers: Workers,
    at_once: int = 1,
) -> None:
    """Add replicas to `layers`, the largest gain per byte first, while they fit; several at a time for many ranks.

    What comes next is seldom in doubt, as long as bytes are left: a layer's next replicas nearly always fit when it is
    their turn. So a few are added ahead of it, in every layer by itself; only their bytes are taken in order. As bytes
    only become fewer, what was chosen among more and fits is still the best.

    Args:
        layers: replaced by layers with exact splits.
        limits: of each layer; they share `free_R` and `move_budget`, which are kept current.
        is_over: whether the time is over.
        workers: compute layers ahead.
        at_once: how many are added to a layer before their gains are computed anew.
    """
    if max(layer.loads_SE.size * layer.loads_SR.shape[1] for layer in layers) < FOR_WORKERS:
        workers = ALONE
    begin = workers.map(lambda layer: layer.gains_ER, layers)
    fills = [
        _LayerFill(layer, gains_ER, within, workers, at_once)
        for layer, gains_ER, within in zip(layers, begin, limits, strict=True)
    ]
    queue = [(-fill.line_up(), i) for i, fill in enumerate(fills)]
    heapify(queue)
    while queue and queue[0][0] < 0 and not is_over():
        fill = fills[queue[0][1]]
        fill.take()
        heapreplace(queue, (-fill.line_up(), queue[0][1]))
    layers[:] = workers.map(_LayerFill.filled, fills)


class _LayerFill:
    """A layer that is filled: which replicas come next, and what the layer is with them and a few more."""

    def __init__(
        self, layer: LayerSplit, gains_ER: FloatArray, limits: LayerLimits, workers: Workers, at_once: int
    ) -> None:
        self._layer, self._gains_ER, self._limits, self._workers = layer, gains_ER, limits, workers
        self._at_once = max(layer.loads_SR.shape[1] // RANKS_PER_ADDITION, at_once)
        self._num_added = 0  # times that replicas were added to reach `_layer`
        self._next: list[Addition] = []  # whose turn is to come: first those that `_grown` begins with
        self._first: list[Addition] = []
        self._num_taken = 0  # times that replicas have had their turn since
        self._grown: Callable[[], Grown]

    def line_up(self) -> float:
        """Choose what comes next, and begin to add it; its gain, or 0 if nothing is worth its bytes."""
        if self._num_taken:
            chosen = self._grown().chosen
            if self._num_taken <= len(chosen) and self._fits(chosen[self._num_taken - 1]):
                self._next = [chosen[self._num_taken - 1]]
                return self._next[0].gain
            self._settle()
        if self._layer.value <= GOOD_ENOUGH:
            return 0.0
        additions = self._layer.best_additions(self._gains_ER, self._limits, self._at_once)
        self._next = [one for one in additions if one.gain * self._limits.bytes_E[one.expert] > LEAST_GAIN]
        if not self._next:
            return 0.0
        self._first = self._next
        self._grown = self._workers.ahead(
            self._grow, self._first, AHEAD - 1 if self._at_once == 1 else 0, self._limits_now()
        )
        return additions[0].gain

    def take(self) -> None:
        """Take the bytes of what comes next, as far as there are enough."""
        fitting = [one for one in self._next if self._takes(one)]
        if fitting == self._next:
            self._num_taken += 1
        elif self._num_taken:
            self._settle()
        elif fitting:
            self._first, self._num_taken = fitting, 1
            self._grown = ALONE.ahead(self._grow, fitting, 0, self._limits_now())
            self._settle()

    def filled(self) -> LayerSplit:
        """The layer with all that has had its turn, split exactly."""
        self._settle()
        return self._layer.optimized()

    def _settle(self) -> None:
        """Begin anew from what has had its turn."""
        if not self._num_taken:
            return
        grown = self._grown()
        if self._num_taken <= len(grown.chosen):
            grown = self._grow(self._first + grown.chosen[: self._num_taken - 1], 0, self._limits_now())
        self._layer, self._gains_ER, _ = grown
        self._num_added += self._num_taken
        self._num_taken = 0

    def _grow(self, additions: list[Addition], num_more: int, limits: LayerLimits) -> Grown:
        return self._layer.grown(
            additions, limits, at_once=self._at_once > 1, num_added=self._num_added, num_more=num_more
        )

    def _limits_now(self) -> LayerLimits:
        """The limits as they are now, which others change."""
        return self._limits._replace(free_R=self._limits.free_R.copy(), move_budget=self._limits.move_budget.copy())

    def _takes(self, addition: Addition) -> bool:
        """Take the bytes of a new replica off the limits; False if these have too few."""
        if not self._fits(addition):
            return False
        size, moved = self._sizes(addition)
        self._limits.free_R[addition.rank] -= size
        self._limits.move_budget[0] -= moved
        return True

    def _fits(self, addition: Addition) -> bool:
        size, moved = self._sizes(addition)
        return bool(self._limits.free_R[addition.rank] >= size and self._limits.move_budget[0] >= moved)

    def _sizes(self, addition: Addition) -> tuple[int, int]:
        """The bytes of a new replica, and those of them that have to be moved."""
        size = int(self._limits.bytes_E[addition.expert])
        return size, 0 if self._limits.present_ER[addition.expert, addition.rank] else size


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
