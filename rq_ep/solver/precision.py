"""Which experts are stored in few bits: those that would be missed least, up to the cap on low-precision pairs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats


@dataclass(frozen=True)
class Formats:
    """The native format and the one below it that a problem allows: the smallest of those it names."""

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

    def bytes_of(self, low: npt.NDArray[np.bool_]) -> IntArray:
        """Bytes of one replica of each expert, low ones marked."""
        return np.where(low, self.low_bytes, self.native_bytes)

    def names_of(self, low_E: npt.NDArray[np.bool_]) -> list[str]:
        return [self.low if low and self.low else self.native for low in low_E.tolist()]


def damage_LE(stats: ExpertStats, low: str) -> FloatArray:
    """[L, E] expected loss of storing an expert low: what it contributes times its relative output error there.

    Its contribution is its importance where that was measured, else its gate mass, else its pairs; an error nobody
    measured is taken to be the same for all. How often an expert is used is not how much it matters.
    """
    contributions = (stats.importance, stats.gate_mass, stats.counts.sum(axis=0))
    contribution_LE = next(array for array in contributions if array is not None).astype(np.float64)
    if stats.error is None:
        return contribution_LE
    damage: FloatArray = contribution_LE * stats.error[:, :, stats.formats.index(low)]
    return damage


def least_missed(damage_E: FloatArray, pairs_E: IntArray, max_share: float) -> npt.NDArray[np.bool_]:
    """[E] experts to store low, by rising damage, while both their pairs and their damage keep to `max_share` of all.

    An expert that would exceed it is skipped. The cap on damage keeps a rare expert that matters from being taken only
    because its few pairs fit.
    """
    low_E = np.zeros(len(damage_E), bool)
    allowed_pairs, allowed_damage = max_share * int(pairs_E.sum()), max_share * float(damage_E.sum())
    pairs, damage = 0, 0.0
    if not allowed_pairs:
        return low_E
    for expert in np.lexsort((pairs_E, damage_E)).tolist():
        if pairs + int(pairs_E[expert]) <= allowed_pairs and damage + damage_E[expert] <= allowed_damage:
            low_E[expert] = True
            pairs += int(pairs_E[expert])
            damage += float(damage_E[expert])
    return low_E
