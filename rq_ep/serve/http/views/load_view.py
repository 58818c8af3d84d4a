"""The load of experts and ranks in the HTTP process: since the start, and over the last seconds."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.serve.messages import LoadSums

RECENT_S = 10.0


class LayerSums:
    """Routed pairs of a layer."""

    def __init__(self, num_ranks: int, num_experts: int) -> None:
        self.pairs_R: IntArray = np.zeros(num_ranks, np.int64)
        self.counts_E: IntArray = np.zeros(num_experts, np.int64)
        self.num_calls = 0
        self.imbalance_sum = 0.0

    @property
    def imbalance(self) -> float:
        """max/mean over ranks, mean of the calls."""
        return self.imbalance_sum / self.num_calls if self.num_calls else 1.0


class LoadView:
    """Sums the load for `/v1/ep/load`.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total: dict[int, LayerSums] = {}
        self._recent: deque[tuple[float, LoadSums]] = deque()

    def add(self, loads: LoadSums) -> None:
        """Add the load of some steps, which need not have every layer."""
        _add(self._total, [loads])
        self._recent.append((self._clock(), loads))

    def view(self) -> dict[str, Any]:
        """Routed pairs by layer and rank, and by layer and expert; `imbalance_L`: max/mean over ranks, step by step.

        `num_calls_L`: steps that each layer's figures rest on.
        """
        while self._recent and self._recent[0][0] < self._clock() - RECENT_S:
            self._recent.popleft()
        layers = sorted(self._total)
        if not layers:
            return {"layers": [], "total": None, "recent": None}
        return {"layers": layers, "total": _view(self._total, layers), "recent": self._recent_view(layers)}

    def _recent_view(self, layers: list[int]) -> dict[str, Any] | None:
        if not self._recent:
            return None
        sums = {layer: LayerSums(len(old.pairs_R), len(old.counts_E)) for layer, old in self._total.items()}
        _add(sums, [loads for _, loads in self._recent])
        recent = _view(sums, layers)
        balancedness = float(np.mean([1 / imbalance for imbalance in recent["imbalance_L"]]))
        return {"window_s": RECENT_S, **recent, "balancedness": balancedness}


def _add(sums: dict[int, LayerSums], parts: Iterable[LoadSums]) -> None:
    for loads in parts:
        for at, layer in enumerate(loads["layers"]):
            pairs_R, counts_E = loads["pairs_LR"][at], loads["counts_LE"][at]
            if layer not in sums:
                sums[layer] = LayerSums(len(pairs_R), len(counts_E))
            sums[layer].pairs_R += np.array(pairs_R)
            sums[layer].counts_E += np.array(counts_E)
            sums[layer].num_calls += loads["num_calls_L"][at]
            sums[layer].imbalance_sum += loads["imbalance_L"][at] * loads["num_calls_L"][at]


def _view(sums: Mapping[int, LayerSums], layers: list[int]) -> dict[str, Any]:
    return {
        "pairs_LR": [sums[layer].pairs_R.tolist() for layer in layers],
        "counts_LE": [sums[layer].counts_E.tolist() for layer in layers],
        "imbalance_L": [sums[layer].imbalance for layer in layers],
        "num_calls_L": [sums[layer].num_calls for layer in layers],
    }
