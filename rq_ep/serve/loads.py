"""Counting the load of every layer and rank while serving, at the price of an addition."""

import threading
from typing import Any

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan, imbalance
from rq_ep.moe.telemetry import Laps, Telemetry


class LoadTotals(Telemetry):
    """Telemetry that keeps sums instead of steps. Every rank plans the same, so rank 0's sums speak for all."""

    def __init__(self) -> None:
        super().__init__(max_records=0)
        self._lock = threading.Lock()
        self._pairs: dict[int, IntArray] = {}
        self._imbalances: dict[int, list[float]] = {}

    def record(
        self, layer: int, rank: int, counts_RE: IntArray, plan: DispatchPlan, laps: Laps, transfer_bytes_R: IntArray
    ) -> None:
        loads_R = plan.loads_R
        if not loads_R.any():
            return
        with self._lock:
            self._pairs[layer] = self._pairs[layer] + loads_R if layer in self._pairs else loads_R
            self._imbalances.setdefault(layer, []).append(imbalance(loads_R))

    def take(self) -> dict[str, Any] | None:
        """Pairs by layer and rank and each layer's mean imbalance, since the last call; None if there was no step."""
        with self._lock:
            pairs, imbalances = self._pairs, self._imbalances
            self._pairs, self._imbalances = {}, {}
        if not pairs:
            return None
        layers = sorted(pairs)
        return {
            "layers": layers,
            "pairs_LR": [pairs[layer].tolist() for layer in layers],
            "imbalance_L": [float(np.mean(imbalances[layer])) for layer in layers],
        }
