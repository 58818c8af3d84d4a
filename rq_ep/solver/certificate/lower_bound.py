"""The lower bound that no placement inside the same limits can beat: closed cases, else the LP relaxation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.certificate.generalization import mean_of
from rq_ep.solver.certificate.relaxation import BoundLayer, BoundLimits, Prices, solve_jointly, solve_priced
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.workers import ALONE, Workers

CLOSE = 1e-6  # of max/mean: what differs by less is equal
MAX_ROWS = 6000  # of a linear program of all layers; one of more rows takes seconds


class Bound(NamedTuple):
    """The least max/mean over ranks, mean over steps and layers, and the constraint that binds it.

    `binding` is `mean` (perfect balance is not excluded), `bytes`, `replicas` (an expert may have no more of them), or
    `hot expert` (no bytes are left for a second replica of any expert); or the `time` was over, and the value is what
    whole pairs and usable ranks allow.
    """

    value: float
    binding: str


def least_first_replica_bytes(pairs_LE: IntArray, limits: BoundLimits) -> int:
    """The least bytes of one replica of each expert: as many low ones as the cap allows, coldest first."""
    saved = limits.native_bytes - limits.low_bytes
    coldest_first = np.cumsum(np.sort(pairs_LE, axis=None))
    num_low = int(np.searchsorted(coldest_first, limits.max_low_pairs, side="right")) if saved else 0
    return pairs_LE.size * limits.native_bytes - num_low * saved


@dataclass(frozen=True)
class BoundedLayers:
    """Layers to find the balance for that no placement of them together inside `limits` can beat, under any split."""

    layers: Sequence[BoundLayer]
    pairs_LE: IntArray
    limits: BoundLimits

    @classmethod
    def of(
        cls,
        steps: Sequence[LayerSteps],
        pairs_LE: IntArray,
        limits: BoundLimits,
        fewest_LE: IntArray | None = None,
        most_LE: IntArray | None = None,
    ) -> "BoundedLayers":
        """Those of some steps; the arguments are those of `lower_bound`."""
        usable = limits.num_usable
        fewest_LE = np.ones_like(pairs_LE) if fewest_LE is None else np.maximum(fewest_LE, 1)
        most_LE = np.full_like(pairs_LE, usable) if most_LE is None else np.minimum(most_LE, usable)
        rows = zip(steps, pairs_LE, fewest_LE, most_LE, strict=True)
        return cls([BoundLayer.of(layer, limits, *of_experts) for layer, *of_experts in rows], pairs_LE, limits)

    def closed(self) -> Bound | None:
        """The bound where it takes no linear program."""
        layers, limits, floor = self.layers, self.limits, self._floor
        if _balance_fits(layers, limits):
            return Bound(floor, "mean")
        if limits.max_bytes is None or any((layer.fewest_E > 1).any() for layer in layers):
            return None
        if limits.max_bytes - least_first_replica_bytes(self.pairs_LE, limits) >= limits.low_bytes:
            return None
        value = mean_of([layer.alone_S for layer in layers])
        return Bound(value, "hot expert") if value > floor + CLOSE else Bound(floor, "mean")

    def programmed(self, is_over: Callable[[], bool], workers: Workers = ALONE) -> Bound:
        """The bound by linear programs, if there is time for them."""
        layers, limits, floor = self.layers, self.limits, self._floor
        if is_over():
            return Bound(floor, "time")
        num_rows, weight = sum(layer.num_chords for layer in layers), 1 / len(layers)
        if len(layers) == 1 or num_rows <= MAX_ROWS:
            value, prices = solve_jointly(layers, weight, limits)
        else:
            # Lagrangian relaxation: any prices give a bound, layer by layer; those of a few layers are nearly the best.
            prices = _prices_of_some_layers(layers, limits, MAX_ROWS / num_rows)
            value = solve_priced(layers, weight, limits, prices, workers)
        value += weight * sum(not len(layer.floor_S) for layer in layers)  # those without pairs are balanced
        if value <= floor + CLOSE:
            return Bound(floor, "mean")
        return Bound(value, "bytes" if prices.byte > 0 else "replicas")

    @property
    def _floor(self) -> float:
        return mean_of([layer.floor_S for layer in self.layers])


def lower_bound(
    steps: Sequence[LayerSteps],
    pairs_LE: IntArray,
    limits: BoundLimits,
    fewest_LE: IntArray | None = None,
    most_LE: IntArray | None = None,
    is_over: Callable[[], bool] = lambda: False,
    workers: Workers = ALONE,
) -> Bound:
    """The balance that no placement of these layers together inside `limits` can beat, under any split of the steps.

    Args:
        steps: calibration steps of each layer.
        pairs_LE: pairs of the whole record, to which the cap applies.
        limits: bytes, formats, ranks and cap.
        fewest_LE: replicas that each expert has at least; default one.
        most_LE: replicas that it has at most; default one on every usable rank.
        is_over: whether the time is over, so that no linear program may be solved.
        workers: solve linear programs of single layers.
    """
    bounded = BoundedLayers.of(steps, pairs_LE, limits, fewest_LE, most_LE)
    return bounded.closed() or bounded.programmed(is_over, workers)


def _prices_of_some_layers(layers: Sequence[BoundLayer], limits: BoundLimits, fraction: float) -> Prices:
    """The prices of a fraction of the layers inside their part of the limits."""
    number = max(round(fraction * len(layers)), 1)
    some = [layers[i] for i in np.linspace(0, len(layers) - 1, number).astype(int)]
    part = replace(
        limits,
        max_bytes=None if limits.max_bytes is None else limits.max_bytes * number // len(layers),
        max_low_pairs=limits.max_low_pairs * sum(map(_pairs, some)) / max(sum(map(_pairs, layers)), 1),
    )
    return solve_jointly(some, 1 / len(layers), part)[1]


def _pairs(layer: BoundLayer) -> int:
    return int(layer.pairs_E.sum())


def _balance_fits(layers: Sequence[BoundLayer], limits: BoundLimits) -> bool:
    """Whether replicas for perfect balance fit; what to store low is a fractional knapsack, filled greedily."""
    if any((layer.peak_E > layer.most_E).any() for layer in layers):
        return False
    if limits.max_bytes is None:
        return True
    replicas = np.concatenate([layer.most_E for layer in layers]).astype(np.float64)
    pairs = np.concatenate([layer.pairs_E for layer in layers]).astype(np.float64)
    order = np.argsort(pairs / replicas, kind="stable")
    fraction: FloatArray = np.divide(
        limits.max_low_pairs - (np.cumsum(pairs[order]) - pairs[order]),
        pairs[order],
        out=np.ones_like(pairs),
        where=pairs[order] > 0,
    ).clip(0, 1)
    saved = (limits.native_bytes - limits.low_bytes) * float(replicas[order] @ fraction)
    return limits.native_bytes * float(replicas.sum()) - saved <= limits.max_bytes
