"""What a finished placement promises: shares, its balance on the calibration steps, and the bound beside that."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import FloatArray
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.topology import home_ranks
from rq_ep.solver.bounds import least_home_bytes, lower_bound
from rq_ep.solver.precision import Formats
from rq_ep.solver.split import ByExpert, split
from rq_ep.solver.steps import LayerSteps
from rq_ep.solver.tables import replicas_of

BoolArray = npt.NDArray[np.bool_]


def certified(
    problem: PlacementProblem,
    strategy: str,
    steps: Sequence[LayerSteps],
    formats: Formats,
    held_LER: BoolArray,
    low_LE: BoolArray,
) -> Placement:
    """The placement in which rank r holds expert e where `held_LER` says so, low where `low_LE` does.

    The bound of a layer holds for every placement of that layer in as many bytes as it takes here; the bound in the
    certificate for every placement of the model in the whole budget; both under the cap on low-precision pairs.
    """
    stats, num_ranks, share = problem.stats, problem.topology.num_ranks, problem.max_low_precision_share
    home_bytes_L = [least_home_bytes(pairs_E, formats, share) for pairs_E in stats.counts.sum(axis=0)]
    layers = []
    for at, (layer_steps, held_ER, low_E) in enumerate(zip(steps, held_LER, low_LE, strict=True)):
        used = int((held_ER.sum(axis=1) * formats.bytes_of(low_E)).sum())
        max_replicas = stats.num_experts + (used - home_bytes_L[at]) // formats.low_bytes
        bound = lower_bound([layer_steps], max_replicas, num_ranks)
        layer = LayerPlacement.even(stats.layers[at], stats.num_experts, replicas_of(held_ER, formats.names_of(low_E)))
        layers.append(replace(_with_mean_shares(layer, layer_steps), bound=bound.value, binding=bound.binding))
    predicted = float(np.mean([layer.predicted for layer in layers]))
    num_experts = stats.num_layers * stats.num_experts
    extra = num_experts * (num_ranks - 1)
    if problem.budget_bytes_R is not None:
        extra = min(extra, (sum(problem.budget_bytes_R) - sum(home_bytes_L)) // formats.low_bytes)
    overall = lower_bound(steps, num_experts + extra, num_ranks)
    certificate = {
        "objective": "max/mean of pairs over ranks under the exact split, mean over calibration steps and layers",
        "predicted": predicted,
        "bound": overall.value,
        "gap": predicted / overall.value - 1,
        "binding": overall.binding,
        "steps": max(len(layer.counts_SE) for layer in steps),
        "standard": float(_contiguous_imbalance_L(problem, steps).mean()),
    }
    return problem.placement(strategy, layers, certificate=certificate)


def _with_mean_shares(layer: LayerPlacement, steps: LayerSteps) -> LayerPlacement:
    """Shares as the exact split deals them on average, and the max/mean it attains."""
    by_expert = ByExpert.of(layer.replicas, steps.num_ranks)
    quotas_C = np.zeros(len(by_expert.replicas_C))
    ratios = []
    for counts_E in steps.counts_SE:
        best = split(by_expert, counts_E)
        quotas_C += best.quotas_C
        ratios.append(best.fullest * steps.num_ranks / int(counts_E.sum()))
    shares_P = layer.shares_P.copy()
    totals_C = np.add.reduceat(quotas_C, by_expert.first_E[:-1])[by_expert.experts_C]
    shares_C = shares_P[by_expert.replicas_C]
    shares_P[by_expert.replicas_C] = np.divide(quotas_C, totals_C, out=shares_C, where=totals_C > 0)
    return replace(layer, shares_P=shares_P, predicted=float(np.mean(ratios)) if ratios else 1.0)


def _contiguous_imbalance_L(problem: PlacementProblem, steps: Sequence[LayerSteps]) -> FloatArray:
    """[L] max/mean of standard EP on the same steps."""
    num_ranks = problem.topology.num_ranks
    homes_E = home_ranks(problem.stats.num_experts, num_ranks)
    held_ER = homes_E[:, None] == np.arange(num_ranks)
    loads = [layer.loads_SE @ held_ER for layer in steps]
    return np.array([loads_SR.max(axis=1).mean() if len(loads_SR) else 1.0 for loads_SR in loads])
