"""Warm start: a placement where one serves already, on the same ranks, on more or fewer, or after some are lost."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rq_ep.core.errors import UserError
from rq_ep.core.moves import Moves
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.migration.choose_migration import choose_migration
from rq_ep.solver.migration.fit_formats import enforce_low_cap
from rq_ep.solver.migration.members import lifted, lowered, lowered_problem
from rq_ep.solver.migration.plan_moves import plan_moves
from rq_ep.solver.migration.survivors import Survivors, completed, remaining_ranks

MIN_GAIN = 0.01  # of max/mean: for less a placement that serves is not changed
LOW_SLACK = 0.01  # of all pairs, by which one that serves may exceed the cap on new statistics


def place_again(
    strategy: Strategy, problem: PlacementProblem, survivors: Survivors, min_gain: float = MIN_GAIN
) -> Placement:
    """The best of staying, moving in part and moving all, at the price of what has to move.

    Args:
        strategy: places.
        problem: its `max_moved_bytes` and `move_price` hold.
        survivors: what the ranks hold.
        min_gain: max/mean by which a placement must be better than staying.

    Raises:
        UserError: nothing can be reached with so few moved bytes, or the budget is too small.
    """
    limit_s = None if problem.time_limit_s is None else problem.time_limit_s / 2  # for each of two searches
    first = replace(problem, time_limit_s=limit_s, on_progress=lambda fraction: problem.on_progress(fraction / 2))
    second = replace(first, on_progress=lambda fraction: problem.on_progress((1 + fraction) / 2))
    fresh = [strategy.place(first)]

    def certified(layers: Sequence[LayerPlacement]) -> Placement:
        return certify(problem, strategy, layers)

    layers, stay = completed(problem, survivors), None
    if layers is None:
        return choose_migration(
            problem, survivors.held, None, fresh, certified, min_gain, "it uses a format that --formats leaves out"
        )
    refused = _refused(layers, problem, strategy)
    if not refused:
        stay = certified(layers)
    capped = enforce_low_cap(problem, layers)
    with suppress(UserError):  # from there, the search may not get inside the budget
        warm = strategy.place(replace(second, held=survivors.held), _as_placement(problem, strategy.name, capped))
        # Formats stay in that search, so its low pairs may be too many; a strategy may ignore what serves.
        if warm.low_precision_planned <= problem.max_low_precision_share + LOW_SLACK and not _same(warm, fresh[0]):
            fresh.append(warm)
        if capped is not layers:
            fresh.append(certified(capped))
    return choose_migration(problem, survivors.held, stay, fresh, certified, min_gain, refused)


def place_for_members(
    strategy: Strategy, problem: PlacementProblem, placement: Placement, members: Sequence[int]
) -> Placement:
    """What the members of a group are best to hold, on all ranks, beginning with what they do: seconds.

    It is no worse than what the strategy places for the members alone.

    Args:
        strategy: places.
        problem: loads, formats, cap and budgets of all ranks.
        placement: that serves; every expert has a replica on a member.
        members: ascending.

    Raises:
        UserError: the budget is too small.
    """
    alone, current = lowered_problem(problem, members), lowered(placement, members)
    held = [list(layer.replicas) for layer in current.layers]
    mixed_formats = tuple(layer.replicas.mixed_formats for layer in current.layers)
    survivors = Survivors(tuple(range(len(members))), held, mixed_formats, num_missing=0)
    best = place_again(strategy, alone, survivors, min_gain=0.0)
    return lifted(best, members, problem.topology, problem.budget_bytes_R)


def _as_placement(problem: PlacementProblem, strategy: str, layers: Sequence[LayerPlacement]) -> Placement:
    """What serves now as a placement, within the limits or not: the initial solution of a search."""
    bytes_R = bytes_by_rank(layers, problem.topology.num_ranks, problem.stats.expert_bytes)
    return Placement(tuple(layers), strategy, problem.topology, tuple(bytes_R.tolist()), model=problem.stats.model)


def moves_to(
    placement: Placement, current: Placement | str | Path, stats: ExpertStats, lost_ranks: Sequence[int] = ()
) -> Moves:
    """The moves of the ranks from `current` to `placement`, replayed and checked."""
    survivors = survivors_of(current, stats, placement.topology.num_ranks, lost_ranks)
    num_ranks = placement.topology.num_ranks
    moves = plan_moves(survivors.held, placement, stats.expert_bytes, stats.native_format)
    if survivors.ranks != tuple(range(num_ranks)):
        moves = replace(moves, previous_ranks=(*survivors.ranks, *[None] * (num_ranks - len(survivors.ranks))))
    moves.check(
        dict(zip(stats.layers, survivors.held, strict=True)), placement, stats.expert_bytes, stats.native_format
    )
    return moves


def survivors_of(
    current: Placement | str | Path, stats: ExpertStats, num_ranks: int, lost_ranks: Sequence[int] = ()
) -> Survivors:
    """What `num_ranks` ranks hold of the placement that serves now; a `UserError` if that is of another model."""
    what = "the current placement" if isinstance(current, Placement) else str(current)
    if not isinstance(current, Placement):
        current = Placement.load(current)
    if stats.model is not None and current.model is not None:
        stats.model.check(current.model, what)
    current.check_stats(stats, what)
    return remaining_ranks(current, num_ranks, lost_ranks)


def _same(one: Placement, other: Placement) -> bool:
    return all(
        list(mine.replicas) == list(theirs.replicas) for mine, theirs in zip(one.layers, other.layers, strict=True)
    )


def _refused(layers: Sequence[LayerPlacement], problem: PlacementProblem, strategy: Strategy) -> str:
    """Why the strategy cannot serve the layers within the problem's limits; empty if it can."""
    serves_one = strategy.split == "home" or not strategy.serves_replicas
    if serves_one and any(len(layer.replicas) > layer.num_experts for layer in layers):
        return f"{strategy.name} serves one replica of each expert"
    if strategy.split == "exact" and any(layer.replicas.mixing_experts for layer in layers):
        return f"it stores an expert in several formats, which {strategy.name} does not split"
    try:
        share = problem.placement(strategy.name, layers).low_precision_planned
    except UserError as error:
        return str(error)
    if share > problem.max_low_precision_share + LOW_SLACK:
        return f"{share:.1%} of its pairs would be in low precision"
    return ""
