"""The first replica of every expert: as many for each rank as its bytes hold, the heaviest experts placed first (LPT).

Axes: H nodes.
"""

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats


def assign_first_replicas(
    mean_LE: FloatArray, low_LE: BoolArray, formats: Formats, budget_R: IntArray, group_size: int
) -> IntArray | None:
    """[L, E] a rank for every expert, or None if they do not fit.

    The next expert goes to the rank with most bytes left over all layers, so that room for half an expert in one layer
    is not lost for the next. With room for every expert in the native format this never fails.

    Args:
        mean_LE: load of each expert, to place the heaviest first.
        low_LE: experts stored in the low format.
        formats: the two formats.
        budget_R: bytes of each rank, over all layers.
        group_size: low experts that a rank gets at a time; a group that makes room for a whole native replica helps
            where ranks have few experts.
    """
    free_R = budget_R.copy()
    ranks_LE = np.empty(low_LE.shape, np.int64)
    for mean_E, low_E, ranks_E in zip(mean_LE, low_LE, ranks_LE, strict=True):
        num_low = int(low_E.sum())
        num_low_R = _experts_per_rank(num_low, formats.low_bytes, group_size, free_R)
        if num_low_R is None:
            return None
        num_native_R = _experts_per_rank(len(low_E) - num_low, formats.native_bytes, 1, free_R)
        if num_native_R is None:
            return None
        load_R = np.zeros(len(budget_R))
        for is_low, number_R in ((False, num_native_R), (True, num_low_R)):
            experts = np.flatnonzero(low_E == is_low)
            for expert in experts[np.argsort(-mean_E[experts], kind="stable")].tolist():
                rank = int(np.where(number_R > 0, load_R, np.inf).argmin())
                ranks_E[expert] = rank
                number_R[rank] -= 1
                load_R[rank] += mean_E[expert]
    return ranks_LE


def _experts_per_rank(number: int, size: int, group_size: int, free_R: IntArray) -> IntArray | None:
    """[R] how many of `number` experts of equal size each rank gets; takes their bytes off `free_R`."""
    number_R = np.zeros(len(free_R), np.int64)
    while number:
        count = min(group_size, number)
        if free_R.max() < count * size:
            count = 1
        if free_R.max() < size:
            return None
        fits_R = free_R >= count * size
        fewest_R = np.where(fits_R, number_R, np.iinfo(np.int64).max) if group_size > 1 else -free_R
        rank = int(np.lexsort((-free_R, fewest_R))[0])
        number_R[rank] += count
        free_R[rank] -= count * size
        number -= count
    return number_R


def complete_first_replicas(
    held_LER: BoolArray,
    mean_LE: FloatArray,
    bytes_LE: IntArray,
    budget_R: IntArray,
    allowed_LER: BoolArray,
    fixed_LER: BoolArray,
) -> BoolArray | None:
    """[L, E, R] `held_LER` with what is fixed and a replica of every expert that has none; None if it does not fit.

    Replicas of least load are dropped first from ranks whose bytes they exceed. Of the missing experts, those of fewest
    allowed ranks come first, then the heaviest; each goes to the least loaded of the ranks with most bytes left.
    """
    held_LER = (held_LER & allowed_LER) | fixed_LER
    free_R = budget_R - np.einsum("ler,le->r", held_LER, bytes_LE)
    load_LE = mean_LE / np.maximum(held_LER.sum(axis=2), 1)
    lightest_first = np.argsort(load_LE, axis=None, kind="stable")
    for rank in np.flatnonzero(free_R < 0).tolist():
        for i, expert in np.stack(np.unravel_index(lightest_first, load_LE.shape), axis=1).tolist():
            if free_R[rank] < 0 and held_LER[i, expert, rank] and not fixed_LER[i, expert, rank]:
                held_LER[i, expert, rank] = False
                free_R[rank] += bytes_LE[i, expert]
    if free_R.min() < 0:
        return None
    num_allowed_LE = allowed_LER.sum(axis=2)
    for i, held_ER in enumerate(held_LER):
        load_R = load_LE[i] @ held_ER
        for expert in np.lexsort((-mean_LE[i], num_allowed_LE[i])).tolist():
            if held_ER[expert].any():
                continue
            size = bytes_LE[i, expert]
            fits_R = allowed_LER[i, expert] & (free_R >= size)
            if not fits_R.any():
                return None
            roomy_R = fits_R & (free_R > free_R[fits_R].max() - size)
            rank = int(np.where(roomy_R, load_R, np.inf).argmin())
            held_ER[expert, rank] = True
            free_R[rank] -= size
            load_R[rank] += mean_LE[i, expert]
    return held_LER


def drop_beyond_node_spread(held_LER: BoolArray, nodes_R: IntArray) -> BoolArray:
    """[L, E, R] `held_LER` without the replicas that exceed an even spread of their expert over nodes."""
    num_nodes = int(nodes_R.max()) + 1
    on_node_RH = nodes_R[:, None] == np.arange(num_nodes)
    held_LER = held_LER.copy()
    while True:
        on_node_LEH = held_LER @ on_node_RH.astype(np.int64)
        exceeds_LEH = on_node_LEH > -(-on_node_LEH.sum(axis=2, keepdims=True) // num_nodes)
        if not exceeds_LEH.any():
            return held_LER
        for i, expert, node in np.argwhere(exceeds_LEH).tolist():
            held_LER[i, expert, np.flatnonzero(held_LER[i, expert] & (nodes_R == node))[-1]] = False
