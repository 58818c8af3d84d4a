"""Formats on a new load: other experts are stored low, those that are already are preferred, and ranks stay inside."""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.migration.fit_formats import within_budgets
from rq_ep.solver.objective.precision import ByteSavings, Formats


def refit_formats(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> Sequence[LayerPlacement]:
    """The layers with the experts low that the new load allows; `layers` where nothing changes.

    Several low formats save as many bytes as they do in these layers or, where no expert is low yet, as many as they
    can.

    An expert that becomes low frees bytes and moves none. One that becomes native has to be fetched. Where a rank then
    exceeds its budget, it drops replicas of experts that other ranks hold too; a search goes on from there.

    Args:
        problem: its caps, budgets and statistics.
        layers: the replicas of an expert share a format; where formats mix, nothing is changed.
    """
    formats = Formats.of(problem)
    if any(layer.replicas.mixed_formats for layer in layers):
        return layers
    stored_LE = _stored_LE(layers, formats)
    savings = ByteSavings.of(problem, formats, stored_LE)
    saved = int((formats.native_bytes - formats.bytes_of(stored_LE)).sum())
    format_LE = savings.format_LE(saved if saved and len(formats.names) > 2 else None)
    if (format_LE == stored_LE).all():
        return layers
    held = []
    for layer, format_E in zip(layers, format_LE, strict=True):
        names_E = formats.names_of(format_E)
        held.append({replica._replace(format=names_E[replica.expert]) for replica in layer.replicas})
    return within_budgets(problem, layers, held)


def _stored_LE(layers: Sequence[LayerPlacement], formats: Formats) -> IntArray:
    """[L, E] the number of each expert's format among `formats`; -1, which saves as the smallest does, for others."""
    stored_LE = np.zeros((len(layers), layers[0].num_experts), np.int64)
    number = {name: index for index, name in enumerate(formats.names)}
    for stored_E, layer in zip(stored_LE, layers, strict=True):
        table = layer.replicas
        stored_E[table.experts_P] = [number.get(name, -1) for name in table.formats_P]
    return stored_LE
