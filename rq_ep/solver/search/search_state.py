"""The state of the search: its context, an initial solution, and a placement in progress with its objective."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.certificate.pigeonholes import least_fullest_S, least_sum
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.objective.expert_weights import loads_SE, weights_SE
from rq_ep.solver.objective.precision import Formats, damage_FLE
from rq_ep.solver.search.first_replicas import complete_first_replicas, drop_beyond_node_spread
from rq_ep.solver.search.greedy_fill import add_replicas
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.search.local_search import LEAST_GAIN, tail_weighted_mean
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.solver.search.parallel_search import Effort, search_layers
from rq_ep.solver.workers import ALONE, Workers

UNLIMITED = 2**60


@dataclass(frozen=True, eq=False)
class Solution:
    """A placement of all layers: which rank holds which expert, and the format that each is stored in."""

    held_LER: BoolArray
    format_LE: IntArray  # number among the formats of the problem

    def equals(self, other: "Solution") -> bool:
        """Whether the other is the same placement."""
        return np.array_equal(self.held_LER, other.held_LER) and np.array_equal(self.format_LE, other.format_LE)


@dataclass(frozen=True)
class SearchContext:
    """The problem in the form that the search needs: what all its states share."""

    problem: PlacementProblem
    formats: Formats
    damage_FLE: FloatArray
    budget_R: IntArray
    allowed_LER: BoolArray
    fixed_LER: BoolArray
    effort: Effort
    workers: Workers
    current: Solution | None  # the placement that serves already

    @classmethod
    def of(
        cls, problem: PlacementProblem, max_moves: int, current: Placement | None, workers: Workers = ALONE
    ) -> "SearchContext":
        """Raises a `UserError` if `current` has formats that the problem may not use."""
        stats, topology = problem.stats, problem.topology
        formats = Formats.of(problem)
        serving = None
        if current is not None:
            serving = solution_of(problem, formats, current.layers)
            if serving is None:
                allowed = ",".join(problem.formats)
                raise UserError(
                    f"--formats {allowed}: the current placement uses {','.join(current.formats)}; allow these"
                )
        deadline = None if problem.time_limit_s is None else time.monotonic() + problem.time_limit_s
        return cls(
            problem,
            formats,
            damage_FLE(stats, formats),
            np.array(problem.budget_bytes_R or [UNLIMITED] * topology.num_ranks, np.int64),
            problem.rules.allowed_LER(stats, topology),
            problem.rules.fixed_LER(stats, topology),
            Effort(max_moves, problem.seed, problem.tail_weight, deadline),
            workers,
            serving,
        )

    def damage(self, format_LE: IntArray) -> float:
        """The expected damage of all experts in these formats."""
        return float(np.take_along_axis(self.damage_FLE, format_LE[None], axis=0).sum())

    def complete(
        self, held_LER: BoolArray, mean_LE: FloatArray, format_LE: IntArray, budget_R: IntArray
    ) -> BoolArray | None:
        """[L, E, R] `held_LER` with a replica of every expert, inside the rules; None if that does not fit."""
        if self.problem.rules.spread_nodes:
            held_LER = drop_beyond_node_spread(held_LER, self.problem.topology.nodes_R)
        bytes_LE = self.formats.bytes_of(format_LE)
        return complete_first_replicas(held_LER, mean_LE, bytes_LE, budget_R, self.allowed_LER, self.fixed_LER)

    def keeps_limits(self, solution: Solution) -> bool:
        """Whether a solution is inside the budget and the rules."""
        bytes_LE = self.formats.bytes_of(solution.format_LE)
        if (np.einsum("ler,le->r", solution.held_LER, bytes_LE) > self.budget_R).any():
            return False
        try:
            self.problem.rules.check(solution.held_LER, self.problem.stats, self.problem.topology, "a start")
        except UserError:
            return False
        return bool(solution.held_LER.any(axis=2).all())


def solution_of(problem: PlacementProblem, formats: Formats, layers: Sequence[LayerPlacement]) -> Solution | None:
    """The layers as a solution; None if they use formats that the problem may not, or mix them for one expert."""
    stats = problem.stats
    held_LER = np.zeros((stats.num_layers, stats.num_experts, problem.topology.num_ranks), bool)
    format_LE = np.zeros(held_LER.shape[:2], np.int64)
    for i, layer in enumerate(layers):
        table = layer.replicas
        if table.mixing_experts or not set(formats.names).issuperset(table.formats_P):
            return None
        held_LER[i] = table.mask(stats.num_experts, problem.topology.num_ranks)
        format_LE[i, table.experts_P] = [formats.names.index(name) for name in table.formats_P]
    return Solution(held_LER, format_LE)


class SearchState:
    """A placement in progress: every expert has a replica; the limits hold what is left of each rank's bytes."""

    def __init__(self, context: SearchContext, steps: Sequence[LayerSteps], initial: Solution) -> None:
        self.context = context
        self.format_LE = initial.format_LE
        self.limits = _limits(context, initial)
        self.layers: list[LayerSplit] = []
        self.scales: list[FloatArray] = []  # [S] total load of each step in that of native experts
        loads = [
            loads_SE(context.problem, context.formats, layer, format_E)
            for layer, format_E in zip(steps, initial.format_LE, strict=True)
        ]
        self.layers = list(context.workers.map(LayerSplit.of, loads, initial.held_LER))
        for layer, format_E in zip(steps, initial.format_LE, strict=True):
            totals = [
                weights_SE(context.problem, context.formats, layer, of_experts).sum(axis=1)
                for of_experts in (format_E, np.zeros_like(format_E))
            ]
            self.scales.append(totals[0] / totals[1])

    @property
    def held_LER(self) -> BoolArray:
        """[L, E, R] whether the rank holds a replica of the expert."""
        return np.stack([layer.held_ER for layer in self.layers])

    @property
    def solution(self) -> Solution:
        """What another state could begin with."""
        return Solution(self.held_LER, self.format_LE)

    @property
    def free_R(self) -> IntArray:
        """[R] bytes left."""
        return self.limits[0].free_R

    @property
    def value(self) -> float:
        """The objective: mean over layers of the tail-weighted max/mean, plus the price of moved bytes.

        Steps that are balanced well enough count alike.
        """
        value = float(np.mean([self.layer_value(i, layer) for i, layer in enumerate(self.layers)]))
        price = self.limits[0].price
        if price == 0:
            return value
        moved = sum(
            int(((layer.held_ER & ~within.present_ER) * within.bytes_E[:, None]).sum())
            for layer, within in zip(self.layers, self.limits, strict=True)
        )
        return value + price * moved / len(self.layers)

    def layer_value(self, i: int, layer: LayerSplit) -> float:
        """The tail-weighted max/mean of layer i, held so."""
        return self._objective(layer.values_S, self.scales[i])

    def _objective(self, values_S: FloatArray, scale_S: FloatArray) -> float:
        if not len(scale_S):
            return GOOD_ENOUGH
        return tail_weighted_mean(np.maximum(values_S, GOOD_ENOUGH) * scale_S, self.context.problem.tail_weight)

    @cached_property
    def floor(self) -> float:
        """What no placement in these formats and inside the budget can be below.

        Every step counts as balanced well enough at best, and less where too few replicas fit (`pigeonholes`).
        """
        bytes_LE = self.context.formats.bytes_of(self.format_LE)
        spare = max(sum(self.context.budget_R.tolist()) - int(bytes_LE.sum()), 0)
        num_more = min(spare // int(bytes_LE.min()), bytes_LE.size)
        costs = [
            self._floors(layer, scale_S, num_more) for layer, scale_S in zip(self.layers, self.scales, strict=True)
        ]
        return least_sum(costs, num_more) / len(costs)

    def _floors(self, layer: LayerSplit, scale_S: FloatArray, num_more: int) -> FloatArray:
        """[M] the same of one layer with 0 up to `num_more` replicas beyond the first ones, as far as these gain."""
        least, floors = self._objective(np.zeros(len(scale_S)), scale_S), []
        for number in range(num_more + 1):
            fullest_S = least_fullest_S(layer.loads_SE, layer.loads_SR.shape[1], number)
            floors.append(self._objective(fullest_S, scale_S))
            if floors[-1] <= least:
                break
        return np.array(floors)

    @property
    def is_settled(self) -> bool:
        """Whether no search can improve the objective any more, rounding errors aside."""
        return self.value <= self.floor + LEAST_GAIN

    @property
    def rating(self) -> tuple[float, float]:
        """Lower is better: the objective, then the expected damage."""
        return round(self.value, 4), self.context.damage(self.format_LE)

    def add_replicas(self, at_once: int = 1) -> "SearchState":
        """Add replicas greedily while they fit and gain, to a layer several `at_once`."""
        add_replicas(self.layers, self.limits, self.context.effort.is_over, self.context.workers, at_once)
        return self

    def search(self, on_progress: Callable[[float], None]) -> None:
        """Improve every layer by local search."""
        self.layers = search_layers(self.layers, self.limits, self.context.effort, self.context.workers, on_progress)


def _limits(context: SearchContext, initial: Solution) -> list[LayerLimits]:
    """The limits of each layer; they share the bytes left and the bytes that may still be moved."""
    problem, topology, current = context.problem, context.problem.topology, context.current
    bytes_LE = context.formats.bytes_of(initial.format_LE)
    free_R = context.budget_R - np.einsum("ler,le->r", initial.held_LER, bytes_LE)
    present_LER, price, move_budget = np.ones(initial.held_LER.shape, bool), 0.0, UNLIMITED
    if current is not None:
        present_LER = _present_LER(problem, context.formats, current, initial)
        price = problem.move_price * len(bytes_LE) / float(context.budget_R.sum())
        if problem.max_moved_bytes is not None:
            moved = int(((initial.held_LER & ~present_LER) * bytes_LE[:, :, None]).sum())
            move_budget = max(problem.max_moved_bytes - moved, 0)
    num_nodes = topology.num_nodes if problem.rules.spread_nodes else 1
    shared_budget = np.array([move_budget], np.int64)
    return [
        LayerLimits(
            bytes_E, free_R, allowed_ER, fixed_ER, topology.nodes_R, num_nodes, present_ER, price, shared_budget
        )
        for bytes_E, allowed_ER, fixed_ER, present_ER in zip(
            bytes_LE, context.allowed_LER, context.fixed_LER, present_LER, strict=True
        )
    ]


def _present_LER(problem: PlacementProblem, formats: Formats, current: Solution, initial: Solution) -> BoolArray:
    """[L, E, R] whether the rank holds the expert in its format of `initial`, or in the native one and converts it."""
    present_LER: BoolArray = current.held_LER & (current.format_LE == initial.format_LE)[:, :, None]
    if problem.held is None:
        return present_LER
    present_LER = np.zeros(initial.held_LER.shape, bool)
    for i, replicas in enumerate(problem.held):
        for rank, expert, name in replicas:
            able = name in (formats.native, formats.names[initial.format_LE[i, expert]])
            present_LER[i, expert, rank] |= able
    return present_LER
