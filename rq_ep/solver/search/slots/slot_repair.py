"""Slots brought to given numbers of replicas with the fewest arrivals: where a search begins that should move little.

Axes: J slots of a rank.
"""

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray

EMPTY = -1  # in a slot that holds nothing


def replica_counts(loads_E: FloatArray, num_slots: int, most_E: IntArray) -> IntArray:
    """[E] replicas for `num_slots` slots, one after another to the expert with most load per replica, as EPLB does.

    Args:
        loads_E: load of each expert; experts of equal load are taken in their order.
        num_slots: slots to fill; at least one for each expert, and at most the sum of `most_E`.
        most_E: replicas that an expert may have, one on each rank that may hold it.
    """
    counts_E = np.ones(len(loads_E), np.int64)
    for _ in range(num_slots - len(loads_E)):
        counts_E[np.where(counts_E < most_E, loads_E / counts_E, -1.0).argmax()] += 1
    return counts_E


def repaired(slots_RJ: IntArray, counts_E: IntArray, shares_E: FloatArray, allowed_ER: BoolArray) -> IntArray | None:
    """[R, J] the slots with `counts_E` replicas of each expert, never two of them on a rank; None if none was found.

    What stays, stays where it is. An expert that lacks replicas, the largest first, takes a slot on the least loaded
    rank that may hold it: an empty one, one that is twice on its rank or not allowed there, or one of an expert that
    has too many.

    Args:
        slots_RJ: the expert in each slot, or `EMPTY`.
        counts_E: replicas of each expert, in all as many as there are slots.
        shares_E: load of one replica of each expert.
        allowed_ER: the ranks that may hold an expert.
    """
    slots_RJ = slots_RJ.copy()
    ranks_R1 = np.arange(len(slots_RJ))[:, None]
    slots_RJ[~allowed_ER[slots_RJ, ranks_R1]] = EMPTY
    for experts_J in slots_RJ:
        first = np.zeros(len(experts_J), bool)
        first[np.unique(experts_J, return_index=True)[1]] = True
        experts_J[~first] = EMPTY
    lacking_E = counts_E - np.bincount(slots_RJ[slots_RJ != EMPTY], minlength=len(counts_E))
    excess_E = np.append(-lacking_E, 1)  # of replicas; the last is that of an empty slot, at EMPTY
    shares_E = np.append(shares_E, 0.0)
    loads_R = shares_E[slots_RJ].sum(axis=1)

    def put(expert: int, rank: int, j: int) -> int:
        given = int(slots_RJ[rank, j])
        loads_R[rank] += shares_E[expert] - shares_E[given]
        slots_RJ[rank, j] = expert
        return given

    while (excess_E[:-1] < 0).any():
        expert = int(np.where(excess_E[:-1] < 0, shares_E[:-1], -1.0).argmax())
        may_hold_R = allowed_ER[expert] & ~(slots_RJ == expert).any(axis=1)
        free_RJ = (excess_E[slots_RJ] > 0) & allowed_ER[expert][:, None]
        if not free_RJ.any():
            return None
        direct_RJ = free_RJ & may_hold_R[:, None]
        if direct_RJ.any():
            rank = _least_loaded(direct_RJ, loads_R)
            given = put(expert, rank, int(np.where(direct_RJ[rank], shares_E[slots_RJ[rank]], -1.0).argmax()))
        else:  # the ranks with room hold the expert: another rank hands over something that one of them lacks
            room = _least_loaded(free_RJ, loads_R)
            lacks_RJ = allowed_ER[slots_RJ, room] & ~np.isin(slots_RJ, slots_RJ[room]) & may_hold_R[:, None]
            if not lacks_RJ.any():
                return None
            rank = _least_loaded(lacks_RJ, loads_R)
            change_J = np.abs(shares_E[slots_RJ[rank]] - shares_E[expert])
            moved = put(expert, rank, int(np.where(lacks_RJ[rank], change_J, np.inf).argmin()))
            given = put(moved, room, int(free_RJ[room].argmax()))
        excess_E[expert] += 1
        if given != EMPTY:
            excess_E[given] -= 1
    return slots_RJ


def _least_loaded(chosen_RJ: BoolArray, loads_R: FloatArray) -> int:
    """The least loaded of the ranks with a chosen slot."""
    return int(np.where(chosen_RJ.any(axis=1), loads_R, np.inf).argmin())


def in_old_slots(slots_RJ: IntArray, old_RJ: IntArray) -> IntArray:
    """[R, J] the same experts on every rank, each in its old slot where the rank held it before.

    Args:
        slots_RJ: the expert in each slot, none twice on a rank.
        old_RJ: the same before; `EMPTY` where a slot held nothing.
    """
    ordered_RJ = np.full_like(slots_RJ, EMPTY)
    for ordered_J, experts_J, old_J in zip(ordered_RJ, slots_RJ, old_RJ, strict=True):
        unique, first = np.unique(old_J, return_index=True)
        stays = np.isin(unique, experts_J)
        ordered_J[first[stays]] = unique[stays]
        ordered_J[ordered_J == EMPTY] = experts_J[~np.isin(experts_J, unique[stays])]
    return ordered_RJ
