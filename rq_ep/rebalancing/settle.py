"""Where a group whose members have changed goes on to, beside the steps: its recovery was placed within a moment."""

from dataclasses import dataclass

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import Strategy
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds, with_early_drops
from rq_ep.solver.migration.warm_start import place_for_members


@dataclass(frozen=True)
class SettleRequest:
    """All that it depends on. It can be sent to another process."""

    problem: PlacementProblem  # loads, formats, cap and budgets of all ranks
    strategy: Strategy
    placement: Placement  # that serves
    home: Placement  # that served with all ranks
    members: tuple[int, ...]  # ascending
    room_bytes: int  # of a rank, beside its budget, for what arrives

    @property
    def is_needed(self) -> bool:
        """Whether there may be a better placement: the one of all ranks if all serve, else what the strategy finds.

        A strategy that would not begin from what serves would move most experts.
        """
        if len(self.members) == self.placement.topology.num_ranks:
            pairs = zip(self.placement.layers, self.home.layers, strict=True)
            return any(list(now.replicas) != list(then.replicas) for now, then in pairs)
        return self.strategy.begins_from_current


@dataclass(frozen=True)
class Settlement:
    """The placement, and the rounds that lead to it; none: it serves already."""

    placement: Placement
    rounds: tuple[MoveRound, ...]


def settle(request: SettleRequest) -> Settlement:
    """Find the placement: takes seconds where ranks are missing.

    Raises:
        UserError: the members cannot hold every expert in their budgets.
    """
    before, goal, stats = request.placement, request.home, request.problem.stats
    if len(request.members) < before.topology.num_ranks:
        goal = place_for_members(request.strategy, request.problem, before, request.members)
    held = [list(layer.replicas) for layer in before.layers]
    rounds = move_rounds(held, goal, stats.expert_bytes, stats.native_format, request.room_bytes)
    return Settlement(goal, tuple(rounds if request.strategy.serves_replicas else with_early_drops(rounds)))
