"""By how much each replica that is to arrive relieves its layer, so that those of most relief for a byte arrive first.

The replicas of a layer are put in order greedily: next comes the one that takes most off max/mean for a byte. As two
ranks may be equally full, later gains can be larger than earlier ones; replicas that gain only together then share what
they gain (the concave envelope of the gain over the bytes, as in a fractional knapsack).

Axes: X replicas that are to arrive; S sums of consecutive steps.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.solver.compiled import compiled_beside, compiled_part
from rq_ep.solver.search.cuts import Changes, Cuts, apply_changes, initial_cuts, price_changes
from rq_ep.solver.search.layer_state import LayerSplit

MAX_SUMS = 16  # of consecutive steps; with more of them half of the gain comes hardly sooner


def relief_of_arrivals(
    pairs_SE: IntArray,
    before: Replicas,
    after: Replicas,
    expert_bytes: Mapping[str, int],
    num_ranks: int,
) -> dict[Replica, float]:
    """What each replica takes off max/mean of its layer; those of `after` that their rank does not hold `before`.

    An arriving replica is taken to replace a surplus one of its expert, if there is one. The loads are those of the
    min-max split; with more than 8 ranks max/mean is a lower bound, by the cuts of both ends.

    Args:
        pairs_SE: [steps, E] routed pairs.
        before: the replicas of the layer.
        after: its replicas when all have arrived.
        expert_bytes: format -> bytes of one expert.
        num_ranks: of the group.
    """
    sums_SE = _sums(pairs_SE)
    arriving, off_X = _arrivals(before, after)
    if not arriving or not len(sums_SE):
        return {}
    loads_SE = sums_SE / (sums_SE.sum(axis=1, keepdims=True) / num_ranks)
    splits = [LayerSplit.of(loads_SE, replicas.mask(sums_SE.shape[1], num_ranks)) for replicas in (before, after)]
    cuts_SR = np.concatenate([one.optimize() for one in splits])
    cuts = initial_cuts(splits[0].index, loads_SE, num_ranks, cuts_SR)
    experts_X, on_X = (np.array([one[column] for one in arriving], np.int64) for column in (1, 0))
    bytes_X = np.array([expert_bytes[one.format] for one in arriving], np.int64)
    order_X, gain_X = _greedy_order(cuts, Changes(experts_X, off_X, on_X), bytes_X)
    relief_X = _enveloped(gain_X, bytes_X[order_X])
    return {arriving[x]: relief for x, relief in zip(order_X.tolist(), relief_X.tolist(), strict=True)}


def _sums(pairs_SE: IntArray) -> IntArray:
    """[S, E] the pairs of consecutive steps together, without those that route nothing."""
    routed_SE = pairs_SE[pairs_SE.any(axis=1)]
    num_sums = min(len(routed_SE), MAX_SUMS)
    return np.add.reduceat(routed_SE, np.arange(num_sums) * len(routed_SE) // max(num_sums, 1), axis=0)


def _arrivals(before: Replicas, after: Replicas) -> tuple[list[Replica], IntArray]:
    """The replicas whose rank does not hold their expert, and [X] a rank whose replica each replaces, or -1."""
    held, wanted = ({(one.expert, one.rank) for one in replicas} for replicas in (before, after))
    surplus: defaultdict[int, list[int]] = defaultdict(list)
    for expert, rank in sorted(held - wanted):
        surplus[expert].append(rank)
    arriving = [one for one in after if (one.expert, one.rank) not in held]
    off = [surplus[one.expert].pop() if surplus[one.expert] else -1 for one in arriving]
    return arriving, np.array(off, np.int64)


@compiled_beside
def _greedy_order(cuts: Cuts, arrivals: Changes, bytes_X: IntArray) -> tuple[IntArray, FloatArray]:
    """[X] the arrivals in order, and [X] what each takes off max/mean in its turn; `cuts` is used up."""
    num_arrivals = len(bytes_X)
    order_X, gain_X = np.empty(num_arrivals, np.int64), np.empty(num_arrivals)
    is_left_X, values_S = np.ones(num_arrivals, np.bool_), np.empty(len(cuts.tops_S))
    value = np.maximum(cuts.tops_S, 1.0).mean()
    for turn in range(num_arrivals):
        best, least = -1, 0.0
        for x in range(num_arrivals):
            if is_left_X[x]:
                price_changes(cuts, _one(arrivals, x), values_S, np.inf)
                after = values_S.mean()
                if best < 0 or (value - after) * bytes_X[best] > (value - least) * bytes_X[x]:
                    best, least = x, after
        apply_changes(cuts, _one(arrivals, best))
        order_X[turn], gain_X[turn], is_left_X[best], value = best, value - least, False, least
    return order_X, gain_X


@compiled_part
def _one(changes: Changes, x: int) -> Changes:
    return Changes(changes.experts_X[x : x + 1], changes.off_X[x : x + 1], changes.on_X[x : x + 1])


def _enveloped(gain_X: FloatArray, bytes_X: IntArray) -> FloatArray:
    """[X] the gains, shared in such a way that none is larger for a byte than one before it."""
    pools: list[tuple[float, int, int]] = []  # gain, bytes, and how many share them
    for gain, size in zip(gain_X.tolist(), bytes_X.tolist(), strict=True):
        pool = (gain, size, 1)
        while pools and pool[0] * pools[-1][1] > pools[-1][0] * pool[1]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    return np.repeat([gain / size for gain, size, _ in pools], [number for *_, number in pools]) * bytes_X
