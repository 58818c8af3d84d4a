"""Ranks of equal slots leveled for one load: slots of the fullest rank change places until none of them helps.

The fullest rank exchanges a slot with that of another rank after which the fuller of the two is as empty as possible.
Ranks that are equally full are leveled one after another, where a search for a lower maximum would find nothing. EPLB
packs once, the largest first, and stops there.

Axes: J slots of a rank.
"""

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.solver.compiled import compiled_beside, compiled_part

LEAST_GAIN = 1e-9  # of the mean load: less is rounding
MAX_EXCHANGES = 100  # for each rank; they end long before


def leveled(
    loads_E: FloatArray, slots_RJ: IntArray, allowed_ER: BoolArray, price_ER: FloatArray | None = None
) -> IntArray:
    """[R, J] the expert in each slot: as many slots of each expert as before, never fuller at the fullest rank.

    Args:
        loads_E: load of each expert, split evenly over its slots.
        slots_RJ: the expert in each slot.
        allowed_ER: the ranks that each expert may be moved to.
        price_ER: what an expert on a rank costs, in units of the mean load of a rank; default: 0.
    """
    total = loads_E.sum()
    if total <= 0:
        return slots_RJ
    copies_E = np.bincount(slots_RJ.ravel(), minlength=len(loads_E))
    shares_E = loads_E / np.maximum(copies_E, 1) * (len(slots_RJ) / total)
    slots_RJ = slots_RJ.copy()
    loads_R = shares_E[slots_RJ].sum(axis=1)
    _level(shares_E, loads_R, slots_RJ, allowed_ER, np.zeros(allowed_ER.shape) if price_ER is None else price_ER)
    return slots_RJ


@compiled_beside
def _level(
    shares_E: FloatArray, loads_R: FloatArray, slots_RJ: IntArray, allowed_ER: BoolArray, price_ER: FloatArray
) -> None:
    num_ranks, num_slots = slots_RJ.shape
    for _ in range(MAX_EXCHANGES * num_ranks):
        source = int(loads_R.argmax())
        best, best_j, best_rank, best_other = loads_R[source] - LEAST_GAIN, -1, -1, -1
        for j in range(num_slots):
            expert = slots_RJ[source, j]
            for rank in range(num_ranks):
                if rank == source or not allowed_ER[expert, rank] or _holds(slots_RJ, rank, expert):
                    continue
                for other_j in range(num_slots):
                    other = slots_RJ[rank, other_j]
                    less = shares_E[expert] - shares_E[other]
                    fuller = max(loads_R[source] - less, loads_R[rank] + less)
                    if less <= 0 or fuller >= best:
                        continue
                    fuller += price_ER[expert, rank] + price_ER[other, source]
                    fuller -= price_ER[expert, source] + price_ER[other, rank]
                    if fuller < best and allowed_ER[other, source] and not _holds(slots_RJ, source, other):
                        best, best_j, best_rank, best_other = fuller, j, rank, other_j
        if best_j < 0:
            return
        expert, other = slots_RJ[source, best_j], slots_RJ[best_rank, best_other]
        slots_RJ[source, best_j], slots_RJ[best_rank, best_other] = other, expert
        loads_R[source] += shares_E[other] - shares_E[expert]
        loads_R[best_rank] += shares_E[expert] - shares_E[other]


@compiled_part
def _holds(slots_RJ: IntArray, rank: int, expert: int) -> bool:
    for held in slots_RJ[rank]:  # noqa: SIM110 - numba compiles no generator
        if held == expert:
            return True
    return False
