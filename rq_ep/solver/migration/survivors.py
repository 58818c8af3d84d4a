"""More ranks, fewer, or some lost: what the ranks that are left hold, and a placement on them to begin from."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.moves import Held
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.solver.migration.plan_moves import bytes_of


class Survivors(NamedTuple):
    """The ranks that stay, under their new numbers, and what they hold."""

    ranks: tuple[int, ...]  # their old numbers: the first is rank 0 now, and so on
    held: Held
    mixed_formats: tuple[tuple[str, ...], ...]  # of each layer
    num_missing: int  # experts, over all layers, of which no replica is left


def survivors(current: Placement, num_ranks: int, lost_ranks: Collection[int] = ()) -> Survivors:
    """Who goes on: the ranks that are not lost close up in order; of more than `num_ranks` the last ones leave.

    Ranks that join come after them and hold nothing.

    Raises:
        UserError: a lost rank is none of the placement's, or all of them are.
    """
    before = current.topology.num_ranks
    for rank in lost_ranks:
        if not 0 <= rank < before:
            raise UserError(f"--lost-ranks {rank}: the current placement has ranks 0 to {before - 1}")
    left = [rank for rank in range(before) if rank not in set(lost_ranks)][:num_ranks]
    if not left:
        raise UserError(f"--lost-ranks: all {before} ranks are lost; leave --current out and place anew")
    number = {rank: at for at, rank in enumerate(left)}
    held = [
        [one._replace(rank=number[one.rank]) for one in layer.replicas if one.rank in number]
        for layer in current.layers
    ]
    num_missing = sum(
        layer.num_experts - len({one.expert for one in replicas})
        for layer, replicas in zip(current.layers, held, strict=True)
    )
    mixed_formats = tuple(layer.replicas.mixed_formats for layer in current.layers)
    return Survivors(tuple(left), held, mixed_formats, num_missing)


def completed(problem: PlacementProblem, left: Survivors) -> list[LayerPlacement] | None:
    """What is left with a replica of every expert that has none, each on an allowed rank of little load, with room.

    Missing experts are stored in the native format where it fits, else in the smallest; without room anywhere they are
    added all the same: the result is where a search begins, and may exceed budgets and break rules. None if what is
    left uses a format that this problem may not.
    """
    stats, num_ranks = problem.stats, problem.topology.num_ranks
    if any(one.format not in problem.formats for layer in left.held for one in layer):
        return None
    smallest = min(problem.formats, key=lambda name: (stats.expert_bytes[name], name))
    limit_R = np.full(num_ranks, np.iinfo(np.int64).max)
    if problem.budget_bytes_R is not None:
        limit_R = np.array(problem.budget_bytes_R, np.int64)
    free_R = limit_R - sum(bytes_of(replicas, num_ranks, stats.expert_bytes) for replicas in left.held)
    allowed_LER = problem.rules.allowed_LER(stats, problem.topology)
    layers = []
    for at, (replicas, mixed_formats) in enumerate(zip(left.held, left.mixed_formats, strict=True)):
        complete = list(replicas)
        pairs_E = stats.counts[:, at].sum(axis=0)
        load_R = _loads_R(complete, pairs_E, num_ranks)
        missing = set(range(stats.num_experts)) - {one.expert for one in replicas}
        for expert in sorted(missing, key=lambda expert: (-pairs_E[expert], expert)):
            allowed_R = allowed_LER[at, expert]
            native = (allowed_R & (free_R >= problem.native_bytes)).any()
            name = stats.native_format if native else smallest
            fits_R = allowed_R & (free_R >= stats.expert_bytes[name])
            rank = int(np.where(fits_R if fits_R.any() else allowed_R, load_R, np.inf).argmin())
            complete.append(Replica(rank, expert, name))
            free_R[rank] -= stats.expert_bytes[name]
            load_R[rank] += pairs_E[expert]
        layers.append(LayerPlacement.even(stats.layers[at], stats.num_experts, complete, mixed_formats))
    return layers


def _loads_R(replicas: list[Replica], pairs_E: IntArray, num_ranks: int) -> np.ndarray:
    """[R] pairs of each rank if replicas of an expert share them evenly."""
    load_R = np.zeros(num_ranks)
    if replicas:
        ranks_P, experts_P, _ = zip(*replicas, strict=True)
        copies_E = np.bincount(experts_P, minlength=len(pairs_E))
        np.add.at(load_R, list(ranks_P), (pairs_E / np.maximum(copies_E, 1))[list(experts_P)])
    return load_R
