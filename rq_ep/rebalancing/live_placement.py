"""The placement of a group that rebalances, step by step in modelled time: decisions, delay, moves.

The server does the same with transfers in place of arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rq_ep.core.arrays import IntArray
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.rebalancing.rebalancer import Decision, Rebalancer, decide
from rq_ep.rebalancing.staged_moves import StagedMoves


@dataclass(frozen=True)
class Commit:
    """Replicas that serve from the step after `step` on."""

    step: int
    layers: tuple[int, ...]  # positions
    ends: bool  # whether the migration has reached its goal


class LivePlacement:
    """A placement that follows the load.

    Args:
        rebalancer: decides.
        delay_steps: steps from a decision's request to its answer.
    """

    def __init__(self, rebalancer: Rebalancer, delay_steps: int = 0) -> None:
        self._rebalancer = rebalancer
        self._delay_steps = delay_steps
        self._layers = list(rebalancer.current.layers)
        self._step = 0
        self._decision: tuple[int, Decision] | None = None  # with the step at which it is known
        self._goal: Placement | None = None
        self._moves: StagedMoves | None = None
        self.decisions: list[tuple[int, Decision]] = []
        self.commits: list[Commit] = []
        self.moved_bytes = 0

    @property
    def placement(self) -> Placement:
        """The last one whose moves have all been made."""
        return self._rebalancer.current

    @property
    def num_rebalances(self) -> int:
        """Migrations that have reached their goals."""
        return sum(commit.ends for commit in self.commits)

    def step(self, counts_LE: IntArray, phase: int = 0) -> Mapping[int, LayerPlacement]:
        """Take the loads of a step that was made; position -> layer of those that change before the next one."""
        self._step += 1
        self._rebalancer.observe(counts_LE, phase)
        if self._moves is not None:
            return self._moved(self._moves)
        if self._decision is None and self._rebalancer.is_due:
            self._decision = (self._step + self._delay_steps, decide(self._rebalancer.request()))
        if self._decision is not None and self._step >= self._decision[0]:
            _, decision = self._decision
            self._decision = None
            self._begin(decision)
        return {}

    def _begin(self, decision: Decision) -> None:
        self.decisions.append((self._step, decision))
        if decision.placement is not None:
            self._goal = decision.placement
            self._moves = self._rebalancer.staged(decision)

    def _moved(self, moves: StagedMoves) -> Mapping[int, LayerPlacement]:
        arrived = moves.step()
        if arrived is None:
            return {}
        self._layers = arrived.applied_to(self._layers, self._goal)
        if moves.is_done and self._goal is not None:
            self.moved_bytes += moves.moved_bytes
            self._rebalancer.commit(self._goal)
            self._moves = self._goal = None
        self.commits.append(Commit(self._step, arrived.layers, self._moves is None))
        return {position: self._layers[position] for position in arrived.layers}
