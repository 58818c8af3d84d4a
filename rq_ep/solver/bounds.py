"""A bound that no placement of the same bytes can beat, from a linear programme over replica numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.precision import Formats
from rq_ep.solver.steps import LayerSteps


class Bound(NamedTuple):
    """Least max/mean over ranks, mean over steps and layers, and what keeps it from being lower.

    `binding` is `mean` (perfect balance is not excluded), `bytes`, or `hot expert` (no byte is left for any replica).
    """

    value: float
    binding: str


def least_home_bytes(pairs_E: IntArray, formats: Formats, max_share: float) -> int:
    """Bytes of one replica of each expert at least, with at most `max_share` of the pairs on low ones."""
    native = len(pairs_E) * formats.native_bytes
    if formats.low is None:
        return native
    coldest_first = np.cumsum(np.sort(pairs_E))
    num_low = int(np.searchsorted(coldest_first, max_share * int(pairs_E.sum()), side="right"))
    return native - num_low * (formats.native_bytes - formats.low_bytes)


def lower_bound(steps: Sequence[LayerSteps], max_replicas: int, num_ranks: int) -> Bound:
    """Balance that no placement with `max_replicas` replicas of these layers together can beat.

    Variables: n_e >= 1 replicas of each expert, T_s >= 1 the step's max/mean. A step's load r of an expert with n
    replicas puts at least r / n on some rank; the chords of r / n between whole n are linear and hold for all whole n.
    """
    # Planners on every rank import this package; SciPy would make up most of the time that takes.
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    num_extra = max_replicas - sum(layer.counts_SE.shape[1] for layer in steps)
    weights: list[FloatArray] = []
    least: list[FloatArray] = []
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    limits: list[float] = []
    num_steps = sum(len(layer.counts_SE) for layer in steps)
    num_hot, first_step = 0, 0
    for layer in steps:
        totals_S = layer.counts_SE.sum(axis=1)
        least.append(-(-totals_S // num_ranks) * num_ranks / np.maximum(totals_S, 1))
        weights.append(np.full(len(totals_S), 1 / (len(steps) * max(len(totals_S), 1))))
        hot = np.flatnonzero((layer.loads_SE > 1).any(axis=0))
        for step, column in zip(*np.nonzero(layer.loads_SE[:, hot] > 1), strict=True):
            load = float(layer.loads_SE[step, hot[column]])
            for n in range(1, min(int(np.ceil(load)), num_ranks)):
                slope = load / (n * (n + 1))
                rows += [len(limits)] * 2
                columns += [first_step + int(step), num_steps + num_hot + int(column)]
                values += [-1.0, -slope]
                limits.append(-load / n - slope * n)
        num_hot += len(hot)
        first_step += len(totals_S)
    if not num_steps:
        return Bound(1.0, "mean")
    floor = float(np.concatenate(weights) @ np.concatenate(least))
    if not limits:
        return Bound(floor, "mean")
    rows += [len(limits)] * num_hot
    columns += range(num_steps, num_steps + num_hot)
    values += [1.0] * num_hot
    limits.append(float(num_hot + max(num_extra, 0)))
    solution = linprog(
        np.concatenate([*weights, np.zeros(num_hot)]),
        A_ub=coo_array((values, (rows, columns)), shape=(len(limits), num_steps + num_hot)).tocsr(),
        b_ub=limits,
        bounds=[(value, None) for value in np.concatenate(least)] + [(1, num_ranks)] * num_hot,
        method="highs",
    )
    assert solution.status == 0, solution.message
    if solution.fun <= floor + 1e-6:
        return Bound(floor, "mean")
    return Bound(float(solution.fun), "bytes" if num_extra > 0 else "hot expert")
