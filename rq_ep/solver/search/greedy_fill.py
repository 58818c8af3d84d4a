"""Greedy use of the bytes that first replicas leave: replicas by gain per byte over all layers, then more bits."""

from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace
from itertools import combinations

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.search.layer_growth import Addition, Growth
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.neighborhood import LayerLimits, fits, take
from rq_ep.solver.workers import ALONE, Workers

AHEAD = 24  # turns of a layer that a worker computes in a row
SPREAD = 3  # standard deviations (Poisson) by which a rank may get more replicas than others meanwhile
RANKS_PER_ADDITION = 64  # one replica is added at a time for each so many ranks
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
    num_ranks = layers[0].loads_SR.shape[1]
    if max(layer.loads_SE.size for layer in layers) * num_ranks < FOR_WORKERS:
        workers = ALONE
    at_once = max(num_ranks // RANKS_PER_ADDITION, at_once)
    begin = workers.map(Growth.of, layers, limits, [at_once] * len(layers))
    num_meanwhile = len(layers) / num_ranks
    fills = [_LayerFill(*pair, workers, at_once, num_meanwhile) for pair in zip(begin, limits, strict=True)]
    queue = [(-fill.line_up(), i) for i, fill in enumerate(fills)]
    heapify(queue)
    while queue and queue[0][0] < 0 and not is_over():
        fill = fills[queue[0][1]]
        fill.take_turn()
        heapreplace(queue, (-fill.line_up(), queue[0][1]))
    layers[:] = workers.map(_LayerFill.filled, fills)


class _LayerFill:
    """A layer that is filled turn by turn, and how it is expected to go on."""

    def __init__(
        self, growth: Growth, limits: LayerLimits, workers: Workers, at_once: int, num_meanwhile: float
    ) -> None:
        self._limits, self._workers, self._at_once = limits, workers, at_once
        self._num_meanwhile = num_meanwhile  # replicas that a rank gets from one turn to the next, of all layers
        self._num_ahead = AHEAD if at_once == 1 else 1
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
            if fits(self._limits, one.expert, one.rank):
                take(self._limits, one.expert, one.rank)
                fitting.append(one)
        if len(fitting) == len(self._next):
            self._num_over += 1
            return
        self._give_up()
        if fitting:
            self._growth = self._growth.grown([fitting], self._limits, self._at_once)

    def filled(self) -> LayerSplit:
        """The layer with all that has had its turn, split exactly."""
        self._give_up()
        return self._growth.layer.optimized()

    def _expected(self) -> Sequence[Addition]:
        """What was expected to come next, if it fits; where it is the first of a whole row, the next row begins."""
        while self._ahead:
            growth = self._ahead[0]()
            if self._num_over < len(growth.turns):
                coming = growth.turns[self._num_over]
                if not self._fit(coming):
                    break
                if len(self._ahead) == 1 and len(growth.turns) == self._num_ahead > 1 and growth.coming:
                    self._look_ahead(growth, [*growth.turns[self._num_over :], growth.coming])
                return coming
            self._growth, self._num_over = growth, 0
            del self._ahead[0]
        self._give_up()
        return ()

    def _best(self) -> Sequence[Addition]:
        """What is best now, if it is worth its bytes."""
        best = self._growth.coming
        if self._at_once > 1 or not self._fit(best):
            best = self._growth.best(self._limits, self._at_once)
        if best:
            self._look_ahead(self._growth, [best])
        return best

    def _look_ahead(self, growth: Growth, coming: Sequence[Sequence[Addition]]) -> None:
        """Begin a row that goes on from `growth` with the last of the coming turns; `growth` has had the others."""
        limits = self._limits._replace(free_R=self._limits.free_R.copy(), move_budget=self._limits.move_budget.copy())
        for turn in coming:
            for one in turn:
                take(limits, one.expert, one.rank)
        taken_M = self._num_meanwhile * (len(coming) + np.arange(self._num_ahead - 1))
        rooms_M = 1 + taken_M + SPREAD * np.sqrt(taken_M)
        self._ahead.append(self._workers.ahead(growth.grown, coming[-1:], limits, self._at_once, rooms_M))

    def _give_up(self) -> None:
        """Go back to what has had its turn."""
        if self._num_over:
            growth = self._ahead[0]()
            if self._num_over < len(growth.turns):
                growth = self._growth.grown(growth.turns[: self._num_over], self._limits, self._at_once)
            self._growth = growth
        self._ahead, self._num_over = [], 0

    def _fit(self, additions: Sequence[Addition]) -> bool:
        return all(fits(self._limits, one.expert, one.rank) for one in additions)


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
