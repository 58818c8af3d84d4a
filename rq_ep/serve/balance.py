"""The load of the experts and ranks as the HTTP process knows it: since the start, and lately."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

RECENT_S = 10.0


class Balance:
    """What `/v1/ep/load` tells.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._layers: list[int] = []
        self._total: tuple[Any, Any] | None = None
        self._recent: deque[tuple[float, Mapping[str, Any]]] = deque()

    def add(self, loads: Mapping[str, Any]) -> None:
        """Add what `LoadTotals.take` gave."""
        arrays = np.array(loads["pairs_LR"], np.int64), np.array(loads["counts_LE"], np.int64)
        if self._total is None:
            self._total = tuple(np.zeros_like(array) for array in arrays)  # type: ignore[assignment]
        self._layers = list(loads["layers"])
        for total, array in zip(self._total or (), arrays, strict=True):
            total += array
        self._recent.append((self._clock(), loads))

    def view(self) -> dict[str, Any]:
        """Routed pairs by layer and rank, and by layer and expert; `imbalance_L`: max/mean over ranks, step by step."""
        while self._recent and self._recent[0][0] < self._clock() - RECENT_S:
            self._recent.popleft()
        if self._total is None:
            return {"layers": [], "total": None, "recent": None}
        pairs_LR, counts_LE = self._total
        total = {"pairs_LR": pairs_LR.tolist(), "counts_LE": counts_LE.tolist()}
        return {"layers": self._layers, "total": total, "recent": self._recent_view()}

    def _recent_view(self) -> dict[str, Any] | None:
        if not self._recent:
            return None
        parts = [loads for _, loads in self._recent]
        calls_S = [part["num_calls"] for part in parts]
        imbalance_L = np.average([part["imbalance_L"] for part in parts], axis=0, weights=calls_S)
        return {
            "window_s": RECENT_S,
            "pairs_LR": np.sum([part["pairs_LR"] for part in parts], axis=0).tolist(),
            "counts_LE": np.sum([part["counts_LE"] for part in parts], axis=0).tolist(),
            "imbalance_L": imbalance_L.tolist(),
            "balancedness": float(np.mean(1 / imbalance_L)),
        }
