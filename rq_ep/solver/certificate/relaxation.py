"""The LP relaxation behind the bound: numbers of replicas and formats may be fractions, and the split is free.

Variables: T_s, the max/mean of each step s; for each expert n, its replicas, m, those of them that are low, and z,
whether it is low. A step's load r of an expert with n replicas puts at least r / n on some rank. The chords of r / n
between whole n are linear, and hold for all whole n. No more than N replicas help an expert, N being the ceiling of its
largest r. So it has low replicas, m <= N z, only as far as its pairs count against the cap.

Axes: e experts of all layers together; A chords.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.workers import ALONE, Workers


@dataclass(frozen=True)
class BoundLimits:
    """The limits of every placement that a bound holds for."""

    num_ranks: int
    num_usable: int  # ranks that may hold an expert at all
    native_bytes: int
    low_bytes: int  # of one expert in the smallest format; `native_bytes` if no other may be used
    max_bytes: int | None  # of all layers and ranks together; None: any number
    max_low_pairs: float  # pairs of the record on low experts, all layers together
    mixes: bool = False  # whether replicas of one expert may differ in format


class Prices(NamedTuple):
    """Shadow prices: by how much the bound falls for one more byte, and for one more pair in low precision."""

    byte: float
    pair: float


@dataclass(frozen=True)
class BoundLayer:
    """One layer in the linear program."""

    loads_SE: FloatArray  # in units of the mean rank load
    floor_S: FloatArray  # max/mean that whole pairs and usable ranks alone allow
    pairs_E: IntArray
    fewest_E: IntArray
    most_E: IntArray  # beyond which an expert gains nothing, or may have no more

    @classmethod
    def of(
        cls,
        layer: LayerSteps,
        limits: BoundLimits,
        pairs_E: IntArray,
        fewest_E: IntArray,
        most_E: IntArray,
    ) -> "BoundLayer":
        totals_S = layer.counts_SE.sum(axis=1)
        floor_S = -(-totals_S // limits.num_usable) * limits.num_ranks / np.maximum(totals_S, 1)
        useful_E = np.ceil(layer.loads_SE.max(axis=0, initial=0.0)).astype(np.int64)
        return cls(
            layer.loads_SE,
            floor_S,
            pairs_E,
            fewest_E,
            np.maximum(np.minimum(useful_E, most_E), fewest_E),
        )

    @property
    def peak_E(self) -> FloatArray:
        """[E] the largest load of any step."""
        peak_E: FloatArray = self.loads_SE.max(axis=0, initial=0.0)
        return peak_E

    @property
    def alone_S(self) -> FloatArray:
        """max/mean of each step at least if no expert has a second replica."""
        alone_S: FloatArray = np.maximum(self.floor_S, self.loads_SE.max(axis=1, initial=0.0))
        return alone_S

    @property
    def num_chords(self) -> int:
        """Rows of the linear program."""
        return int(np.minimum(np.ceil(self.loads_SE) - 1, self.most_E - 1).clip(min=0).sum())


def solve_jointly(layers: Sequence[BoundLayer], weight: float, limits: BoundLimits) -> tuple[float, Prices]:
    """The least sum of the layers' mean max/mean times `weight`, inside `limits` together, and the limits' prices."""
    program = _LinearProgram.of(layers, weight, limits)
    solution = program.solve(None, limits)
    prices = -solution.ineqlin.marginals
    byte = float(prices[0]) / limits.native_bytes if limits.max_bytes is not None else 0.0
    return float(solution.fun), Prices(byte, float(prices[1]) / program.num_pairs)


def solve_priced(
    layers: Sequence[BoundLayer], weight: float, limits: BoundLimits, prices: Prices, workers: Workers = ALONE
) -> float:
    """A lower bound on `solve_jointly`, layer by layer, for any prices of the limits (Lagrangian relaxation)."""
    value = -prices.pair * limits.max_low_pairs
    if limits.max_bytes is not None:
        value -= prices.byte * limits.max_bytes

    def of_layer(layer: BoundLayer) -> float:
        return float(_LinearProgram.of([layer], weight, limits).solve(prices, limits).fun)

    return value + sum(workers.map(of_layer, layers))


@dataclass(frozen=True)
class _LinearProgram:
    """Columns T (steps), n, z, m (experts). Bytes are in native experts, pairs a share: near 1 like all else."""

    objective: FloatArray
    bytes_row: FloatArray
    pairs_row: FloatArray
    rows: Any  # sparse: the limits of bytes and pairs first
    right: FloatArray  # of all rows but these two
    bounds: FloatArray
    num_pairs: int

    @classmethod
    def of(cls, layers: Sequence[BoundLayer], weight: float, limits: BoundLimits) -> "_LinearProgram":
        # Planners on every rank import this package; SciPy would make up most of the time that takes.
        from scipy.sparse import csr_array

        chords = _Chords.of(layers)
        least_S = [np.maximum(la.floor_S, (la.loads_SE / la.most_E).max(axis=1, initial=0.0)) for la in layers]
        weights = [np.full(len(la.floor_S), weight / max(len(la.floor_S), 1)) for la in layers]
        pairs_e = np.concatenate([la.pairs_E for la in layers])
        min_e = np.concatenate([la.fewest_E for la in layers]).astype(np.float64)
        max_e = np.concatenate([la.most_E for la in layers]).astype(np.float64)
        num_steps, num_experts, num_chords = sum(map(len, least_S)), len(pairs_e), len(chords.right_A)
        none_S, none_e, one_e = np.zeros(num_steps), np.zeros(num_experts), np.ones(num_experts)
        has_low = float(limits.low_bytes < limits.native_bytes)
        saved = 1 - limits.low_bytes / limits.native_bytes
        num_pairs = max(int(pairs_e.sum()), 1)
        low = np.concatenate([*least_S, min_e, none_e, none_e])
        high = np.concatenate([np.full(num_steps, np.inf), max_e, has_low * one_e, has_low * max_e])
        bytes_row = np.concatenate([none_S, one_e, none_e, -saved * one_e])
        pairs_row = np.concatenate([none_S, none_e, pairs_e / num_pairs, none_e])
        column_C = np.arange(len(low))
        n_e, z_e, m_e = column_C[num_steps:].reshape(3, num_experts)
        chord_A = 2 + np.arange(num_chords)
        native_e = 2 + num_chords + np.arange(num_experts)
        entries = [
            (np.zeros_like(column_C), column_C, bytes_row),
            (np.ones_like(column_C), column_C, pairs_row),
            (chord_A, chords.step_A, np.full(num_chords, -1.0)),
            (chord_A, n_e[chords.expert_A], -chords.slope_A),
            *((native_e, n_e, -one_e), (native_e, z_e, -one_e), (native_e, m_e, one_e)),  # m <= n - 1 + z
        ]
        right = [chords.right_A, -one_e]  # one replica of a native expert is native
        if not limits.mixes:
            entries += [(native_e + num_experts, z_e, -max_e), (native_e + num_experts, m_e, one_e)]  # m <= N z
            right.append(none_e)
        row, column, value = map(np.concatenate, zip(*entries, strict=True))
        return cls(
            objective=np.concatenate([*weights, none_e, none_e, none_e]),
            bytes_row=bytes_row,
            pairs_row=pairs_row,
            rows=csr_array((value, (row, column))),
            right=np.concatenate(right),
            bounds=np.column_stack([low, high]),
            num_pairs=num_pairs,
        )

    def solve(self, prices: Prices | None, limits: BoundLimits) -> Any:
        """SciPy's solution, inside the limits or, with prices, paying for the bytes and pairs it takes."""
        from scipy.optimize import linprog

        objective, rows, right = self.objective, self.rows, self.right
        if prices is None:
            everything = limits.num_ranks * float(self.bytes_row.clip(min=0).sum())
            max_bytes = everything if limits.max_bytes is None else limits.max_bytes / limits.native_bytes
            right = np.concatenate([[max_bytes, limits.max_low_pairs / self.num_pairs], right])
        else:
            rows = rows[2:]
            objective = objective + prices.byte * limits.native_bytes * self.bytes_row
            objective = objective + prices.pair * self.num_pairs * self.pairs_row
        solution = linprog(objective, A_ub=rows, b_ub=right, bounds=self.bounds, method="highs")
        assert solution.status == 0, solution.message
        return solution


class _Chords(NamedTuple):
    """Rows -T_s - slope * n <= right for all chords between n and n + 1 replicas."""

    step_A: IntArray  # of all layers together, as experts are
    expert_A: IntArray
    slope_A: FloatArray
    right_A: FloatArray

    @classmethod
    def of(cls, layers: Sequence[BoundLayer]) -> "_Chords":
        chords = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))]
        first_step, first_expert = 0, 0
        for layer in layers:
            for n in range(1, int(layer.most_E.max())):
                step_A, expert_A = np.nonzero((layer.loads_SE > n) & (n < layer.most_E))
                load_A = layer.loads_SE[step_A, expert_A]
                slope_A = load_A / (n * (n + 1))
                chords.append((first_step + step_A, first_expert + expert_A, slope_A, -load_A / n - slope_A * n))
            first_step += len(layer.floor_S)
            first_expert += len(layer.most_E)
        return cls(*map(np.concatenate, zip(*chords, strict=True)))
