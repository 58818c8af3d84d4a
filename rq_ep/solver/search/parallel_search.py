"""Search of all layers side by side, by several workers if asked for; between rounds layers share the bytes left."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rq_ep.solver.search.greedy_fill import add_replicas
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.local_search import improve
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.solver.workers import Workers

NUM_ROUNDS = 3
DEARER = 2.5  # times, that moving a byte costs more in each round than in the next: what gains most for it comes first


@dataclass(frozen=True)
class Effort:
    """How long to search, and for which objective."""

    max_moves: int  # attempted in each layer, all rounds together
    seed: int
    tail_weight: float = 0.0
    deadline: float | None = None  # of `time.monotonic`

    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True)
class _LayerTask:
    """A layer to search, and the limits it may use up."""

    layer: LayerSplit
    limits: LayerLimits
    effort: Effort
    entropy: tuple[int, ...]


def search_layers(
    layers: Sequence[LayerSplit],
    limits: Sequence[LayerLimits],
    effort: Effort,
    workers: Workers,
    on_progress: Callable[[float], None],
) -> list[LayerSplit]:
    """Improve all layers, whose `limits` share `free_R` and `move_budget`. The result does not depend on the workers.

    In a round, each rank's free bytes are lent to one layer, and bytes that may still be moved are divided evenly, so
    that layers do not depend on one another.
    """
    layers = list(layers)
    num_layers = len(layers)
    free_R, move_budget = limits[0].free_R, limits[0].move_budget
    for round_index in range(NUM_ROUNDS):
        lent_LR = np.zeros((num_layers, len(free_R)), np.int64)
        lent_LR[(np.arange(len(free_R)) + round_index) % num_layers, np.arange(len(free_R))] = free_R
        share = int(move_budget[0]) // num_layers
        price = limits[0].price * DEARER ** (NUM_ROUNDS - 1 - round_index)
        tasks = [
            _LayerTask(
                layers[i],
                limits[i]._replace(free_R=lent_LR[i], move_budget=np.array([share]), price=price),
                effort,
                (effort.seed, i, round_index),
            )
            for i in range(num_layers)
        ]
        free_R[:] = 0
        move_budget[0] -= share * num_layers
        for i, improved in enumerate(workers.map(_improved, tasks)):
            layers[i] = improved.layer
            free_R += improved.limits.free_R
            move_budget += improved.limits.move_budget
            on_progress((round_index + (i + 1) / num_layers) / NUM_ROUNDS)
        add_replicas(layers, limits, effort.is_over, workers)
        if effort.is_over():
            break
    return layers


def _improved(task: _LayerTask) -> _LayerTask:
    generator = np.random.default_rng(task.entropy)
    num_moves = task.effort.max_moves // NUM_ROUNDS
    layer = improve(task.layer, task.limits, task.effort.tail_weight, num_moves, generator, task.effort.is_over)
    return _LayerTask(layer, task.limits, task.effort, task.entropy)
