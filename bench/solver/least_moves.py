"""The least bytes that any planner must move for a given balance: a mixed-integer linear program, and its bound.

It is for the few experts and ranks that a program of this size can be solved for. It knows the steps that score a
placement, so a planner that decides before them moves no less. Steps are taken together in groups, by their mean: the
max/mean of a mean step is at most the mean of theirs, so what is proven for the groups holds for the steps.

Axes: G groups of steps; F formats, the native one first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.solver.objective.precision import Formats

WHOLE = 0.5  # above it a variable of the solution counts as 1


class LeastMoves(NamedTuple):
    """What the program finds within its time."""

    bound: int  # bytes that every placement inside the limits moves at least
    layers: list[LayerPlacement] | None  # of the best placement found; None: none was


@dataclass
class _Rows:
    """Linear constraints `low <= row @ x <= high`, entry by entry."""

    rows: list[IntArray] = field(default_factory=list)
    columns: list[IntArray] = field(default_factory=list)
    values: list[FloatArray] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, terms: Iterable[tuple[IntArray, FloatArray | float]], low: float, high: float) -> None:
        """Add a row: some variables, each with its factor."""
        for columns, factors in terms:
            flat = np.ravel(columns)
            self.columns.append(flat)
            self.values.append(np.broadcast_to(np.ravel(factors), flat.shape).astype(np.float64))
            self.rows.append(np.full(len(flat), len(self.low)))
        self.low.append(low)
        self.high.append(high)

    def constraint(self, num_variables: int) -> LinearConstraint:
        entries = (np.concatenate(self.values), (np.concatenate(self.rows), np.concatenate(self.columns)))
        matrix = coo_array(entries, shape=(len(self.low), num_variables)).tocsr()
        return LinearConstraint(matrix, np.array(self.low), np.array(self.high))


def least_moves(
    problem: PlacementProblem,
    current: Placement,
    steps_SLE: IntArray,
    limit: float,
    num_groups: int,
    time_limit_s: float,
) -> LeastMoves:
    """The least bytes that all ranks together receive for a max/mean of at most `limit`, mean over steps and layers.

    Args:
        problem: budgets, formats and cap; the cap counts its statistics' pairs.
        current: the placement that serves.
        steps_SLE: the steps to balance.
        limit: of max/mean with the best split of divisible pairs.
        num_groups: of consecutive steps; more are more exact, and take longer.
        time_limit_s: of the program.
    """
    formats, num_ranks = Formats.of(problem), problem.topology.num_ranks
    loads_GLE, weight_G = _grouped(steps_SLE, num_ranks, num_groups)
    num_layers, num_experts = loads_GLE.shape[1:]
    num_formats = len(formats.names)
    # Variables: replicas, formats, pairs of each group on each rank, and the fullest rank of each group and layer.
    shapes = [
        (num_layers, num_experts, num_ranks, num_formats),
        (num_layers, num_experts, num_formats),
        (len(weight_G), num_layers, num_experts, num_ranks),
        (len(weight_G), num_layers),
    ]
    ends = np.cumsum([np.prod(shape) for shape in shapes]).tolist()
    held_LERF, stored_LEF, pairs_GLER, fullest_GL = (
        np.arange(end - np.prod(shape), end).reshape(shape) for shape, end in zip(shapes, ends, strict=True)
    )
    rows = _Rows()
    for i, expert in np.ndindex(num_layers, num_experts):
        rows.add([(stored_LEF[i, expert], 1.0)], 1, 1)
        rows.add([(held_LERF[i, expert], 1.0)], 1, np.inf)
        for rank, name in np.ndindex(num_ranks, num_formats):
            rows.add([(held_LERF[i, expert, rank, name], 1.0), (stored_LEF[i, expert, name], -1.0)], -np.inf, 0)
    for rank, budget in enumerate(problem.budget_bytes_R or ()):
        of_rank_LEF = held_LERF[:, :, rank]
        rows.add([(of_rank_LEF, np.broadcast_to(formats.bytes_F, of_rank_LEF.shape))], -np.inf, budget)
    pairs_LE = problem.stats.counts.sum(axis=0)
    low_LEF = np.broadcast_to(pairs_LE[:, :, None] / max(int(pairs_LE.sum()), 1), stored_LEF[:, :, 1:].shape)
    rows.add([(stored_LEF[:, :, 1:], low_LEF)], -np.inf, problem.max_low_precision_share)
    for group, i in np.ndindex(len(weight_G), num_layers):
        for expert in range(num_experts):
            load = float(loads_GLE[group, i, expert])
            rows.add([(pairs_GLER[group, i, expert], 1.0)], load, load)
            for rank in range(num_ranks):
                terms = [(pairs_GLER[group, i, expert, rank], 1.0), (held_LERF[i, expert, rank], -load)]
                rows.add(terms, -np.inf, 0)
        for rank in range(num_ranks):
            rows.add([(pairs_GLER[group, i, :, rank], 1.0), (fullest_GL[group, i], -1.0)], -np.inf, 0)
    rows.add([(fullest_GL, np.broadcast_to(weight_G[:, None] / num_layers, fullest_GL.shape))], -np.inf, limit)
    is_whole, lowest = np.zeros(ends[-1]), np.zeros(ends[-1])
    is_whole[: ends[1]] = 1
    lowest[fullest_GL] = 1
    highest = np.full(ends[-1], np.inf)
    highest[: ends[1]] = 1
    cost, cost_LERF = np.zeros(ends[-1]), _moved_LERF(current, formats)
    unit = formats.native_bytes
    cost[held_LERF] = cost_LERF / unit
    result = milp(
        cost,
        integrality=is_whole,
        bounds=Bounds(lowest, highest),
        constraints=rows.constraint(ends[-1]),
        options={"time_limit": time_limit_s},
    )
    bound = 0 if result.mip_dual_bound is None else int(np.floor(max(result.mip_dual_bound, 0.0) * unit))
    if result.x is None:
        return LeastMoves(bound, None)
    is_held_LERF = result.x[held_LERF] > WHOLE
    layers = [
        LayerPlacement.even(layer.index, num_experts, _replicas(is_held_ERF, formats.names))
        for layer, is_held_ERF in zip(current.layers, is_held_LERF, strict=True)
    ]
    return LeastMoves(bound, layers)


def _grouped(steps_SLE: IntArray, num_ranks: int, num_groups: int) -> tuple[FloatArray, FloatArray]:
    """[G, L, E] mean load of each group in units of a rank's mean, and [G] the share of the steps in each group."""
    totals_SL1 = steps_SLE.sum(axis=2, keepdims=True)
    loads_SLE = steps_SLE * num_ranks / np.maximum(totals_SL1, 1)
    parts = np.array_split(loads_SLE, min(num_groups, len(loads_SLE)))
    return np.stack([part.mean(axis=0) for part in parts]), np.array([len(part) for part in parts]) / len(loads_SLE)


def _moved_LERF(current: Placement, formats: Formats) -> IntArray:
    """[L, E, R, F] bytes that a rank has to receive for a replica; what it converts from its own native one is free."""
    shape = (len(current.layers), current.layers[0].num_experts, current.topology.num_ranks, len(formats.names))
    moved_LERF = np.broadcast_to(formats.bytes_F, shape).copy()
    for moved_ERF, layer in zip(moved_LERF, current.layers, strict=True):
        for rank, expert, name in layer.replicas:
            if name == formats.native:
                moved_ERF[expert, rank] = 0
            elif name in formats.names:
                moved_ERF[expert, rank, formats.names.index(name)] = 0
    return moved_LERF


def _replicas(is_held_ERF: FloatArray, names: Sequence[str]) -> list[Replica]:
    return [Replica(rank, expert, names[name]) for expert, rank, name in np.argwhere(is_held_ERF).tolist()]
