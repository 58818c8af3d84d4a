"""A placement being made: the problem made ready, ways to begin, and how good it has become."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.objective.expert_weights import loads_SE, weights_SE
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.search.first_replicas import complete_homes, spread_out
from rq_ep.solver.search.greedy_fill import fill
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.search.local_search import objective
from rq_ep.solver.search.neighborhood import Limits
from rq_ep.solver.search.rounds import Effort, search_rounds

UNLIMITED = 2**60


@dataclass(frozen=True)
class Start:
    """Who holds what to begin with, and which experts are stored low."""

    held_LER: BoolArray
    low_LE: BoolArray


@dataclass(frozen=True)
class Ready:
    """A problem made ready: all that its drafts share."""

    problem: PlacementProblem
    formats: Formats
    budget_R: IntArray
    allowed_LER: BoolArray
    fixed_LER: BoolArray
    effort: Effort
    current: Start | None

    @classmethod
    def of(cls, problem: PlacementProblem, max_moves: int, current: Placement | None) -> "Ready":
        """Raises a `UserError` if `current` has formats that the problem may not use."""
        stats, topology = problem.stats, problem.topology
        formats = Formats.of(problem)
        start = None
        if current is not None:
            start = start_of(problem, formats, current.layers)
            if start is None:
                allowed = ",".join(problem.formats)
                raise UserError(
                    f"--formats {allowed}: the current placement uses {','.join(current.formats)}; allow these"
                )
        deadline = None if problem.time_limit_s is None else time.monotonic() + problem.time_limit_s
        return cls(
            problem,
            formats,
            np.array(problem.budget_bytes_R or [UNLIMITED] * topology.num_ranks, np.int64),
            problem.rules.allowed_LER(stats, topology),
            problem.rules.fixed_LER(stats, topology),
            Effort(max_moves, problem.seed, problem.tail_weight, problem.num_workers, deadline),
            start,
        )

    def homes(
        self, held_LER: BoolArray, mean_LE: FloatArray, low_LE: BoolArray, budget_R: IntArray
    ) -> BoolArray | None:
        """Who holds what, with a home for every expert inside the rules; None if that does not fit."""
        if self.problem.rules.spread_nodes:
            held_LER = spread_out(held_LER, self.problem.topology.nodes_R)
        bytes_LE = self.formats.bytes_of(low_LE)
        return complete_homes(held_LER, mean_LE, bytes_LE, budget_R, self.allowed_LER, self.fixed_LER)

    def keeps_limits(self, start: Start) -> bool:
        """Whether a start is inside the budget and the rules."""
        bytes_LE = self.formats.bytes_of(start.low_LE)
        if (np.einsum("ler,le->r", start.held_LER, bytes_LE) > self.budget_R).any():
            return False
        try:
            self.problem.rules.check(start.held_LER, self.problem.stats, self.problem.topology, "a start")
        except UserError:
            return False
        return bool(start.held_LER.any(axis=2).all())


def start_of(problem: PlacementProblem, formats: Formats, layers: Sequence[LayerPlacement]) -> Start | None:
    """Who holds what in a placement; None if it has formats that the problem may not use, or mixes them."""
    stats = problem.stats
    held_LER = np.zeros((stats.num_layers, stats.num_experts, problem.topology.num_ranks), bool)
    low_LE = np.zeros(held_LER.shape[:2], bool)
    for at, layer in enumerate(layers):
        table = layer.replicas
        if table.mixing_experts or not {formats.native, formats.low}.issuperset(table.formats_P):
            return None
        held_LER[at, table.experts_P, table.ranks_P] = True
        is_low_P = np.array([name != formats.native for name in table.formats_P], bool)
        low_LE[at, table.experts_P[is_low_P]] = True
    return Start(held_LER, low_LE)


class Draft:
    """A placement being made: every expert has a home; what is left of each rank's bytes is in the limits."""

    def __init__(self, ready: Ready, steps: Sequence[LayerSteps], start: Start) -> None:
        self.ready = ready
        self.low_LE = start.low_LE.copy()
        self.limits = _limits(ready, start)
        self.layers: list[LayerSplit] = []
        self.scales: list[FloatArray] = []  # [S] total load of each step in that of native experts
        for layer, held_ER, low_E in zip(steps, start.held_LER, start.low_LE, strict=True):
            self.layers.append(LayerSplit.of(loads_SE(ready.problem, ready.formats, layer, low_E), held_ER))
            totals = [
                weights_SE(ready.problem, ready.formats, layer, low).sum(axis=1) for low in (low_E, low_E & False)
            ]
            self.scales.append(totals[0] / totals[1])

    @property
    def held_LER(self) -> BoolArray:
        return np.stack([layer.held_ER for layer in self.layers])

    @property
    def start(self) -> Start:
        """What another draft could begin with."""
        return Start(self.held_LER, self.low_LE)

    @property
    def free_R(self) -> IntArray:
        """[R] bytes left."""
        return self.limits[0].free_R

    @property
    def value(self) -> float:
        """The objective; steps below a threshold are equal."""
        tail_weight = self.ready.problem.tail_weight
        values = [
            objective(np.maximum(layer.values_S, GOOD_ENOUGH) * scale_S, tail_weight) if len(scale_S) else GOOD_ENOUGH
            for layer, scale_S in zip(self.layers, self.scales, strict=True)
        ]
        moved = sum(
            int(((layer.held_ER & ~within.present_ER) * within.bytes_E[:, None]).sum())
            for layer, within in zip(self.layers, self.limits, strict=True)
        )
        return float(np.mean(values)) + self.limits[0].price * moved / len(values)

    @property
    def rating(self) -> tuple[float, int]:
        """Lower is better: the objective, then fewer experts in few bits."""
        return round(self.value, 4), int(self.low_LE.sum())

    def fill(self) -> "Draft":
        """Add replicas while they fit and pay."""
        fill(self.layers, self.limits, self.ready.effort.is_over)
        return self

    def search(self, on_progress: Callable[[float], None]) -> None:
        """Move replicas where that pays."""
        self.layers = search_rounds(self.layers, self.limits, self.ready.effort, on_progress)


def _limits(ready: Ready, start: Start) -> list[Limits]:
    """What each layer may do from here; they share the bytes left and those that may still be moved."""
    problem, topology, current = ready.problem, ready.problem.topology, ready.current
    bytes_LE = ready.formats.bytes_of(start.low_LE)
    free_R = ready.budget_R - np.einsum("ler,le->r", start.held_LER, bytes_LE)
    present_LER, price, room = np.ones(start.held_LER.shape, bool), 0.0, UNLIMITED
    if current is not None:
        present_LER = current.held_LER & (current.low_LE == start.low_LE)[:, :, None]
        price = problem.move_price * len(bytes_LE) / float(ready.budget_R.sum())
        if problem.max_moved_bytes is not None:
            moved = int(((start.held_LER & ~present_LER) * bytes_LE[:, :, None]).sum())
            room = max(problem.max_moved_bytes - moved, 0)
    num_nodes = topology.num_nodes if problem.rules.spread_nodes else 1
    shared_room = np.array([room], np.int64)
    return [
        Limits(bytes_E, free_R, allowed_ER, fixed_ER, topology.nodes_R, num_nodes, present_ER, price, shared_room)
        for bytes_E, allowed_ER, fixed_ER, present_ER in zip(
            bytes_LE, ready.allowed_LER, ready.fixed_LER, present_LER, strict=True
        )
    ]
