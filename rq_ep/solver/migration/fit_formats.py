"""Formats that no longer suit the load: which low experts become native, and what makes room for that."""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica

Held = list[set[Replica]]  # layer by layer


def within_cap(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> Sequence[LayerPlacement]:
    """The layers with the busiest low experts native, so that the cap on low pairs holds; the same where it does.

    What becomes native has to be fetched, so those of most pairs for each replica come first. Where a rank has no room
    for it, it gives up replicas of experts that others hold too, those of fewest pairs first.

    Args:
        problem: its cap, budgets and statistics.
        layers: the replicas of an expert share a format; where formats mix, nothing is changed.
    """
    stats = problem.stats
    pairs_LE = stats.counts.sum(axis=0)
    excess = -problem.max_low_precision_share * int(pairs_LE.sum())
    for layer, pairs_E in zip(layers, pairs_LE, strict=True):
        excess += layer.low_pairs(pairs_E, stats.native_format)
    if excess <= 0 or any(layer.replicas.mixed_formats for layer in layers):
        return layers
    copies_LE = np.stack([np.bincount(layer.replicas.experts_P, minlength=layer.num_experts) for layer in layers])
    share_LE: FloatArray = pairs_LE / copies_LE
    held: Held = [set(layer.replicas) for layer in layers]
    _promote(held, share_LE, pairs_LE, excess, stats.native_format)
    if problem.budget_bytes_R is not None:
        changed = [LayerPlacement.even(one.index, one.num_experts, of) for one, of in zip(layers, held, strict=True)]
        bytes_R = bytes_by_rank(changed, problem.topology.num_ranks, stats.expert_bytes)
        _give_up(problem, held, share_LE, copies_LE, bytes_R - np.array(problem.budget_bytes_R, np.int64))
    return [LayerPlacement.even(one.index, one.num_experts, of) for one, of in zip(layers, held, strict=True)]


def _promote(held: Held, share_LE: FloatArray, pairs_LE: IntArray, excess: float, native: str) -> None:
    """Make low experts native until their pairs are `excess` fewer."""
    low = {(at, one.expert) for at, replicas in enumerate(held) for one in replicas if one.format != native}
    chosen = set()
    for at, expert in sorted(low, key=lambda one: (-share_LE[one], one)):
        if excess <= 0:
            break
        excess -= int(pairs_LE[at, expert])
        chosen.add((at, expert))
    for at, replicas in enumerate(held):
        changed = {one for one in replicas if (at, one.expert) in chosen}
        replicas -= changed
        replicas |= {one._replace(format=native) for one in changed}


def _give_up(
    problem: PlacementProblem, held: Held, share_LE: FloatArray, copies_LE: IntArray, over_R: IntArray
) -> None:
    """Drop replicas of experts that have others, from ranks that exceed their budgets by `over_R`."""
    fixed_LER = problem.rules.fixed_LER(problem.stats, problem.topology)
    every = [(at, one) for at, replicas in enumerate(held) for one in replicas]
    for at, one in sorted(every, key=lambda pair: (share_LE[pair[0], pair[1].expert], pair)):
        if over_R[one.rank] > 0 and copies_LE[at, one.expert] > 1 and not fixed_LER[at, one.expert, one.rank]:
            held[at].remove(one)
            copies_LE[at, one.expert] -= 1
            over_R[one.rank] -= problem.stats.expert_bytes[one.format]
