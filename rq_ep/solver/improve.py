"""Local search: replicas change ranks, or give way to others, where that relieves the fullest ranks of some step.

The first improvement is taken. Simulated annealing was tried and was no better at equal time.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import IntArray
from rq_ep.solver.cuts import LayerBalance
from rq_ep.solver.fill import GOOD_ENOUGH

LEAST_STEP = 1e-5
REPLACE_SHARE = 0.3  # of moves, where the partner has another replica


class Move(NamedTuple):
    """Who holds two experts after a move."""

    experts: list[int]
    held_2R: npt.NDArray[np.bool_]


def improve(
    layer: LayerBalance, bytes_E: IntArray, free_R: IntArray, max_moves: int, generator: np.random.Generator
) -> None:
    """Lower the mean exact maximum of `layer` by `max_moves` moves at most, inside `free_R`, which is kept current."""
    best = layer.refine()
    for _ in range(max_moves):
        if best <= GOOD_ENOUGH:
            return
        move = _propose(layer, generator)
        if move is None:
            continue
        before_2R = layer.held_ER[move.experts]
        left_R = free_R - bytes_E[move.experts] @ (move.held_2R.astype(np.int64) - before_2R)
        if left_R.min() < 0 or layer.imbalance_with(move.experts, move.held_2R) >= best - LEAST_STEP:
            continue
        layer.hold(move.experts, move.held_2R)
        value = layer.refine(best - LEAST_STEP)
        if value < best - LEAST_STEP:
            best = value
            free_R[:] = left_R
        else:
            layer.hold(move.experts, before_2R)


def trim(layer: LayerBalance, bytes_E: IntArray, free_R: IntArray) -> None:
    """Drop replicas that the layer's balance can do without, so that their bytes can serve other layers."""
    if layer.refine() > GOOD_ENOUGH:
        return
    for expert, rank in zip(*(axis.tolist() for axis in np.nonzero(layer.held_ER)), strict=True):
        held_R = layer.held_ER[expert].copy()
        held_R[rank] = False
        if held_R.any() and layer.imbalance_with([expert], held_R[None]) <= GOOD_ENOUGH:
            before_R = layer.held_ER[expert].copy()
            layer.hold([expert], held_R[None])
            if layer.refine() <= GOOD_ENOUGH:
                free_R[rank] += bytes_E[expert]
            else:
                layer.hold([expert], before_R[None])


def _propose(layer: LayerBalance, generator: np.random.Generator) -> Move | None:
    """For an expert that a full set of ranks cannot get rid of: a swap with a replica outside, or the place of one."""
    excess_S = layer.means_SG.max(axis=1) - 1
    step = _draw(excess_S, generator)
    if step is None:
        return None
    fullest = int(layer.means_SG[step].argmax())
    outside = np.flatnonzero(~layer.sets_GR[fullest])
    one = _draw(layer.steps.loads_SE[step] * layer.confined_EG[:, fullest], generator)
    if one is None or not len(outside):
        return None
    to_rank = int(outside[int(generator.random() * len(outside))])
    ranks = np.flatnonzero(layer.held_ER[one])
    from_rank = int(ranks[int(generator.random() * len(ranks))])
    partners = np.flatnonzero(layer.held_ER[:, to_rank])
    two = int(partners[int(generator.random() * len(partners))]) if len(partners) else one
    if two == one or layer.held_ER[one, to_rank]:
        return None
    experts = [one, two]
    held_2R = layer.held_ER[experts]
    if generator.random() < REPLACE_SHARE and held_2R[1].sum() > 1:
        held_2R[:, to_rank] = [True, False]
        return Move(experts, held_2R)
    if held_2R[1, from_rank]:
        return None
    held_2R[:, from_rank] = [False, True]
    held_2R[:, to_rank] = [True, False]
    return Move(experts, held_2R)


def _draw(weights: npt.NDArray[np.float64], generator: np.random.Generator) -> int | None:
    """An index drawn with these weights, or None if there is none."""
    running = np.cumsum(weights)
    if not len(running) or running[-1] <= 0:
        return None
    return min(int(np.searchsorted(running, generator.random() * running[-1], side="right")), len(weights) - 1)
