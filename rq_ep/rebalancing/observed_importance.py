"""Importance of experts as a sample of steps shows it, for those who serve without calibration."""

import numpy as np

from rq_ep.core.arrays import FloatArray

MEMORY = 4096.0  # pairs of an expert, mean over experts, after which older ones count less
PRIOR = 8.0  # pairs of the layer's mean that count for every expert, so that a few of its own do not mislead


class ObservedImportance:
    """What a pair of each expert contributes: its routing weight times the norm of the expert's output, on average.

    Times an expert's pairs that is its importance, by the definition of calibration. The mean of a pair is kept, as it
    depends less on the domain of the text than the number of pairs does.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._norm_LE = np.zeros((num_layers, num_experts))
        self._pairs_LE = np.zeros((num_layers, num_experts))

    def add(self, layer: int, experts: list[int], norms: list[float], pairs: list[float]) -> None:
        """Add sums over pairs of some experts of the layer at a position; those that are not finite are left out."""
        sums_2E = np.array([norms, pairs], np.float64).reshape(2, -1)
        is_finite_E = np.isfinite(sums_2E).all(axis=0)
        chosen = np.array(experts, np.int64)[is_finite_E]
        np.add.at(self._norm_LE[layer], chosen, sums_2E[0, is_finite_E])
        np.add.at(self._pairs_LE[layer], chosen, sums_2E[1, is_finite_E])
        if self._pairs_LE[layer].mean() > MEMORY:
            self._norm_LE[layer] /= 2
            self._pairs_LE[layer] /= 2

    def of_a_pair_LE(self) -> FloatArray | None:
        """[L, E] mean contribution of a pair; None: a layer was not sampled yet."""
        if not self._pairs_LE.any(axis=1).all():
            return None
        mean_L1 = self._norm_LE.sum(axis=1, keepdims=True) / self._pairs_LE.sum(axis=1, keepdims=True)
        mean_LE: FloatArray = (self._norm_LE + PRIOR * mean_L1) / (self._pairs_LE + PRIOR)
        return mean_LE
