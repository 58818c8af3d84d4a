"""Placing anew where a placement serves already: stay, move a part, or move all, whichever is worth its bytes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.moves import Held
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.rules import Rules
from rq_ep.solver.migration.plan_moves import bytes_of
from rq_ep.solver.migration.relabel_ranks import relabelled

Certify = Callable[[Sequence[LayerPlacement]], Placement]  # puts layers together and judges them


class _Option(NamedTuple):
    """One of the placements to choose among."""

    name: str
    placement: Placement
    moved_bytes: int

    @property
    def predicted(self) -> float:
        return float(self.placement.certificate["predicted"])


def moved_bytes_LR(before: Held, layers: Sequence[LayerPlacement], problem: PlacementProblem) -> IntArray:
    """[L, R] bytes that each rank has to receive for `layers`; what it can make from its own replicas is free."""
    sizes, native = problem.stats.expert_bytes, problem.stats.native_format
    rows = []
    for replicas, layer in zip(before, layers, strict=True):
        stored = {(one.rank, one.expert): one.format for one in replicas}
        new = [one for one in layer.replicas if stored.get((one.rank, one.expert)) not in (one.format, native)]
        rows.append(bytes_of(new, problem.topology.num_ranks, sizes))
    return np.stack(rows)


def choose(
    problem: PlacementProblem,
    before: Held,
    stay: Placement | None,
    fresh: Sequence[Placement],
    certify: Certify,
    min_gain: float,
    refused: str = "",
) -> Placement:
    """The best of staying, the fresh solutions on ranks renumbered to move least, and mixtures of these layer by layer.

    What counts is the predicted max/mean plus `problem.move_price` times the bytes moved in units of the whole budget.
    The certificate of the result says under `replaced` what was chosen, what it moves and what staying would give.

    Args:
        problem: what was asked; its `max_moved_bytes` caps what all ranks together receive.
        before: what ranks hold now.
        stay: the same as a placement judged on the new statistics; None where that is none any more.
        fresh: solutions that need not know of `before`.
        certify: puts layers together as the strategy's placement.
        min_gain: staying is preferred unless another placement is better by as much.
        refused: why it is not possible to stay.

    Raises:
        UserError: nothing can be reached within `max_moved_bytes`; the message says how many would do.
    """
    budget = sum(problem.budget_bytes_R) if problem.budget_bytes_R else sum(fresh[0].bytes_R)

    def option(name: str, placement: Placement) -> _Option:
        return _Option(name, placement, int(moved_bytes_LR(before, placement.layers, problem).sum()))

    def worth(one: _Option) -> float:
        return one.predicted + problem.move_price * one.moved_bytes / max(budget, 1)

    options = [option("moved", certify(_least_moving(problem, before, placement))) for placement in fresh]
    if stay is not None:
        options += [
            option("moved in part", certify(layers))
            for one in list(options)
            if (layers := _mixed(problem, before, stay, one.placement, budget)) is not None
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
    best = min(reachable, key=lambda one: (worth(one), one.moved_bytes))
    if stay is not None and worth(options[-1]) - worth(best) <= min_gain:
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
    if problem.rules != Rules(spread_nodes=problem.rules.spread_nodes):
        return fresh.layers  # rules tell ranks apart
    stats = problem.stats
    return relabelled(
        before, fresh.layers, problem.budget_bytes_R, problem.topology, stats.expert_bytes, stats.native_format
    )


def _mixed(
    problem: PlacementProblem, before: Held, stay: Placement, new: Placement, budget: int
) -> list[LayerPlacement] | None:
    """`stay` with those layers of `new` that gain most per moved byte, as far as bytes and caps allow; None if none."""
    stats, num_ranks = problem.stats, problem.topology.num_ranks
    moved_L = moved_bytes_LR(before, new.layers, problem).sum(axis=1)
    gain_L = np.array(
        [(old.predicted or 1.0) - (one.predicted or 1.0) for old, one in zip(stay.layers, new.layers, strict=True)]
    ) / len(stay.layers)
    worth_L = gain_L - problem.move_price * moved_L / max(budget, 1)
    per_byte_L = gain_L / np.maximum(moved_L, 1)
    delta_LR = np.stack(
        [
            bytes_of(one.replicas, num_ranks, stats.expert_bytes)
            - bytes_of(old.replicas, num_ranks, stats.expert_bytes)
            for old, one in zip(stay.layers, new.layers, strict=True)
        ]
    )
    pairs_LE = stats.counts.sum(axis=0)
    low_L = np.array(
        [
            one.low_pairs(pairs_E, stats.native_format) - old.low_pairs(pairs_E, stats.native_format)
            for old, one, pairs_E in zip(stay.layers, new.layers, pairs_LE, strict=True)
        ]
    )
    bytes_R = np.array(stay.bytes_R, np.int64)
    limit_R = np.full(num_ranks, np.iinfo(np.int64).max)
    if problem.budget_bytes_R is not None:
        limit_R = np.array(problem.budget_bytes_R, np.int64)
    low = stay.low_precision_planned * int(pairs_LE.sum())
    max_low = problem.max_low_precision_share * int(pairs_LE.sum())
    left = np.inf if problem.max_moved_bytes is None else problem.max_moved_bytes
    taken: set[int] = set()
    waiting = [at for at in np.argsort(-per_byte_L, kind="stable").tolist() if worth_L[at] > 0]
    while waiting:
        fitting = next(
            (
                at
                for at in waiting
                if moved_L[at] <= left and (bytes_R + delta_LR[at] <= limit_R).all() and low + low_L[at] <= max_low
            ),
            None,
        )
        if fitting is None:
            break
        waiting.remove(fitting)
        taken.add(fitting)
        bytes_R, low, left = bytes_R + delta_LR[fitting], low + low_L[fitting], left - moved_L[fitting]
    if not taken or len(taken) == len(stay.layers):
        return None
    return [new.layers[at] if at in taken else old for at, old in enumerate(stay.layers)]
