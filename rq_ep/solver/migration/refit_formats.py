"""Formats on a new load: other experts are stored low, those that are already are preferred, and ranks stay inside."""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import BoolArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.migration.fit_formats import within_budgets
from rq_ep.solver.objective.precision import Formats, low_experts


def refit_formats(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> Sequence[LayerPlacement]:
    """The layers with the experts low that the new load allows; `layers` where nothing changes.

    An expert that becomes low frees bytes and moves none. One that becomes native has to be fetched. Where a rank then
    exceeds its budget, it drops replicas of experts that other ranks hold too; a search goes on from there.

    Args:
        problem: its caps, budgets and statistics.
        layers: the replicas of an expert share a format; where formats mix, nothing is changed.
    """
    formats = Formats.of(problem)
    if any(layer.replicas.mixed_formats for layer in layers):
        return layers
    stored_low_LE = _stored_low_LE(layers, formats)
    low_LE = low_experts(problem, formats, stored_low_LE)
    if (low_LE == stored_low_LE).all():
        return layers
    held = []
    for layer, low_E in zip(layers, low_LE, strict=True):
        names_E = formats.names_of(low_E)
        held.append({replica._replace(format=names_E[replica.expert]) for replica in layer.replicas})
    return within_budgets(problem, layers, held)


def _stored_low_LE(layers: Sequence[LayerPlacement], formats: Formats) -> BoolArray:
    """[L, E] whether the expert is stored in another format than the native one."""
    low_LE = np.zeros((len(layers), layers[0].num_experts), bool)
    for low_E, layer in zip(low_LE, layers, strict=True):
        is_low_P = np.array([name != formats.native for name in layer.replicas.formats_P], bool)
        low_E[layer.replicas.experts_P[is_low_P]] = True
    return low_LE
