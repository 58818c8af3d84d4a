"""The choice of a migration: keep the placement that serves, move some layers or move all, at the bytes' price."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.moves import Held
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import replica_bytes
from rq_ep.core.rules import Rules
from rq_ep.solver.migration.relabel_ranks import relabel_ranks

Certify = Callable[[Sequence[LayerPlacement]], Placement]  # puts layers together as a placement, and evaluates it


class _Option(NamedTuple):
    """A placement to choose, and the bytes to move for it."""

    name: str
    placement: Placement
    moved_bytes: int

    @property
    def predicted(self) -> float:
        return float(self.placement.certificate["predicted"])


def moved_bytes_LR(before: Held, layers: Sequence[LayerPlacement], problem: PlacementProblem) -> IntArray:
    """[L, R] bytes that each rank has to receive for `layers`; what it converts from its own replicas is free."""
    sizes, native = problem.stats.expert_bytes, problem.stats.native_format
    rows = []
    for replicas, layer in zip(before, layers, strict=True):
        stored = {(replica.rank, replica.expert): replica.format for replica in replicas}
        new = [one for one in layer.replicas if stored.get((one.rank, one.expert)) not in (one.format, native)]
        rows.append(replica_bytes(new, problem.topology.num_ranks, sizes))
    return np.stack(rows)


def choose_migration(
    problem: PlacementProblem,
    before: Held,
    stay: Placement | None,
    fresh: Sequence[Placement],
    certify: Certify,
    min_gain: float,
    refused: str = "",
) -> Placement:
    """The best of staying, the fresh placements with ranks renumbered to move least, and mixtures layer by layer.

    The objective is the predicted max/mean plus `problem.move_price` times the bytes moved, in units of the budget. The
    certificate of the result has an entry `replaced`: what was chosen, what it moves, and what staying would give.

    Args:
        problem: its `max_moved_bytes` caps what all ranks together receive.
        before: what ranks hold now.
        stay: the same as a placement, evaluated on the new statistics; None where it cannot serve any more.
        fresh: new placements, which need not depend on `before`.
        certify: puts layers together as the strategy's placement.
        min_gain: staying is preferred unless another placement is better by as much.
        refused: why it is not possible to stay.

    Raises:
        UserError: nothing can be reached within `max_moved_bytes`; the message says how many would do.
    """
    budget = sum(problem.budget_bytes_R) if problem.budget_bytes_R else sum(fresh[0].bytes_R)

    def option(name: str, placement: Placement) -> _Option:
        return _Option(name, placement, int(moved_bytes_LR(before, placement.layers, problem).sum()))

    def objective(one: _Option) -> float:
        return one.predicted + problem.move_price * one.moved_bytes / max(budget, 1)

    options = [option("moved", certify(_least_moving(problem, before, placement))) for placement in fresh]
    if stay is not None:
        options += [
            option("moved in part", certify(layers))
            for one in list(options)
            if (layers := _moved_in_part(problem, before, stay, one.placement, budget)) is not None
        ]
        options.append(option("stayed", stay))
    cap = problem.max_moved_bytes
    reachable = [one for one in options if cap is None or one.moved_bytes <= cap]
    if not reachable:
        least = min(one.moved_bytes for one in options)
        why = f" (staying as it is: {refused})" if refused else ""
        raise UserError(
            f"--max-moved-bytes {cap}: no placement found can be reached with so few; the nearest takes {least}{why}"
        )
    best = min(reachable, key=lambda one: (objective(one), one.moved_bytes))
    if stay is not None and objective(options[-1]) - objective(best) <= min_gain:
        best = options[-1]
    notes: dict[str, Any] = {
        "choice": best.name,
        "moved_bytes": best.moved_bytes,
        "staying": None if stay is None else options[-1].predicted,
        "moving_all": {"predicted": options[0].predicted, "moved_bytes": options[0].moved_bytes},
        "min_gain": min_gain,
        "refused": refused,
    }
    return replace(best.placement, certificate={**best.placement.certificate, "replaced": notes})


def _least_moving(problem: PlacementProblem, before: Held, fresh: Placement) -> Sequence[LayerPlacement]:
    """The layers of `fresh` with ranks renumbered so that least has to move, where rules allow."""
    if problem.rules != Rules(spread_nodes=problem.rules.spread_nodes):
        return fresh.layers  # rules tell ranks apart
    stats = problem.stats
    return relabel_ranks(
        before, fresh.layers, problem.budget_bytes_R, problem.topology, stats.expert_bytes, stats.native_format
    )


def _moved_in_part(
    problem: PlacementProblem, before: Held, stay: Placement, new: Placement, budget: int
) -> list[LayerPlacement] | None:
    """`stay` with those layers of `new` that gain most per moved byte, inside bytes and caps (greedy knapsack).

    None if no layer is taken, or all are.
    """
    stats, num_ranks = problem.stats, problem.topology.num_ranks
    pairs = list(zip(stay.layers, new.layers, strict=True))
    moved_L = moved_bytes_LR(before, new.layers, problem).sum(axis=1)
    gain_L = np.array([(old.predicted or 1.0) - (one.predicted or 1.0) for old, one in pairs]) / len(stay.layers)
    net_gain_L = gain_L - problem.move_price * moved_L / max(budget, 1)
    per_byte_L = gain_L / np.maximum(moved_L, 1)
    added_bytes_LR = np.stack(
        [
            replica_bytes(one.replicas, num_ranks, stats.expert_bytes)
            - replica_bytes(old.replicas, num_ranks, stats.expert_bytes)
            for old, one in pairs
        ]
    )
    pairs_LE = stats.counts.sum(axis=0)
    added_low_L = np.array(
        [
            one.low_pairs(pairs_E, stats.native_format) - old.low_pairs(pairs_E, stats.native_format)
            for (old, one), pairs_E in zip(pairs, pairs_LE, strict=True)
        ]
    )
    bytes_R = np.array(stay.bytes_R, np.int64)
    limit_R = np.full(num_ranks, np.iinfo(np.int64).max)
    if problem.budget_bytes_R is not None:
        limit_R = np.array(problem.budget_bytes_R, np.int64)
    low = stay.low_precision_planned * int(pairs_LE.sum())
    max_low = problem.max_low_precision_share * int(pairs_LE.sum())
    movable = np.inf if problem.max_moved_bytes is None else problem.max_moved_bytes

    def fits(i: int) -> bool:
        is_inside = (bytes_R + added_bytes_LR[i] <= limit_R).all() and low + added_low_L[i] <= max_low
        return bool(moved_L[i] <= movable and is_inside)

    taken: set[int] = set()
    candidates = [i for i in np.argsort(-per_byte_L, kind="stable").tolist() if net_gain_L[i] > 0]
    while (best := next(filter(fits, candidates), None)) is not None:
        candidates.remove(best)
        taken.add(best)
        bytes_R, low, movable = bytes_R + added_bytes_LR[best], low + added_low_L[best], movable - moved_L[best]
    if not taken or len(taken) == len(stay.layers):
        return None
    return [one if i in taken else old for i, (old, one) in enumerate(pairs)]
