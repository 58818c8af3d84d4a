"""The moves of experts on one rank while it serves: the mover of every rank and, on the one that leads, who decides."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from rq_ep.core.arrays import IntArray
from rq_ep.core.placement import Placement
from rq_ep.engine.progress import MoverProgress
from rq_ep.engine.step_agreement import GroupFlags
from rq_ep.model.load.load_report import LoadReport
from rq_ep.moe import EPExperts
from rq_ep.parallel import TorchGroup
from rq_ep.serve.messages import (
    BeginMigration,
    FromRank,
    ImportanceReport,
    MigrationGivenUp,
    RebalanceAnswer,
    RebalanceCommand,
)
from rq_ep.serve.rank.loads.step_loads import StepLoads
from rq_ep.serve.rank.rebalance.group_mover import GroupMover
from rq_ep.serve.rank.rebalance.importance_reports import ImportanceReports
from rq_ep.serve.rank.rebalance.leading_rank import GROUP_CHANGES, Leader, LeadingRank, placement_served
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.rebalance.placement_restorer import PlacementRestorer
from rq_ep.serve.rank.rebalance.planner_process import PlannerProcess
from rq_ep.serve.rank.rebalance.rebalance_controller import PlannerSide
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs


@dataclass(frozen=True)
class GroupChange:
    """What all ranks have agreed on when the members of their group have changed."""

    members: Sequence[int]
    leader: int
    placement: Placement  # that serves
    home: Placement  # that served with all ranks
    migration: int  # the number of the last one; those to come have higher ones


class LiveRebalancing:
    """This rank's part in moves of experts; every rank makes one, at the same time.

    Args:
        inputs: what was checked before the model was loaded; where it has no rule of rebalancing, experts move only
            when the members of the group change.
        report: of the model.
        layers: its expert-parallel layers.
        group: its ranks.
        loads: the loads of steps; None: the group does not rebalance.
        leads: whether this rank leads the group at first.
        send: sends a message to the HTTP process.
        wake: has the ranks agree on a step soon, though nobody may have tokens.
        planner: makes the decisions; default: a process.
        clock: seconds.
    """

    def __init__(
        self,
        inputs: MoveInputs,
        report: LoadReport,
        layers: list[EPExperts],
        group: TorchGroup,
        loads: StepLoads | None,
        leads: bool,
        send: Callable[[FromRank], None],
        wake: Callable[[], None],
        planner: PlannerSide | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inputs = inputs
        self._rank = group.rank
        self._loads = loads
        self._send = send
        self._clock = clock
        self.planner_of = inputs.planner_of(layers[0].family, report.placement, lambda: group.members)
        self.mover = GroupMover(
            layers,
            group.open_host_channel(),
            self.planner_of,
            inputs.read_expert(),
            inputs.reads_formats,
            inputs.pace,
            wake,
            lambda generation, reason: send(MigrationGivenUp(generation, reason)),
        )
        self._leading = threading.Lock()  # held while the leader is at work, or changes
        self._leader: Leader | None = None
        self._planner = planner  # while this rank leads a group that rebalances
        if leads and loads is not None:
            self._leader = self._rebalancing_leader(report.placement, group.members, 0, loads)
        self.mover.observe(self._leader)
        self._reports = ImportanceReports(layers, send) if inputs.measures_importance else None
        self.flags = self.mover.flags

    def progress(self) -> MoverProgress:
        """How far this rank has come."""
        return self.mover.progress

    def on_agreement(self, flags: GroupFlags) -> None:
        """Take part in what all ranks do between the same two steps; on the engine's thread."""
        if self._reports is not None:
            self._reports.between_steps()
        self.mover.on_agreement(flags)

    def handle(self, message: BeginMigration | RebalanceCommand | MigrationGivenUp | ImportanceReport) -> None:
        """Take a message of the HTTP process, on the thread of its connection."""
        if isinstance(message, BeginMigration):
            self.mover.begin(message)
            return
        with self._leading:  # a leader that takes a command is closed after that, and answers it
            if self._leader is not None:
                self._leader.handle(message)
            elif isinstance(message, RebalanceCommand):
                self._send(RebalanceAnswer(message.number, GROUP_CHANGES, None))

    def tick(self) -> None:
        """Go on, on the main thread; called many times a second."""
        if self._reports is not None:
            self._reports.tick()
        with self._leading:
            if self._leader is not None:
                self._leader.tick()

    def regroup(self, change: GroupChange, counts_LE: IntArray | None) -> None:
        """Go on with other members, on the engine's thread; the rank that leads begins with a fresh window.

        Args:
            change: what serves, and with whom.
            counts_LE: pairs of each expert, as far as this rank knows them.
        """
        with self._leading:
            if self._leader is not None:
                self._leader.close()
                self._leader = None
            if self._planner is not None and not (change.leader == self._rank and self._planner.is_free):
                self._planner.close()  # else it goes on, as its imports take seconds
                self._planner = None
            if change.leader == self._rank:
                self._leader = self._new_leader(change, counts_LE)
                self._send(placement_served(self._inputs, change.migration, change.placement))
            self.mover.observe(self._leader)

    def _new_leader(self, change: GroupChange, counts_LE: IntArray | None) -> Leader:
        if self._loads is not None:
            return self._rebalancing_leader(change.placement, change.members, change.migration, self._loads)
        return PlacementRestorer(
            self._inputs, change.placement, change.home, change.members, change.migration + 1, counts_LE,
            self._send, PlannerProcess,
        )  # fmt: skip

    def _rebalancing_leader(
        self,
        placement: Placement,
        members: Sequence[int],
        migration: int,
        loads: StepLoads,
    ) -> LeadingRank:
        self._planner = self._planner or PlannerProcess()
        inputs = cast("RebalanceInputs", self._inputs)  # there are loads of steps for it alone
        return LeadingRank(
            inputs, placement, members, migration, loads, self._send, self.mover.abort,
            self._planner, self._clock,
        )  # fmt: skip

    def stop(self) -> None:
        """Give up what is under way, before the engine stops."""
        self.mover.stop()

    def close(self) -> None:
        """End, after the engine."""
        self.mover.close()
        if self._leader is not None:
            self._leader.close()
        if self._planner is not None:
            self._planner.close()
