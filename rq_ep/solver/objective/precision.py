"""The experts stored in low precision: those of least expected damage, up to the caps on pairs and error."""

from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats

STORED_DISCOUNT = 0.5  # to make an expert native again takes its weights from elsewhere; to make it low does not


@dataclass(frozen=True)
class Formats:
    """The native format, and the low one: the smallest of the smaller formats that a problem allows."""

    native: str
    native_bytes: int
    low: str | None
    low_bytes: int

    @classmethod
    def of(cls, problem: PlacementProblem) -> "Formats":
        size, native = problem.stats.expert_bytes, problem.stats.native_format
        smaller = [name for name in problem.formats if size[name] < size[native]]
        low = min(smaller, key=lambda name: (size[name], name)) if smaller else None
        if problem.max_low_precision_share == 0:
            low = None
        return cls(native, size[native], low, size[low] if low else size[native])

    def bytes_of(self, low: BoolArray) -> IntArray:
        """Bytes of one replica of each expert, low ones marked."""
        return np.where(low, self.low_bytes, self.native_bytes)

    def names_of(self, low_E: BoolArray) -> list[str]:
        """The format of each expert, low ones marked."""
        return [self.low if low and self.low else self.native for low in low_E.tolist()]


def damage_LE(stats: ExpertStats, low: str) -> FloatArray:
    """[L, E] expected damage of storing an expert low; infinite for one that calibration never visited.

    It is the KL divergence of the model's output where that was measured for each expert. Else it is the expert's
    contribution times its relative output error, as a share of the layer's, so that layers of larger outputs are not
    spared for that; errors that were not measured are taken to be equal. How often an expert is used does not say how
    much it matters.
    """
    damages_LE: FloatArray
    if stats.kl is not None:
        damages_LE = stats.kl[:, :, stats.formats.index(low)].copy()
    else:
        damages_LE = contributions_LE(stats)
        if stats.error is not None:
            damages_LE = damages_LE * stats.error[:, :, stats.formats.index(low)]
        damages_LE = damages_LE / np.maximum(damages_LE.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    if stats.visits is not None and stats.visits.any():
        damages_LE[stats.visits == 0] = np.inf
    return damages_LE


def contributions_LE(stats: ExpertStats) -> FloatArray:
    """[L, E] contribution of each expert: its importance where that was measured, else gate mass, else pairs."""
    measured = (stats.importance, stats.gate_mass, stats.counts.sum(axis=0))
    return next(array for array in measured if array is not None).astype(np.float64)


def low_experts(problem: PlacementProblem, formats: Formats, stored_low_LE: BoolArray | None = None) -> BoolArray:
    """[L, E] experts to store low: those of least damage in all layers, up to the caps on pairs and on error.

    Experts that are stored low already are taken at `STORED_DISCOUNT` times their damage.
    """
    stats = problem.stats
    if formats.low is None:
        return np.zeros((stats.num_layers, stats.num_experts), bool)
    damages_LE = damage_LE(stats, formats.low)
    pairs_LE = stats.counts.sum(axis=0)
    errors_LE = error_LE(stats, formats.low) - error_LE(stats, formats.native)
    max_error = np.inf if problem.max_error is None else problem.max_error - error_LE(stats, formats.native).sum()
    rank_LE = damages_LE if stored_low_LE is None else np.where(stored_low_LE, STORED_DISCOUNT, 1.0) * damages_LE
    low = least_damage_first(
        damages_LE.ravel(),
        pairs_LE.ravel(),
        problem.max_low_precision_share,
        errors_LE.ravel(),
        max_error,
        rank_LE.ravel(),
    )
    return low.reshape(pairs_LE.shape)


def error_LE(stats: ExpertStats, name: str) -> FloatArray:
    """[L, E] what each expert adds to the importance-weighted mean relative output error, stored in this format."""
    if stats.error is None:
        return np.zeros(stats.counts.shape[1:])
    contribution_LE = contributions_LE(stats)
    added: FloatArray = contribution_LE * stats.error[:, :, stats.formats.index(name)]
    return added / max(float(contribution_LE.sum()), np.finfo(np.float64).tiny)


def least_damage_first(
    damage_E: FloatArray,
    pairs_E: IntArray,
    max_share: float,
    errors_E: FloatArray | None = None,
    max_error: float = np.inf,
    order_E: FloatArray | None = None,
) -> BoolArray:
    """[E] experts to store low, by rising `order_E` (default: damage), while their pairs and damage keep to a share.

    Neither their pairs nor their damage exceed `max_share` of all. Greedy knapsack: an expert that would exceed it, or
    of infinite damage, is skipped. The cap on damage keeps an expert of few pairs that matters from being taken only
    because its pairs fit. The `errors_E` of the experts taken add up to `max_error` at most.
    """
    low_E = np.zeros(len(damage_E), bool)
    allowed_pairs, allowed_damage = (
        max_share * int(pairs_E.sum()),
        max_share * float(damage_E[np.isfinite(damage_E)].sum()),
    )
    errors = np.zeros(len(damage_E)) if errors_E is None else errors_E
    pairs, damage, error = 0, 0.0, 0.0
    if not allowed_pairs:
        return low_E
    for expert in np.lexsort((pairs_E, damage_E if order_E is None else order_E)).tolist():
        more = (pairs + int(pairs_E[expert]), damage + float(damage_E[expert]), error + float(errors[expert]))
        if more[0] <= allowed_pairs and more[1] <= allowed_damage and more[2] <= max_error:
            low_E[expert] = True
            pairs, damage, error = more
    return low_E
