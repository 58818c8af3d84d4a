"""The first replica of every expert: as many for each rank as its bytes hold, the heaviest experts placed first (LPT).

Axes: H nodes.
"""

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled, compiled_part
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.split.heaviest_first import heaviest_first


def assign_first_replicas(
    mean_LE: FloatArray, format_LE: IntArray, formats: Formats, budget_R: IntArray, grouping: int
) -> IntArray | None:
    """[L, E] a rank for every expert, or None if they do not fit.

    The next expert goes to the rank with most bytes left over all layers, so that room for half an expert in one layer
    is not lost for the next. With room for every expert in the native format this never fails.

    Args:
        mean_LE: load of each expert, to place the heaviest first.
        format_LE: number of each expert's format.
        formats: what the problem allows.
        budget_R: bytes of each rank, over all layers.
        grouping: 0: a rank gets one expert at a time; 1: as many of a format as make room for a whole native replica,
            which helps where ranks have few experts; 2: one more.
    """
    ranks_LE = np.empty(format_LE.shape, np.int64)
    fit = _assign_all(mean_LE, format_LE, formats.bytes_F, budget_R.copy(), grouping, ranks_LE)
    return ranks_LE if fit else None


@compiled
def _assign_all(
    mean_LE: FloatArray, format_LE: IntArray, bytes_F: IntArray, free_R: IntArray, grouping: int, ranks_LE: IntArray
) -> bool:
    """Write the rank of every expert; False if they do not fit. Changes `free_R`."""
    num_formats, native_bytes = len(bytes_F), bytes_F[0]
    for i in range(len(mean_LE)):
        number_F = np.zeros(num_formats, np.int64)
        for number in format_LE[i]:
            number_F[number] += 1
        number_FR = np.zeros((num_formats, len(free_R)), np.int64)
        for number in range(num_formats - 1, -1, -1):
            saved, group_size = native_bytes - bytes_F[number], 1
            if number > 0 and grouping > 0:
                group_size = native_bytes // saved + grouping - 1
            if not _deal(number_F[number], bytes_F[number], group_size, free_R, number_FR[number]):
                return False
        load_R, order_E = np.zeros(len(free_R)), heaviest_first(mean_LE[i])
        for number in range(num_formats):
            for expert in order_E:
                if format_LE[i, expert] == number:
                    rank = _least_loaded(load_R, number_FR[number])
                    ranks_LE[i, expert] = rank
                    number_FR[number, rank] -= 1
                    load_R[rank] += mean_LE[i, expert]
    return True


@compiled_part
def _least_loaded(load_R: FloatArray, number_R: IntArray) -> int:
    """The least loaded of the ranks that may take another expert."""
    least = -1
    for rank in range(len(load_R)):
        if number_R[rank] > 0 and (least < 0 or load_R[rank] < load_R[least]):
            least = rank
    return least


@compiled_part
def _deal(number: int, size: int, group_size: int, free_R: IntArray, number_R: IntArray) -> bool:
    """Deal experts in groups to the rank with most bytes left or, of more than one, with fewest experts; whether all
    fit. Changes both arrays."""
    while number > 0:
        count = min(group_size, number)
        if free_R.max() < count * size:
            count = 1
        to = -1
        for rank in range(len(free_R)):
            if free_R[rank] >= count * size:
                is_emptier = to < 0 or free_R[rank] > free_R[to]
                if group_size > 1 and to >= 0 and number_R[rank] != number_R[to]:
                    is_emptier = number_R[rank] < number_R[to]
                if is_emptier:
                    to = rank
        if to < 0:
            return False
        number_R[to] += count
        free_R[to] -= count * size
        number -= count
    return True


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
