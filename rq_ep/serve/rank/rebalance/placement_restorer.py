"""The rank that leads a group without rebalancing: it brings the balance back after ranks have left or joined."""

import logging
import queue
from collections.abc import Callable, Mapping, Sequence

from rq_ep.core.arrays import IntArray
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.rebalancing.settle import Settlement, SettleRequest
from rq_ep.serve.messages import (
    FromRank,
    ImportanceReport,
    MigrationGivenUp,
    MigrationPlanned,
    RebalanceCommand,
    RoundServed,
)
from rq_ep.serve.rank.rebalance.leading_rank import placement_served
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.rebalance.planner_process import Answer, PlannerFailure
from rq_ep.serve.rank.rebalance.rebalance_controller import PlannerSide

log = logging.getLogger("rq_ep.serve")


class PlacementRestorer:
    """One migration beside the steps: to the placement that served with all ranks, or the strategy's for those left.

    Args:
        inputs: what was checked.
        placement: that serves.
        home: that served with all ranks.
        members: the ranks that take part, ascending.
        generation: of the migration.
        counts_LE: pairs of each expert, as far as they are known.
        send: sends a message to the HTTP process.
        make_planner: starts what finds the placement.
    """

    def __init__(
        self,
        inputs: MoveInputs,
        placement: Placement,
        home: Placement,
        members: Sequence[int],
        generation: int,
        counts_LE: IntArray | None,
        send: Callable[[FromRank], None],
        make_planner: Callable[[], PlannerSide],
    ) -> None:
        self._inputs = inputs
        self._placement = placement
        self._members = members
        self._generation = generation
        self._send = send
        self._layers = list(placement.layers)  # as they serve
        self._num_rounds = 0  # that serve
        self._goal: Placement | None = None
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._planner: PlannerSide | None = None  # while it is at work
        problem = inputs.problem(placement, counts_LE)
        request = SettleRequest(problem, inputs.strategy, placement, home, tuple(members), inputs.room_bytes)
        if request.is_needed:
            self._planner = make_planner()
            self._planner.ask(request)

    def on_round(self, layers: Mapping[int, LayerPlacement]) -> None:
        self._events.put(lambda: self._take_round(layers))

    def on_end(self, is_committed: bool, reason: str) -> None:
        self._events.put(lambda: self._end(is_committed, reason))

    def handle(self, message: RebalanceCommand | MigrationGivenUp | ImportanceReport) -> None:
        if isinstance(message, MigrationGivenUp):
            log.warning("the balance was not brought back: %s", message.reason)

    def tick(self) -> None:
        while not self._events.empty():
            self._events.get()()
        if self._planner is not None and (answer := self._planner.take()) is not None:
            self.close()
            self._begin(answer)

    def close(self) -> None:
        if self._planner is not None:
            self._planner.close()
            self._planner = None

    # On the main thread

    def _begin(self, answer: Answer) -> None:
        if isinstance(answer, PlannerFailure):
            log.warning("the placement stays as it is: %s", answer.reason)
            return
        assert isinstance(answer, Settlement)
        if rounds := answer.rounds:
            self._goal = answer.placement
            log.info("experts go to where they are balanced among ranks %s, in %d rounds", self._members, len(rounds))
            sizes = dict(self._inputs.stats.expert_bytes)
            self._send(MigrationPlanned(self._generation, answer.placement.to_dict(), list(rounds), sizes))

    def _take_round(self, layers: Mapping[int, LayerPlacement]) -> None:
        for position, layer in layers.items():
            self._layers[position] = layer
        self._num_rounds += 1
        self._send(RoundServed(self._generation, self._num_rounds))

    def _end(self, is_committed: bool, reason: str) -> None:
        assert self._goal is not None
        if not is_committed:
            log.warning("the balance was not brought back: %s", reason or "another rank gave it up")
        placement = self._goal if is_committed else self._placement_now()
        self._send(placement_served(self._inputs, self._generation, placement))

    def _placement_now(self) -> Placement:
        return self._placement.with_layers(self._layers, self._inputs.stats.expert_bytes)
