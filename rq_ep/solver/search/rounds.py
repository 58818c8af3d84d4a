"""Rounds of the search: every layer is improved alone, on as many processes as wanted, then all share what is left."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rq_ep.solver.search.greedy_fill import fill
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.local_search import improve
from rq_ep.solver.search.neighborhood import Limits
from rq_ep.solver.search.workers import workers

NUM_ROUNDS = 3


@dataclass(frozen=True)
class Effort:
    """How long to search, and what for."""

    max_moves: int  # tried in each layer, all rounds together
    seed: int
    tail_weight: float = 0.0
    num_workers: int = 1
    deadline: float | None = None  # of `time.monotonic`

    def is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True)
class _Task:
    layer: LayerSplit
    limits: Limits
    effort: Effort
    entropy: tuple[int, ...]


def search_rounds(
    layers: Sequence[LayerSplit], limits: Sequence[Limits], effort: Effort, on_progress: Callable[[float], None]
) -> list[LayerSplit]:
    """Improve all layers, whose `limits` share `free_R` and `room`. The result does not depend on `num_workers`.

    In a round, what a rank has left is lent to one layer, and what may be moved is dealt out evenly, so that no layer
    need know of the others.
    """
    layers = list(layers)
    num_layers = len(layers)
    free_R, room = limits[0].free_R, limits[0].room
    with workers(effort.num_workers, num_layers) as run:
        for turn in range(NUM_ROUNDS):
            lent_LR = np.zeros((num_layers, len(free_R)), np.int64)
            lent_LR[(np.arange(len(free_R)) + turn) % num_layers, np.arange(len(free_R))] = free_R
            rooms = [np.array([int(room[0]) // num_layers]) for _ in layers]
            tasks = [
                _Task(layer, own._replace(free_R=lent_R, room=rest), effort, (effort.seed, at, turn))
                for at, (layer, own, lent_R, rest) in enumerate(zip(layers, limits, lent_LR, rooms, strict=True))
            ]
            free_R[:] = 0
            room[0] -= sum(int(rest[0]) for rest in rooms)
            for at, done in enumerate(run(_improved, tasks)):
                layers[at] = done.layer
                free_R += done.limits.free_R
                room += done.limits.room
                on_progress((turn + (at + 1) / num_layers) / NUM_ROUNDS)
            fill(layers, limits, effort.is_over)
            if effort.is_over():
                break
    return layers


def _improved(task: _Task) -> _Task:
    generator = np.random.default_rng(task.entropy)
    num_moves = task.effort.max_moves // NUM_ROUNDS
    layer = improve(task.layer, task.limits, task.effort.tail_weight, num_moves, generator, task.effort.is_over)
    return _Task(layer, task.limits, task.effort, task.entropy)
