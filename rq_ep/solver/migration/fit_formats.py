"""Formats on a new load: busy low experts become native, so that the cap on low-precision pairs holds again."""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica

ReplicaSets = list[set[Replica]]  # of each layer


def enforce_low_cap(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> Sequence[LayerPlacement]:
    """The layers with the busiest low experts native, so that the cap on low pairs holds; `layers` where it does.

    Experts that become native have to be fetched, so those of most pairs for each replica come first. Where a rank
    then exceeds its budget, it drops replicas of experts that other ranks hold too, those of fewest pairs first.

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
    copies_LE = _copies_LE(layers)
    held: ReplicaSets = [set(layer.replicas) for layer in layers]
    _promote(held, pairs_LE / copies_LE, pairs_LE, excess, stats.native_format)
    return within_budgets(problem, layers, held)


def within_budgets(
    problem: PlacementProblem, layers: Sequence[LayerPlacement], held: ReplicaSets
) -> list[LayerPlacement]:
    """`layers` with the replicas `held`, in other formats, less those that full ranks drop as far as others hold them.

    A rank whose experts have no other replicas may still exceed its budget.
    """
    if problem.budget_bytes_R is not None:
        copies_LE = _copies_LE(layers)
        bytes_R = bytes_by_rank(_even(layers, held), problem.topology.num_ranks, problem.stats.expert_bytes)
        share_LE: FloatArray = problem.stats.counts.sum(axis=0) / copies_LE
        _drop_excess(problem, held, share_LE, copies_LE, bytes_R - np.array(problem.budget_bytes_R, np.int64))
    return _even(layers, held)


def _copies_LE(layers: Sequence[LayerPlacement]) -> IntArray:
    """[L, E] replicas of each expert."""
    return np.stack([np.bincount(layer.replicas.experts_P, minlength=layer.num_experts) for layer in layers])


def _even(layers: Sequence[LayerPlacement], held: ReplicaSets) -> list[LayerPlacement]:
    """The layers with these replicas, which share pairs evenly."""
    return [
        LayerPlacement.even(layer.index, layer.num_experts, replicas)
        for layer, replicas in zip(layers, held, strict=True)
    ]


def _promote(held: ReplicaSets, share_LE: FloatArray, pairs_LE: IntArray, excess: float, native: str) -> None:
    """Make low experts native until their pairs are `excess` fewer."""
    low = {(i, replica.expert) for i, replicas in enumerate(held) for replica in replicas if replica.format != native}
    chosen = set()
    for i, expert in sorted(low, key=lambda key: (-share_LE[key], key)):
        if excess <= 0:
            break
        excess -= int(pairs_LE[i, expert])
        chosen.add((i, expert))
    for i, replicas in enumerate(held):
        changed = {replica for replica in replicas if (i, replica.expert) in chosen}
        replicas -= changed
        replicas |= {replica._replace(format=native) for replica in changed}


def _drop_excess(
    problem: PlacementProblem, held: ReplicaSets, share_LE: FloatArray, copies_LE: IntArray, over_R: IntArray
) -> None:
    """Drop replicas of experts that have others, from ranks that exceed their budgets by `over_R`."""
    fixed_LER = problem.rules.fixed_LER(problem.stats, problem.topology)
    every = [(i, replica) for i, replicas in enumerate(held) for replica in replicas]
    for i, replica in sorted(every, key=lambda pair: (share_LE[pair[0], pair[1].expert], pair)):
        rank, expert, name = replica
        if over_R[rank] > 0 and copies_LE[i, expert] > 1 and not fixed_LER[i, expert, rank]:
            held[i].remove(replica)
            copies_LE[i, expert] -= 1
            over_R[rank] -= problem.stats.expert_bytes[name]
