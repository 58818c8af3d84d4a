"""What the leader decides when the members of a group have changed: where the experts go, and in which rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement, bytes_by_rank
from rq_ep.model.load.memory import spare_bytes
from rq_ep.moe import EPExperts
from rq_ep.parallel import TorchGroup
from rq_ep.serve.rank.loads.load_recorders import LoadRecorders
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs, recovered
from rq_ep.solver.migration.move_rounds import MoveRound, with_early_drops
from rq_ep.solver.migration.recover import Recovery


@dataclass(frozen=True)
class RecoveryPlan:
    """What the leader has decided, for all members."""

    home: Placement  # that served with all ranks
    current: Placement  # what the members hold; on other ranks, what is missing
    goal: Placement
    rounds: tuple[MoveRound, ...]  # none: every expert has a replica on a member


def within_memory(placement: Placement, spare: Mapping[int, int | None]) -> tuple[int, ...]:
    """[R] bytes of experts that ranks may hold, with so much memory left on the members."""
    return tuple(held + (spare.get(rank) or 0) for rank, held in enumerate(placement.bytes_R))


class RecoveryPlanner:
    """Plans with what the layers of this rank say of all ranks, and changes nothing.

    Args:
        group: the ranks.
        layers: of the model, in the order of its placement.
        inputs: what moves of experts need.
        loads: know which experts were chosen lately.
    """

    def __init__(
        self, group: TorchGroup, layers: Sequence[EPExperts], inputs: MoveInputs, loads: LoadRecorders
    ) -> None:
        self._group = group
        self._layers = layers
        self._inputs = inputs
        self._loads = loads

    def plan(self, home: Placement, free_M: Sequence[int | None]) -> RecoveryPlan:
        """Where the experts are to be with the members that the group has now.

        Args:
            home: the placement that served with all ranks.
            free_M: bytes of memory that the device of each member has left; None: not known.

        Raises:
            UserError: they cannot hold the model.
        """
        current = self._placement_now(home)
        members = self._group.members
        if all(replica.rank in members for layer in current.layers for replica in layer.replicas):
            return RecoveryPlan(home, current, current, ())
        goal, rounds = self._recovered(home, current, members, free_M)
        if not self._inputs.strategy.serves_replicas:
            rounds = tuple(with_early_drops(rounds))
        goal = replace(goal, budget_bytes_R=_budget_R(home, goal.bytes_R))
        return RecoveryPlan(home, current, goal, rounds)

    def refusal(self, home: Placement, members: Sequence[int], free_M: Sequence[int | None]) -> str | None:
        """Why these ranks alone could not hold the model, by the plan that they would make; None: they could."""
        try:
            self._recovered(home, self._placement_now(home), members, free_M)
        except UserError as error:
            return str(error)
        return None

    def _recovered(
        self, home: Placement, current: Placement, members: Sequence[int], free_M: Sequence[int | None]
    ) -> Recovery:
        spare_M = [spare_bytes(free, self._group.device, len(members)) for free in free_M]
        memory_R = None if None in spare_M else within_memory(current, dict(zip(members, spare_M, strict=True)))
        counts_LE = self._loads.recent_pairs_LE(len(self._layers))
        return recovered(self._inputs, home, current, members, memory_R, counts_LE)

    def _placement_now(self, home: Placement) -> Placement:
        """What serves; in the middle of a recovery, with what is still missing on ranks that are gone."""
        layers = tuple(layer.placement for layer in self._layers)
        bytes_R = bytes_by_rank(layers, self._group.size, self._inputs.stats.expert_bytes)
        held_R = tuple(bytes_R.tolist())
        return replace(home, layers=layers, bytes_R=held_R, budget_bytes_R=_budget_R(home, held_R), certificate={})


def _budget_R(home: Placement, held_R: Sequence[int]) -> tuple[int, ...]:
    """[R] bytes that ranks may hold: those they may with all ranks, or what they hold now if that is more."""
    return tuple(map(max, home.budget_bytes_R or home.bytes_R, held_R))
