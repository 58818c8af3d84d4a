"""The first replica of every expert: numbers per rank dealt inside the byte budget, experts placed by load."""

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.objective.precision import Formats


def deal_homes(
    mean_LE: FloatArray, low_LE: BoolArray, formats: Formats, budget_R: IntArray, group: int
) -> IntArray | None:
    """[L, E] a home rank for every expert, or None if they do not fit.

    Experts are dealt to the rank with the most bytes left over all layers, so half an expert's room in one layer is
    not lost for the next. With room for every expert in the native format this never fails.

    Args:
        mean_LE: load of each expert, to place the heaviest first.
        low_LE: experts stored in the low format.
        budget_R: bytes of each rank, over all layers.
        group: low experts dealt to a rank at a time; a group that makes room for a whole native replica helps
            where ranks have few experts.
    """
    free_R = budget_R.copy()
    homes_LE = np.empty(low_LE.shape, np.int64)
    for mean_E, low_E, homes_E in zip(mean_LE, low_LE, homes_LE, strict=True):
        num_low = int(low_E.sum())
        numbers = []
        for number, size, at_once in (
            (num_low, formats.low_bytes, group),
            (len(low_E) - num_low, formats.native_bytes, 1),
        ):
            number_R = _deal(number, size, at_once, free_R)
            if number_R is None:
                return None
            numbers.append(number_R)
        load_R = np.zeros(len(budget_R))
        for wanted, number_R in ((False, numbers[1]), (True, numbers[0])):
            for expert in np.flatnonzero(low_E == wanted)[np.argsort(-mean_E[low_E == wanted], kind="stable")].tolist():
                rank = int(np.where(number_R > 0, load_R, np.inf).argmin())
                homes_E[expert] = rank
                number_R[rank] -= 1
                load_R[rank] += mean_E[expert]
    return homes_LE


def _deal(number: int, size: int, at_once: int, free_R: IntArray) -> IntArray | None:
    """[R] how many of `number` equal replicas each rank takes; takes their bytes off `free_R`."""
    number_R = np.zeros(len(free_R), np.int64)
    while number:
        dealt = min(at_once, number)
        if free_R.max() < dealt * size:
            dealt = 1
        if free_R.max() < size:
            return None
        fewest = np.where(free_R >= dealt * size, number_R, np.iinfo(np.int64).max) if at_once > 1 else -free_R
        rank = int(np.lexsort((-free_R, fewest))[0])
        number_R[rank] += dealt
        free_R[rank] -= dealt * size
        number -= dealt
    return number_R


def complete_homes(
    held_LER: BoolArray,
    mean_LE: FloatArray,
    bytes_LE: IntArray,
    budget_R: IntArray,
    allowed_LER: BoolArray,
    fixed_LER: BoolArray,
) -> BoolArray | None:
    """[L, E, R] `held_LER`, what is fixed, and a home for every expert that lacks one; None if it does not fit.

    The most confined experts come first, then the heaviest, each onto the emptiest of the ranks with most bytes left.
    Replicas too many for a rank's bytes give way first, those of the least load.
    """
    held_LER = (held_LER & allowed_LER) | fixed_LER
    free_R = budget_R - np.einsum("ler,le->r", held_LER, bytes_LE)
    load_LE = mean_LE / np.maximum(held_LER.sum(axis=2), 1)
    lightest_first = np.argsort(load_LE, axis=None, kind="stable")
    for rank in np.flatnonzero(free_R < 0).tolist():
        for at, expert in np.stack(np.unravel_index(lightest_first, load_LE.shape), axis=1).tolist():
            if free_R[rank] < 0 and held_LER[at, expert, rank] and not fixed_LER[at, expert, rank]:
                held_LER[at, expert, rank] = False
                free_R[rank] += bytes_LE[at, expert]
    if free_R.min() < 0:
        return None
    num_allowed_LE = allowed_LER.sum(axis=2)
    for at, held_ER in enumerate(held_LER):
        load_R = load_LE[at] @ held_ER
        for expert in np.lexsort((-mean_LE[at], num_allowed_LE[at])).tolist():
            if held_ER[expert].any():
                continue
            size = bytes_LE[at, expert]
            fits_R = allowed_LER[at, expert] & (free_R >= size)
            if not fits_R.any():
                return None
            roomy_R = fits_R & (free_R > free_R[fits_R].max() - size)
            rank = int(np.where(roomy_R, load_R, np.inf).argmin())
            held_ER[expert, rank] = True
            free_R[rank] -= size
            load_R[rank] += mean_LE[at, expert]
    return held_LER


def spread_out(held_LER: BoolArray, nodes_R: IntArray) -> BoolArray:
    """[L, E, R] `held_LER` without the replicas that exceed an even spread of their expert over nodes."""
    num_nodes = int(nodes_R.max()) + 1
    on_node_RN = nodes_R[:, None] == np.arange(num_nodes)
    held_LER = held_LER.copy()
    while True:
        on_node_LEN = held_LER @ on_node_RN.astype(np.int64)
        crowded_LEN = on_node_LEN > -(-on_node_LEN.sum(axis=2, keepdims=True) // num_nodes)
        if not crowded_LEN.any():
            return held_LER
        for at, expert, node in np.argwhere(crowded_LEN).tolist():
            held_LER[at, expert, np.flatnonzero(held_LER[at, expert] & (nodes_R == node))[-1]] = False
