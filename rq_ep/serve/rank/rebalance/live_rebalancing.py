"""Rebalancing on one rank while it serves: the mover of every rank and, on rank 0, who observes and decides."""

import logging
import math
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rq_ep.core.placement import Placement
from rq_ep.engine.progress import MoverProgress
from rq_ep.engine.step_agreement import GroupFlags
from rq_ep.model.load.load_report import LoadReport
from rq_ep.model.load.memory import expert_bytes
from rq_ep.moe import EPExperts
from rq_ep.parallel import TorchGroup
from rq_ep.rebalancing.rebalancer import Decision, Rebalancer
from rq_ep.serve.messages import (
    BeginMigration,
    FromRank,
    ImportanceReport,
    MigrationGivenUp,
    MigrationPlanned,
    PlacementServed,
    RebalanceAnswer,
    RebalanceCommand,
)
from rq_ep.serve.rank.rebalance.group_mover import GroupMover
from rq_ep.serve.rank.rebalance.importance_reports import ImportanceReports
from rq_ep.serve.rank.rebalance.planner_process import PlannerProcess, SaveRequest
from rq_ep.serve.rank.rebalance.rebalance_controller import PlannerSide, RebalanceController
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs
from rq_ep.serve.rank.rebalance.step_loads import StepLoads

log = logging.getLogger("rq_ep.serve")

STATUS_EVERY_S = 1.0


class LiveRebalancing:
    """This rank's part in rebalancing; every rank makes one, at the same time.

    Args:
        inputs: what was checked before the model was loaded.
        report: of the model.
        layers: its expert-parallel layers.
        group: its ranks.
        loads: the loads of steps, on rank 0; None elsewhere.
        send: sends a message to the HTTP process.
        wake: has the ranks agree on a step soon, though nobody may have tokens.
        planner: makes the decisions, on rank 0; default: a process.
        clock: seconds.
    """

    def __init__(
        self,
        inputs: RebalanceInputs,
        report: LoadReport,
        layers: list[EPExperts],
        group: TorchGroup,
        loads: StepLoads | None,
        send: Callable[[FromRank], None],
        wake: Callable[[], None],
        planner: PlannerSide | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loads = loads
        self._leader: LeadingRank | None = None
        if loads is not None:
            planner = planner or PlannerProcess()
            self._leader = LeadingRank(inputs, report.placement, loads, send, self.abort, planner, clock)
        self._mover = GroupMover(
            layers,
            group.open_host_channel(),
            inputs.planner_of(layers[0].family, report.placement),
            inputs.read_expert(),
            inputs.reads_formats,
            inputs.rule.bytes_per_step,
            wake,
            lambda generation, reason: send(MigrationGivenUp(generation, reason)),
            self._leader,
        )
        self._reports = ImportanceReports(layers, send) if inputs.measures_importance else None
        self.flags = self._mover.flags

    def progress(self) -> MoverProgress:
        """How far this rank has come."""
        return self._mover.progress

    def on_agreement(self, flags: GroupFlags) -> None:
        """Take part in what all ranks do between the same two steps; on the engine's thread."""
        if self._loads is not None:
            self._loads.between_steps(flags.any_prefill)
        if self._reports is not None:
            self._reports.between_steps()
        self._mover.on_agreement(flags)

    def handle(self, message: BeginMigration | RebalanceCommand | MigrationGivenUp | ImportanceReport) -> None:
        """Take a message of the HTTP process, on the thread of its connection."""
        if isinstance(message, BeginMigration):
            self._mover.begin(message)
        elif self._leader is not None:
            self._leader.handle(message)

    def tick(self) -> None:
        """Go on, on the main thread; called many times a second."""
        if self._reports is not None:
            self._reports.tick()
        if self._leader is not None:
            self._leader.tick()

    def abort(self, generation: int, reason: str) -> None:
        """Give a migration up, on all ranks."""
        self._mover.abort(generation, reason)

    def stop(self) -> None:
        """Give up what is under way, before the engine stops."""
        self._mover.stop()

    def close(self) -> None:
        """End, after the engine."""
        self._mover.close()
        if self._leader is not None:
            self._leader.close()


class LeadingRank:
    """Rank 0's part: a controller on the main thread, and what reaches it from other threads.

    Args:
        inputs: what was checked.
        placement: that serves at first.
        loads: of steps.
        send: sends a message to the HTTP process.
        abort: gives a migration up.
        planner: makes the decisions.
        clock: seconds.
    """

    def __init__(
        self,
        inputs: RebalanceInputs,
        placement: Placement,
        loads: StepLoads,
        send: Callable[[FromRank], None],
        abort: Callable[[int, str], None],
        planner: PlannerSide,
        clock: Callable[[], float],
    ) -> None:
        self._inputs = inputs
        self._loads = loads
        self._send = send
        self.abort = abort
        self._planner = planner
        self._clock = clock
        rebalancer = Rebalancer(inputs.problem(placement), inputs.strategy, placement, inputs.rule)
        self._controller = RebalanceController(rebalancer, inputs.stats.expert_bytes, planner, self, clock)
        self._importance = rebalancer.importance
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sent = self._controller.status
        self._sent_at_s = -math.inf
        self._save(placement)  # a file that is there may be of another time or model

    # On other threads

    def on_round(self, layers: Mapping[int, Any]) -> None:
        self._events.put(lambda: self._controller.on_round(layers))

    def on_end(self, is_committed: bool, reason: str) -> None:
        self._events.put(lambda: self._controller.on_end(is_committed, reason))

    def handle(self, message: RebalanceCommand | MigrationGivenUp | ImportanceReport) -> None:
        match message:
            case MigrationGivenUp():
                self._events.put(lambda: self._controller.on_given_up(message.generation, message.reason))
            case ImportanceReport():
                self._events.put(lambda: self._add_importance(message))
            case RebalanceCommand():
                self._events.put(lambda: self._controller.command(message.number, message.action))

    # On the main thread

    def tick(self) -> None:
        while not self._events.empty():
            self._events.get()()
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
        self._planner.close()

    # As the host of the controller

    def begin(self, generation: int, decision: Decision) -> None:
        assert decision.placement is not None
        log.info(
            "re-placement %d: %s; %s bytes in %d rounds",
            generation, decision.reason, f"{decision.moved_bytes:,}", len(decision.rounds),
        )  # fmt: skip
        self._send(MigrationPlanned(generation, decision.placement.to_dict(), list(decision.rounds)))

    def served(self, generation: int, placement: Placement, positions: tuple[int, ...] | None) -> None:
        if positions is not None:
            log.debug("a round of re-placement %d serves", generation)
            changed = replace(placement, layers=tuple(placement.layers[position] for position in sorted(positions)))
            bytes_R = list(placement.bytes_R)
            self._send(PlacementServed(generation, changed.to_dict()["layers"], bytes_R=bytes_R))
            return
        ranks, layout = range(placement.topology.num_ranks), self._inputs.layout
        sizes = [expert_bytes(placement, layout, [rank]) for rank in ranks]
        self._send(PlacementServed(generation, [], placement.to_dict(), sizes))
        self._save(placement)

    def _save(self, placement: Placement) -> None:
        if (path := self._inputs.config.placement_out) is not None:
            self._planner.ask(SaveRequest(placement, path))

    def warn(self, text: str) -> None:
        log.warning("%s", text)

    def answer(self, number: int, refusal: str | None, decision: Mapping[str, Any] | None) -> None:
        self._send(RebalanceAnswer(number, refusal, None if decision is None else dict(decision)))
