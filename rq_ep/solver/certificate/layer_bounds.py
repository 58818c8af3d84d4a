"""The bounds that a certificate prints: of the whole model inside its limits, and of each layer in what it takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rq_ep.core.arrays import BoolArray
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.rules import Rules
from rq_ep.solver.certificate.generalization import mean_of
from rq_ep.solver.certificate.lower_bound import CLOSE, Bound, BoundedLayers, lower_bound
from rq_ep.solver.certificate.relaxation import BoundLimits
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.objective.objective import is_plain, least_ratio_S
from rq_ep.solver.workers import workers

PROGRAMS_TIME = 0.1  # of a time limit: what linear programs may take in addition to the search


def holds_for(problem: PlacementProblem) -> str:
    """The placements that the bound holds for, in the words of the certificate."""
    return "any placement, any split" if is_plain(problem) else "any placement with experts in the same formats"


def bounds_of(
    problem: PlacementProblem, placement: Placement, steps: Sequence[LayerSteps], is_lending: bool = False
) -> tuple[Bound, list[Bound]]:
    """The bound of every placement inside the problem's limits, and that of each layer in the bytes it takes here.

    Where pairs weigh differently, both hold for placements that store experts in the same formats. Where experts are
    lent, which takes room beside the placement's bytes, no number of bytes bounds.
    """
    if is_plain(problem):
        return _inside_limits(problem, placement, steps, is_lending)
    return _step_by_step(problem, placement, steps)


def _inside_limits(
    problem: PlacementProblem, placement: Placement, steps: Sequence[LayerSteps], is_lending: bool
) -> tuple[Bound, list[Bound]]:
    """The bound inside the budget and the cap, and that of each layer in what it takes of them.

    A rank's budget counts as far as whole replicas can fill it.
    """
    stats, num_ranks = problem.stats, problem.topology.num_ranks
    native = stats.expert_bytes[stats.native_format]
    low = min(stats.expert_bytes[name] for name in problem.formats) if problem.max_low_precision_share else native
    pairs_LE = stats.counts.sum(axis=0)
    fewest_LE, most_LE = None, None
    usable_R: BoolArray = np.ones(num_ranks, bool)
    if problem.rules != Rules() and not is_lending:
        allowed_LER = problem.rules.allowed_LER(stats, problem.topology)
        fewest_LE = problem.rules.fixed_LER(stats, problem.topology).sum(axis=2)
        most_LE = allowed_LER.sum(axis=2)
        usable_R[~allowed_LER.any(axis=(0, 1))] = False
    budget_R = None if is_lending else problem.budget_bytes_R
    if budget_R is not None:
        usable_R[np.array(budget_R) < min(low, native)] = False
    names = problem.formats if problem.max_low_precision_share else (stats.native_format,)
    sizes = {stats.expert_bytes[name] for name in names}
    limits = BoundLimits(
        num_ranks=num_ranks,
        num_usable=max(int(usable_R.sum()), 1),
        native_bytes=native,
        low_bytes=min(low, native),
        max_bytes=None if budget_R is None else sum(_filled(size, sizes) for size in budget_R),
        max_low_pairs=problem.max_low_precision_share * float(pairs_LE.sum()),
        mixes=any(layer.replicas.mixed_formats for layer in placement.layers),
    )
    is_over = _clock(problem.time_limit_s)

    def of_layer(i: int, layer: LayerPlacement) -> BoundedLayers:
        inside = replace(
            limits,
            max_bytes=None if is_lending else sum(stats.expert_bytes[name] for name in layer.replicas.formats_P),
            max_low_pairs=layer.low_pairs(pairs_LE[i], stats.native_format),
        )
        fewest, most = (None if array is None else array[[i]] for array in (fewest_LE, most_LE))
        return BoundedLayers.of([steps[i]], pairs_LE[[i]], inside, fewest, most)

    layers = [of_layer(i, layer) for i, layer in enumerate(placement.layers)]
    closed = [layer.closed() for layer in layers]
    left = [layer for layer, bound in zip(layers, closed, strict=True) if bound is None]
    with workers(problem.num_workers) as threads:
        programmed = threads.map(lambda layer: layer.programmed(is_over), left)
        overall = lower_bound(steps, pairs_LE, limits, fewest_LE, most_LE, is_over, threads)
        return overall, [bound or next(programmed) for bound in closed]


def _clock(time_limit_s: float | None) -> Callable[[], bool]:
    """Whether the part of the time limit is over that the linear programs may take beyond it."""
    if time_limit_s is None:
        return lambda: False
    deadline = time.monotonic() + PROGRAMS_TIME * time_limit_s
    return lambda: time.monotonic() >= deadline


def _filled(budget: int, sizes: set[int]) -> int:
    """The bytes of a rank's budget that whole replicas can fill; where they have more than two sizes, all of it."""
    large, small = max(sizes), min(sizes)
    if len(sizes) > 2 or small <= 0:
        return budget
    large_bytes_n = np.arange(budget // large + 1) * large
    return int((large_bytes_n + (budget - large_bytes_n) // small * small).max())


def _step_by_step(
    problem: PlacementProblem, placement: Placement, steps: Sequence[LayerSteps]
) -> tuple[Bound, list[Bound]]:
    """The mean, or whole experts that some rank must read: for placements that store experts in the same formats."""
    pairs = zip(placement.layers, steps, strict=True)
    values = [mean_of([least_ratio_S(problem, layer, of_layer)]) for layer, of_layer in pairs]
    bounds = [
        Bound(value, "mean" if value <= 1 + CLOSE else "whole experts") for value in [*values, float(np.mean(values))]
    ]
    return bounds[-1], bounds[:-1]
