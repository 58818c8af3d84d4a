"""Greedy use of the bytes that first replicas leave: replicas by gain per byte over all layers, then more bits."""

from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace
from itertools import combinations

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.search.layer_growth import LEAST_GAIN, RANKS_PER_ADDITION, Addition, Growth
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.solver.workers import ALONE, Workers

AHEAD = 8  # turns of a layer that a worker computes in a row
FOR_WORKERS = 2**15  # steps times experts and ranks of a layer; in less, a row takes hardly longer than to ask for it


def add_replicas(
    layers: list[LayerSplit],
    limits: Sequence[LayerLimits],
    is_over: Callable[[], bool],
    workers: Workers,
    at_once: int = 1,
) -> None:
    """Add replicas to `layers`, the largest gain per byte first, while they fit; several at a time for many ranks.

    What comes next is seldom in doubt, as long as bytes are left: a layer's next replicas nearly always fit when it is
    their turn. So they are added ahead of it, in every layer by itself; only their bytes are taken in order. As bytes
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
    begin = workers.map(Growth.of, layers)
    fills = [_LayerFill(growth, within, workers, at_once) for growth, within in zip(begin, limits, strict=True)]
    queue = [(-fill.line_up(), i) for i, fill in enumerate(fills)]
    heapify(queue)
    while queue and queue[0][0] < 0 and not is_over():
        fill = fills[queue[0][1]]
        fill.take_turn()
        heapreplace(queue, (-fill.line_up(), queue[0][1]))
    layers[:] = workers.map(_LayerFill.filled, fills)


class _LayerFill:
    """A layer that is filled turn by turn, and how it is expected to go on."""

    def __init__(self, growth: Growth, limits: LayerLimits, workers: Workers, at_once: int) -> None:
        self._limits, self._workers = limits, workers
        self._at_once = max(growth.layer.loads_SR.shape[1] // RANKS_PER_ADDITION, at_once)
        self._num_ahead = AHEAD if self._at_once == 1 else 1
        self._growth = growth
        self._ahead: list[Callable[[], Growth]] = []  # each goes on from the one before, the first from `_growth`
        self._num_over = 0  # turns of the first of these that are over
        self._next: Sequence[Addition] = ()  # whose turn comes

    def line_up(self) -> float:
        """Say what comes next, and begin to add it; its gain, or 0 if nothing is worth its bytes."""
        self._next = self._expected() or self._best()
        return self._next[0].gain if self._next else 0.0

    def take_turn(self) -> None:
        """Take the bytes of what comes next, as far as there are enough."""
        fitting = []
        for one in self._next:
            if self._fits(one):
                _take(self._limits, one)
                fitting.append(one)
        if len(fitting) == len(self._next):
            self._num_over += 1
            return
        self._give_up()
        if fitting:
            self._growth = self._growth.grown([fitting], self._limits)

    def filled(self) -> LayerSplit:
        """The layer with all that has had its turn, split exactly."""
        self._give_up()
        return self._growth.layer.optimized()

    def _expected(self) -> Sequence[Addition]:
        """What was expected to come next, if it fits; where it is the first of its row, the next row begins."""
        while self._ahead:
            growth = self._ahead[0]()
            if self._num_over < len(growth.turns):
                coming = growth.turns[self._num_over]
                if not all(map(self._fits, coming)):
                    break
                if len(self._ahead) == 1 and len(growth.turns) == self._num_ahead > 1:
                    self._look_ahead(growth, [], growth.turns[self._num_over :])
                return coming
            self._growth, self._num_over = growth, 0
            del self._ahead[0]
        self._give_up()
        return ()

    def _best(self) -> Sequence[Addition]:
        """What is best now, if it is worth its bytes."""
        if self._growth.layer.value <= GOOD_ENOUGH:
            return ()
        best = self._growth.best(self._limits, self._at_once)
        best = [one for one in best if one.gain * self._limits.bytes_E[one.expert] > LEAST_GAIN]
        if best:
            self._look_ahead(self._growth, [best], [best])
        return best

    def _look_ahead(self, growth: Growth, turns: list[list[Addition]], not_over: Sequence[Sequence[Addition]]) -> None:
        """Begin a row that goes on from `growth` with these turns, beside the bytes of those that are not over."""
        limits = self._limits._replace(free_R=self._limits.free_R.copy(), move_budget=self._limits.move_budget.copy())
        for turn in not_over:
            for one in turn:
                _take(limits, one)
        self._ahead.append(self._workers.ahead(growth.grown, turns, limits, self._num_ahead - len(turns)))

    def _give_up(self) -> None:
        """Go back to what has had its turn."""
        if self._num_over:
            growth = self._ahead[0]()
            is_all = self._num_over == len(growth.turns)
            self._growth = growth if is_all else self._growth.grown(growth.turns[: self._num_over], self._limits)
        self._ahead, self._num_over = [], 0

    def _fits(self, one: Addition) -> bool:
        size, moved = _sizes(self._limits, one)
        return bool(self._limits.free_R[one.rank] >= size and self._limits.move_budget[0] >= moved)


def _take(limits: LayerLimits, one: Addition) -> None:
    """Take the bytes of a new replica off the limits."""
    size, moved = _sizes(limits, one)
    limits.free_R[one.rank] -= size
    limits.move_budget[0] -= moved


def _sizes(limits: LayerLimits, one: Addition) -> tuple[int, int]:
    """The bytes of a new replica, and those of them that have to be moved."""
    size = int(limits.bytes_E[one.expert])
    return size, 0 if limits.present_ER[one.expert, one.rank] else size


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
