"""Changes of the number of ranks (elastic expert parallelism): what remaining ranks hold, and how it is completed."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.moves import Held
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica, replica_bytes


class Survivors(NamedTuple):
    """The ranks that remain, under their new numbers, and what they hold."""

    ranks: tuple[int, ...]  # their old numbers: the first one is rank 0 now, and so on
    held: Held
    mixed_formats: tuple[tuple[str, ...], ...]  # of each layer
    num_missing: int  # experts, over all layers, of which no rank holds a replica any more


def remaining_ranks(current: Placement, num_ranks: int, lost_ranks: Collection[int] = ()) -> Survivors:
    """The ranks that are not lost, renumbered in order; of more than `num_ranks`, the last ones leave.

    Ranks that join come after them and hold nothing.

    Raises:
        UserError: a lost rank is not a rank of the placement, or all ranks are lost.
    """
    before = current.topology.num_ranks
    for rank in lost_ranks:
        if not 0 <= rank < before:
            raise UserError(f"--lost-ranks {rank}: the current placement has ranks 0 to {before - 1}")
    remaining = [rank for rank in range(before) if rank not in set(lost_ranks)][:num_ranks]
    if not remaining:
        raise UserError(f"--lost-ranks: all {before} ranks are lost; leave --current out and place anew")
    new_rank = {rank: number for number, rank in enumerate(remaining)}
    held = [
        [replica._replace(rank=new_rank[replica.rank]) for replica in layer.replicas if replica.rank in new_rank]
        for layer in current.layers
    ]
    num_missing = sum(
        layer.num_experts - len({replica.expert for replica in replicas})
        for layer, replicas in zip(current.layers, held, strict=True)
    )
    mixed_formats = tuple(layer.replicas.mixed_formats for layer in current.layers)
    return Survivors(tuple(remaining), held, mixed_formats, num_missing)


def completed(problem: PlacementProblem, survivors: Survivors) -> list[LayerPlacement] | None:
    """What the survivors hold, with a replica of every missing expert on an allowed rank of little load.

    Missing experts are stored in the native format where it fits, else in the smallest. Where nothing fits they are
    added all the same: the result is where a search begins, and may exceed budgets and break rules. None if survivors
    hold a format that this problem may not use.
    """
    stats, num_ranks = problem.stats, problem.topology.num_ranks
    if any(replica.format not in problem.formats for layer in survivors.held for replica in layer):
        return None
    smallest = min(problem.formats, key=lambda name: (stats.expert_bytes[name], name))
    limit_R = np.full(num_ranks, np.iinfo(np.int64).max)
    if problem.budget_bytes_R is not None:
        limit_R = np.array(problem.budget_bytes_R, np.int64)
    free_R = limit_R - sum(replica_bytes(replicas, num_ranks, stats.expert_bytes) for replicas in survivors.held)
    allowed_LER = problem.rules.allowed_LER(stats, problem.topology)
    layers = []
    for i, (replicas, mixed_formats) in enumerate(zip(survivors.held, survivors.mixed_formats, strict=True)):
        complete = list(replicas)
        pairs_E = stats.counts[:, i].sum(axis=0)
        load_R = _loads_R(complete, pairs_E, num_ranks)
        missing = set(range(stats.num_experts)) - {replica.expert for replica in replicas}
        for expert in sorted(missing, key=lambda expert: (-pairs_E[expert], expert)):
            allowed_R = allowed_LER[i, expert]
            native_fits = (allowed_R & (free_R >= problem.native_bytes)).any()
            name = stats.native_format if native_fits else smallest
            fits_R = allowed_R & (free_R >= stats.expert_bytes[name])
            rank = int(np.where(fits_R if fits_R.any() else allowed_R, load_R, np.inf).argmin())
            complete.append(Replica(rank, expert, name))
            free_R[rank] -= stats.expert_bytes[name]
            load_R[rank] += pairs_E[expert]
        layers.append(LayerPlacement.even(stats.layers[i], stats.num_experts, complete, mixed_formats))
    return layers


def _loads_R(replicas: list[Replica], pairs_E: IntArray, num_ranks: int) -> FloatArray:
    """[R] pairs of each rank if replicas of an expert share them evenly."""
    load_R = np.zeros(num_ranks)
    if replicas:
        ranks_P, experts_P, _ = zip(*replicas, strict=True)
        copies_E = np.bincount(experts_P, minlength=len(pairs_E))
        np.add.at(load_R, list(ranks_P), (pairs_E / np.maximum(copies_E, 1))[list(experts_P)])
    return load_R
