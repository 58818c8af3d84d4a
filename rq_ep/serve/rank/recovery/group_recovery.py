"""Recovery of one rank: it goes on with the ranks that are left, or joins those that serve.

It runs on the engine's thread, between two steps or in place of one that was cut off, and on all members together:

1. The HTTP process says who the members are (`Regroup`). A rank that loses another one asks for that.
2. They form the group anew. A newer `Regroup` starts over, at any point.
3. They agree on what each of them holds: a round of a migration that some have committed is committed by all, and the
   rest of it is given up.
4. The leader, the lowest of those that have served before, decides where the experts are to be.
5. The experts move, while no steps are made, until every one has a replica again.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.engine.step_loop import GroupNumbers
from rq_ep.model.load.memory import free_bytes
from rq_ep.moe import EPExperts
from rq_ep.moe.migration.expert_mover import Migration, MigrationEnd, MoverFlags
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.ep_group import PeerLost
from rq_ep.serve.messages import (
    CannotContinue,
    CheckMembers,
    FromRank,
    MembersChecked,
    PeerUnreachable,
    Regroup,
    Regrouped,
)
from rq_ep.serve.rank.loads.load_recorders import LoadRecorders
from rq_ep.serve.rank.rebalance.live_rebalancing import GroupChange, LiveRebalancing
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.recovery.recovery_plan import RecoveryPlan, RecoveryPlanner
from rq_ep.serve.rank.trace_recording import TraceRecording

END_TIMEOUT_S = 10.0  # for the HTTP process to end this rank, once it knows that the group cannot go on


@dataclass(frozen=True)
class MemberSummary:
    """What a member tells the others first."""

    committed: tuple[int, int]  # the migration of the last round that serves on it, and its rounds that do
    migration: int  # the highest number of one that it has heard of
    mark: int
    num_announced: int
    free_bytes: int | None  # memory of its device; None: not known


class GroupRecovery:
    """One rank's part in changes of its group.

    Args:
        group: its ranks.
        layers: of the model, in the order of its placement.
        home: the placement that serves with all ranks; on a rank that joins, as it supposes.
        moves: carries experts from rank to rank.
        inputs: what that needs.
        loads: the recorders of the layers: a leader has other ones than those who follow.
        recording: the recording of the routing, which a change of the members ends.
        send: sends a message to the HTTP process.
        timeout_s: for the HTTP process to say who the members are.
    """

    def __init__(
        self,
        group: TorchGroup,
        layers: Sequence[EPExperts],
        home: Placement,
        moves: LiveRebalancing,
        inputs: MoveInputs,
        loads: LoadRecorders,
        recording: TraceRecording,
        send: Callable[[FromRank], None],
        timeout_s: float,
    ) -> None:
        self._group = group
        self._layers = layers
        self._home = home
        self._moves = moves
        self._loads = loads
        self._recording = recording
        self._planner = RecoveryPlanner(group, layers, inputs, loads)
        self._send = send
        self._timeout_s = timeout_s
        self._changed = threading.Condition()  # guards what follows
        self._newest: Regroup | None = None
        self._members = set(group.members)  # those that were announced last
        self._is_stopping = False

    # On the thread of the connection

    def announce(self, message: Regroup) -> None:
        """Take what the HTTP process says of the members; what is under way ends where one of them is gone."""
        with self._changed:
            self._newest = message
            has_lost = not self._members <= set(message.members)
            self._members = set(message.members)
            self._changed.notify_all()
        if has_lost:
            self._group.abort(below=message.generation)

    def stop(self) -> None:
        """Wait for no `Regroup` any more: the server stops."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    # On a thread of its own

    def check(self, message: CheckMembers) -> None:
        """Say whether these ranks alone could hold the model: by the plan that they would make if the others left."""
        refusal = self._planner.refusal(self._home, message.members, message.free_bytes)
        self._send(MembersChecked(message.number, refusal))

    # On the engine's thread

    def __call__(self, error: BaseException | None, numbers: GroupNumbers) -> GroupNumbers:
        """Return when this rank may make steps again.

        Args:
            error: that has cut a step off; None: the group changes between two steps.
            numbers: of this rank.

        Raises:
            PeerLost: no new members were announced.
            UserError: the members cannot hold the model.
        """
        if error is not None:
            for layer in self._layers:
                layer.discard_step()
        self._loads.end_generation(is_cut_off=error is not None)
        tried = numbers.generation
        with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the step
            while True:
                message = self._await_newer(tried, error)
                tried = message.generation
                try:
                    return self._regroup(message, numbers)
                except PeerLost as lost:
                    error = lost

    def _await_newer(self, generation: int, error: BaseException | None) -> Regroup:
        """The newest members, of a later generation than this one."""

        def is_known() -> bool:
            return self._newest is not None and self._newest.generation > generation

        with self._changed:
            if not is_known():
                assert error is not None
                self._send(PeerUnreachable(str(error)))
                self._changed.wait_for(lambda: is_known() or self._is_stopping, timeout=self._timeout_s)
            if is_known():
                assert self._newest is not None
                return self._newest
        assert error is not None
        raise PeerLost(str(error)) from error

    def _regroup(self, message: Regroup, numbers: GroupNumbers) -> GroupNumbers:
        group, mover = self._group, self._moves.mover
        generation, start_s = message.generation, time.perf_counter()
        leader = min(set(message.members) - set(message.joining))
        group.abort(below=generation)  # also the messages of a migration
        mover.suspend()
        group.reform(generation, message.members, message.store, lambda: self._newest is not message)
        formed_s = time.perf_counter()

        own = MemberSummary(
            mover.committed, mover.newest, numbers.mark, numbers.num_announced, free_bytes(group.device)
        )
        states = [state for state in group.all_gather_object(own) if state is not None]
        migration = max(state.migration for state in states) + 1  # those that only the last leader knew never begin
        mover.resume(max(state.committed for state in states), migration)
        plan = self._shared_plan(leader, [state.free_bytes for state in states])
        self._home = plan.home
        for layer, placed in zip(self._layers, plan.current.layers, strict=True):
            layer.replace_placement(placed, self._moves.planner_of(placed))
            layer.join()
        if plan.rounds:
            self._carry_out(Migration(migration + 1, plan.goal, plan.rounds))
        served_s = time.perf_counter()

        self._send(Regrouped(generation, {"re-form": formed_s - start_s, "re-home": served_s - formed_s}))
        mark = max(state.mark for state in states)
        change = GroupChange(group.members, leader, plan.goal, plan.home, migration + 1)
        self._take_part(change, mark)
        has_joined = group.rank in message.joining
        num_announced = max(state.num_announced for state in states) if has_joined else numbers.num_announced
        return GroupNumbers(generation, mark, num_announced)

    def _take_part(self, change: GroupChange, mark: int) -> None:
        """Lead the group from now on, or follow; `mark`: the last one that any rank was given."""
        leads = change.leader == self._group.rank
        for layer in self._layers:
            layer.record_with(self._loads.recorder(leads))
        self._moves.regroup(change, self._loads.recent_pairs_LE(len(self._layers)))
        self._recording.regroup(mark, leads)

    def _shared_plan(self, leader: int, free_M: Sequence[int | None]) -> RecoveryPlan:
        """The leader's plan.

        Raises:
            UserError: the members cannot hold the model.
        """
        own: RecoveryPlan | str | None = None
        if self._group.rank == leader:
            try:
                own = self._planner.plan(self._home, free_M)
            except UserError as error:
                own = str(error)
        shared: RecoveryPlan | str = self._group.all_gather_object(own)[leader]
        if isinstance(shared, str):
            self._cannot_continue(shared)
        return shared

    def _carry_out(self, migration: Migration) -> None:
        """Have the experts move, until every one has a replica.

        Raises:
            UserError: one cannot be had any more.
        """
        end, reason = self._moves.mover.carry_out(migration, self._gather)
        if end is MigrationEnd.ABORTED:
            reasons = [text for text in self._group.all_gather_object(reason) if text]
            self._cannot_continue("; ".join(reasons))

    def _gather(self, flags: MoverFlags) -> list[MoverFlags]:
        rows: list[list[Any]] = self._group.gather_ints(flags, "agreement on moves")
        return [MoverFlags(*row) for row in rows]

    def _cannot_continue(self, reason: str) -> NoReturn:
        """Have the HTTP process end the group, this rank too."""
        self._send(CannotContinue(self._group.generation, reason))
        time.sleep(END_TIMEOUT_S)
        raise UserError(reason)
