"""The rank that leads rebalancing: a controller on its main thread, and what reaches it from other threads."""

import logging
import math
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.model.load.memory import expert_bytes
from rq_ep.rebalancing.rebalancer import Decision, Rebalancer
from rq_ep.serve.messages import (
    FromRank,
    ImportanceReport,
    MigrationGivenUp,
    MigrationPlanned,
    PlacementServed,
    RebalanceAnswer,
    RebalanceCommand,
    RoundServed,
)
from rq_ep.serve.rank.loads.step_loads import StepLoads
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.rebalance.planner_process import SaveRequest
from rq_ep.serve.rank.rebalance.rebalance_controller import PlannerSide, RebalanceController
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs
from rq_ep.solver.migration.members import lifted, lifted_rounds, lowered, lowered_layer

log = logging.getLogger("rq_ep.serve")

STATUS_EVERY_S = 1.0
GROUP_CHANGES = "the ranks of the group change: ask again"


class Leader(Protocol):
    """Decides on moves while a group has the same members, on one of its ranks."""

    def on_round(self, layers: Mapping[int, LayerPlacement]) -> None:
        """A round serves: layers by their position, as they are now."""

    def on_end(self, is_committed: bool, reason: str) -> None:
        """A migration has ended; `reason`: why this rank gave it up, if it did."""

    def handle(self, message: RebalanceCommand | MigrationGivenUp | ImportanceReport) -> None:
        """Take a message of the HTTP process."""

    def tick(self) -> None:
        """Go on, on the main thread."""

    def close(self) -> None:
        """End; what was asked for is refused."""


def placement_served(inputs: MoveInputs, generation: int, placement: Placement) -> PlacementServed:
    """What tells the HTTP process that a placement serves."""
    ranks = range(placement.topology.num_ranks)
    sizes = [expert_bytes(placement, inputs.layout, [rank]) for rank in ranks]
    return PlacementServed(generation, placement.to_dict(), sizes)


class LeadingRank:
    """Rebalancing of the ranks that take part now, as if there were no others.

    Args:
        inputs: what was checked.
        placement: that serves at first, of all ranks.
        members: those that take part, ascending.
        generation: of the last migration before; those to come have higher numbers.
        loads: of steps.
        send: sends a message to the HTTP process.
        abort: gives a migration up.
        planner: makes the decisions; whoever has made it closes it.
        clock: seconds.
    """

    def __init__(
        self,
        inputs: RebalanceInputs,
        placement: Placement,
        members: Sequence[int],
        generation: int,
        loads: StepLoads,
        send: Callable[[FromRank], None],
        abort: Callable[[int, str], None],
        planner: PlannerSide,
        clock: Callable[[], float],
    ) -> None:
        self._inputs = inputs
        self._all = placement
        self._members = members
        self._loads = loads
        self._send = send
        self.abort = abort
        self._planner = planner
        self._clock = clock
        of_members = self._lowered(placement)
        rebalancer = Rebalancer(inputs.problem(of_members), inputs.strategy, of_members, inputs.rule)
        self._controller = RebalanceController(rebalancer, inputs.stats.expert_bytes, planner, self, clock, generation)
        self._importance = rebalancer.importance
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[RebalanceCommand] = queue.SimpleQueue()
        self._sent = self._controller.status
        self._sent_at_s = -math.inf
        self._save(placement)  # a file that is there may be of another time or model

    # On other threads

    def on_round(self, layers: Mapping[int, LayerPlacement]) -> None:
        self._events.put(lambda: self._controller.on_round(self._lowered_layers(layers)))

    def on_end(self, is_committed: bool, reason: str) -> None:
        self._events.put(lambda: self._controller.on_end(is_committed, reason))

    def handle(self, message: RebalanceCommand | MigrationGivenUp | ImportanceReport) -> None:
        match message:
            case MigrationGivenUp():
                self._events.put(lambda: self._controller.on_given_up(message.generation, message.reason))
            case ImportanceReport():
                self._events.put(lambda: self._add_importance(message))
            case RebalanceCommand():
                self._commands.put(message)

    # On the main thread

    def tick(self) -> None:
        while not self._events.empty():
            self._events.get()()
        while not self._commands.empty():
            command = self._commands.get()
            self._controller.command(command.number, command.action)
        for counts_LE, phase in self._loads.take():
            self._controller.observe(counts_LE, phase)
        self._controller.step()
        status, now_s = self._controller.status, self._clock()
        has_changed = replace(status, progress_s=0.0, retry_s=0.0) != replace(self._sent, progress_s=0.0, retry_s=0.0)
        if has_changed or now_s - self._sent_at_s >= STATUS_EVERY_S:
            self._sent, self._sent_at_s = status, now_s
            self._send(status)

    def _add_importance(self, report: ImportanceReport) -> None:
        for row in report.rows:
            self._importance.add(*row)

    def close(self) -> None:
        self._controller.refuse(GROUP_CHANGES)
        while not self._commands.empty():
            self.answer(self._commands.get().number, GROUP_CHANGES, None)

    # The ranks that take part, renumbered

    def _lowered(self, placement: Placement) -> Placement:
        return placement if self._has_all else lowered(placement, self._members)

    def _lowered_layers(self, layers: Mapping[int, LayerPlacement]) -> Mapping[int, LayerPlacement]:
        if self._has_all:
            return layers
        return {position: lowered_layer(layer, self._members) for position, layer in layers.items()}

    def _lifted(self, placement: Placement) -> Placement:
        if self._has_all:
            return placement
        return lifted(placement, self._members, self._all.topology, self._all.budget_bytes_R)

    @property
    def _has_all(self) -> bool:
        return len(self._members) == self._all.topology.num_ranks

    # As the host of the controller

    def begin(self, generation: int, decision: Decision) -> None:
        assert decision.placement is not None
        log.info(
            "re-placement %d: %s; %s bytes in %d rounds",
            generation, decision.reason, f"{decision.moved_bytes:,}", len(decision.rounds),
        )  # fmt: skip
        rounds = lifted_rounds(decision.rounds, self._members)
        goal, sizes = self._lifted(decision.placement), dict(self._inputs.stats.expert_bytes)
        self._send(MigrationPlanned(generation, goal.to_dict(), list(rounds), sizes))

    def round_served(self, generation: int, num_rounds: int) -> None:
        log.debug("%d rounds of re-placement %d serve", num_rounds, generation)
        self._send(RoundServed(generation, num_rounds))

    def served(self, generation: int, placement: Placement) -> None:
        placement = self._lifted(placement)
        self._send(placement_served(self._inputs, generation, placement))
        self._save(placement)

    def _save(self, placement: Placement) -> None:
        if (path := self._inputs.config.placement_out) is not None:
            self._planner.ask(SaveRequest(placement, path))

    def warn(self, text: str) -> None:
        log.warning("%s", text)

    def answer(self, number: int, refusal: str | None, decision: Mapping[str, Any] | None) -> None:
        self._send(RebalanceAnswer(number, refusal, None if decision is None else dict(decision)))
