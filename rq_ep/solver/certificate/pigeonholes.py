"""A lower bound without a linear program: an expert of one replica is whole, and some rank holds several such experts.

Where few replicas fit, it says more than the relaxation, in which replicas come in fractions.

Axes: M numbers of further replicas, from 0 on.
"""

from collections.abc import Iterable

import numpy as np

from rq_ep.core.arrays import FloatArray


def least_fullest_S(loads_SE: FloatArray, num_ranks: int, num_more: int = 0) -> FloatArray:
    """[S] what the fullest rank carries at least, with `num_more` replicas beyond the first one of each expert.

    At most so many experts have several replicas; at worst these are the heaviest. Of the n * `num_ranks` + 1 heaviest
    others, some rank holds n + 1 (pigeonhole principle), which weigh no less than the n + 1 lightest of them.
    """
    whole_SE = -np.sort(-loads_SE, axis=1)[:, num_more:]
    fullest_S = np.zeros(len(loads_SE))
    for n, last in enumerate(range(0, whole_SE.shape[1], num_ranks)):
        fullest_S = np.maximum(fullest_S, whole_SE[:, last - n : last + 1].sum(axis=1))
    return fullest_S


def least_sum(costs: Iterable[FloatArray], num_more: int) -> float:
    """The least sum of costs where `num_more` replicas are dealt out among them (dynamic programming).

    Args:
        costs: [M] each cost by the number of replicas that it gets; more than listed change nothing.
        num_more: replicas for all together.
    """
    sums_M = np.zeros(num_more + 1)
    for cost_M in costs:
        before_M, sums_M = sums_M, np.full(num_more + 1, np.inf)
        for number, cost in enumerate(cost_M[: num_more + 1].tolist()):
            sums_M[number:] = np.minimum(sums_M[number:], before_M[: num_more + 1 - number] + cost)
    return float(sums_M[-1])
