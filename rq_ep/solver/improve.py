"""Local search: two equal-sized replicas change ranks where that relieves the fullest set of ranks of some step."""

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.solver.cuts import LayerBalance
from rq_ep.solver.fill import GOOD_ENOUGH

LEAST_STEP = 1e-5
PATIENCE = 200  # moves in a row that may fail before the search ends


def improve(layer: LayerBalance, bytes_E: IntArray, max_moves: int, generator: np.random.Generator) -> None:
    """Swap replicas between ranks, taking what lowers the mean exact maximum; no rank's bytes change."""
    best = layer.refine()
    failures = 0
    for _ in range(max_moves):
        if best <= GOOD_ENOUGH or failures >= PATIENCE:
            return
        failures += 1
        move = _propose(layer, bytes_E, generator)
        if move is None:
            continue
        one, two, from_rank, to_rank = move
        experts = [one, two]
        before_2R = layer.held_ER[experts]
        after_2R = before_2R.copy()
        after_2R[[0, 0, 1, 1], [from_rank, to_rank, to_rank, from_rank]] = [False, True, False, True]
        if layer.imbalance_with(experts, after_2R) >= best - LEAST_STEP:
            continue
        layer.hold(experts, after_2R)
        value = layer.refine()
        if value < best - LEAST_STEP:
            best, failures = value, 0
        else:
            layer.hold(experts, before_2R)


def _propose(
    layer: LayerBalance, bytes_E: IntArray, generator: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """An expert that a full set of ranks cannot get rid of, a rank of it, and a swap with a replica outside."""
    excess_S = layer.means_SG.max(axis=1) - 1
    if excess_S.sum() <= 0:
        return None
    step = int(np.searchsorted(np.cumsum(excess_S), generator.random() * excess_S.sum()))
    step = min(step, len(excess_S) - 1)
    fullest = int(layer.means_SG[step].argmax())
    outside = np.flatnonzero(~layer.sets_GR[fullest])
    weights_E = layer.steps.loads_SE[step] * layer.confined_EG[:, fullest]
    if not len(outside) or weights_E.sum() <= 0:
        return None
    one = int(np.searchsorted(np.cumsum(weights_E), generator.random() * weights_E.sum()))
    one = min(one, len(weights_E) - 1)
    ranks = np.flatnonzero(layer.held_ER[one])
    from_rank = int(ranks[generator.integers(len(ranks))])
    to_rank = int(outside[generator.integers(len(outside))])
    partners = np.flatnonzero(layer.held_ER[:, to_rank] & ~layer.held_ER[:, from_rank] & (bytes_E == bytes_E[one]))
    if layer.held_ER[one, to_rank] or not len(partners):
        return None
    return one, int(partners[generator.integers(len(partners))]), from_rank, to_rank
