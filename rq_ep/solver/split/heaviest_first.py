"""A stable descending sort for compiled code.

NumPy's own sorts do the same, but numba takes seconds to compile them.
"""

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.compiled import compiled_part

RUN = 16  # sorted by insertion, before runs are merged


@compiled_part
def heaviest_first(loads_X: IntArray | FloatArray) -> IntArray:
    """[X] the positions of the loads, the largest first; equal ones stay in their order (merge sort)."""
    num = len(loads_X)
    order_X, merged_X = np.empty(num, np.int64), np.empty(num, np.int64)
    for at in range(num):
        position, first = at, at - at % RUN
        while position > first and loads_X[order_X[position - 1]] < loads_X[at]:
            order_X[position] = order_X[position - 1]
            position -= 1
        order_X[position] = at
    width = RUN
    while width < num:
        for first in range(0, num, 2 * width):
            middle, end = min(first + width, num), min(first + 2 * width, num)
            one, two = first, middle
            for at in range(first, end):
                if one < middle and (two == end or loads_X[order_X[one]] >= loads_X[order_X[two]]):
                    merged_X[at] = order_X[one]
                    one += 1
                else:
                    merged_X[at] = order_X[two]
                    two += 1
        order_X, merged_X = merged_X, order_X
        width *= 2
    return order_X
