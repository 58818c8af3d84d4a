"""The first replica of every expert: numbers per rank dealt inside the byte budget, experts placed by load."""

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.precision import Formats

BoolArray = npt.NDArray[np.bool_]


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
