"""Formats on a new load: other experts are stored low, those that are already are preferred, and ranks stay inside."""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.migration.fit_formats import within_budgets
from rq_ep.solver.objective.precision import ByteSavings, Formats


def refit_formats(
    problem: PlacementProblem, layers: Sequence[LayerPlacement], saved: int | None = None
) -> Sequence[LayerPlacement]:
    """The layers with the experts low that the new load allows; `layers` where nothing changes.

    An expert that becomes low frees bytes and moves none. One that becomes native has to be fetched. Where a rank then
    exceeds its budget, it drops replicas of experts that other ranks hold too; a search goes on from there.

    Args:
        problem: its caps, budgets and statistics.
        layers: the replicas of an expert share a format; where formats mix, nothing is changed.
        saved: bytes of one replica of each expert that the formats are to save; None: all that the caps allow.
    """
    formats = Formats.of(problem)
    if any(layer.replicas.mixed_formats for layer in layers):
        return layers
    stored_LE = _stored_LE(layers, formats)
    format_LE = ByteSavings.of(problem, formats, stored_LE).format_LE(saved)
    if (format_LE == stored_LE).all():
        return layers
    held = []
    for layer, format_E in zip(layers, format_LE, strict=True):
        names_E = formats.names_of(format_E)
        held.append({replica._replace(format=names_E[replica.expert]) for replica in layer.replicas})
    return within_budgets(problem, layers, held)


def saved_bytes(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> int:
    """Bytes that the formats of the layers save, of one replica of each expert."""
    formats = Formats.of(problem)
    return int((formats.native_bytes - formats.bytes_of(_stored_LE(layers, formats))).sum())


def _stored_LE(layers: Sequence[LayerPlacement], formats: Formats) -> IntArray:
    """[L, E] the number of each expert's format among `formats`; -1, which saves as the smallest does, for others."""
    stored_LE = np.zeros((len(layers), layers[0].num_experts), np.int64)
    number = {name: index for index, name in enumerate(formats.names)}
    for stored_E, layer in zip(stored_LE, layers, strict=True):
        table = layer.replicas
        stored_E[table.experts_P] = [number.get(name, -1) for name in table.formats_P]
    return stored_LE
