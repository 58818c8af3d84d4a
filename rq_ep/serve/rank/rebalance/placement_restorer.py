"""The rank that leads a group without rebalancing: it brings the balance back after ranks have left or joined."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.serve.messages import FromRank, ImportanceReport, MigrationGivenUp, MigrationPlanned, RebalanceCommand
from rq_ep.serve.rank.rebalance.leading_rank import Served
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds, with_early_drops
from rq_ep.solver.migration.warm_start import place_for_members

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
    ) -> None:
        self._inputs = inputs
        self._placement = placement
        self._home = home
        self._members = members
        self._generation = generation
        self._counts_LE = counts_LE
        self._send = send
        self._served = Served(inputs, send)
        self._layers = list(placement.layers)  # as they serve
        self._goal: Placement | None = None
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._plan, name="rq_ep restorer", daemon=True).start()  # it may take seconds

    def _plan(self) -> None:
        try:
            goal = self._chosen_goal()
            if goal is not None:
                rounds = self._rounds_to(goal)
                self._events.put(lambda: self._begin(goal, rounds))
        except UserError as error:
            log.warning("the placement stays as it is: %s", error)

    def _chosen_goal(self) -> Placement | None:
        if len(self._members) == self._placement.topology.num_ranks:
            return self._home
        strategy = self._inputs.strategy
        if not strategy.begins_from_current:  # it would move most experts
            return None
        problem = self._inputs.problem(self._placement, self._counts_LE)
        return place_for_members(strategy, problem, self._placement, self._members)

    def _rounds_to(self, goal: Placement) -> list[MoveRound]:
        before = [list(layer.replicas) for layer in self._placement.layers]
        inputs = self._inputs
        rounds = move_rounds(before, goal, inputs.stats.expert_bytes, inputs.native_format, inputs.room_bytes)
        return rounds if inputs.strategy.serves_replicas else with_early_drops(rounds)

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

    def close(self) -> None:
        """Nothing is left to be done."""

    # On the main thread

    def _begin(self, goal: Placement, rounds: Sequence[MoveRound]) -> None:
        if rounds:
            self._goal = goal
            log.info("experts go to where they are balanced among ranks %s, in %d rounds", self._members, len(rounds))
            self._send(MigrationPlanned(self._generation, goal.to_dict(), list(rounds)))

    def _take_round(self, layers: Mapping[int, LayerPlacement]) -> None:
        for position, layer in layers.items():
            self._layers[position] = layer
        self._served.layers(self._generation, self._placement_now(), tuple(layers))

    def _end(self, is_committed: bool, reason: str) -> None:
        assert self._goal is not None
        if not is_committed:
            log.warning("the balance was not brought back: %s", reason or "another rank gave it up")
        self._served.all(self._generation, self._goal if is_committed else self._placement_now())

    def _placement_now(self) -> Placement:
        bytes_R = bytes_by_rank(self._layers, self._placement.topology.num_ranks, self._inputs.stats.expert_bytes)
        return replace(self._placement, layers=tuple(self._layers), bytes_R=tuple(bytes_R.tolist()), certificate={})
