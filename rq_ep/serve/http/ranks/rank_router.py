"""The group as the HTTP process sees it: requests go to its ranks, tokens come back, and each message where it belongs.

What is done about a rank that dies, leaves or comes back is decided by `Membership` and carried out by `MemberChanges`;
how the group as a whole begins and ends is the matter of `GroupLife`.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from typing import assert_never

from rq_ep.engine.progress import Progress
from rq_ep.engine.requests import Output, Request
from rq_ep.serve.frames import Role
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks.blame import FailureReport
from rq_ep.serve.http.ranks.group_life import GroupLife, GroupState
from rq_ep.serve.http.ranks.group_observer import GroupObserver
from rq_ep.serve.http.ranks.member_changes import MemberChanges
from rq_ep.serve.http.ranks.membership import Membership
from rq_ep.serve.http.ranks.rank_connections import RankConnections
from rq_ep.serve.http.ranks.request_sender import RequestSender
from rq_ep.serve.http.ranks.routed_requests import RoutedRequest, RoutedRequests
from rq_ep.serve.http.ranks.watchdog import TICK_S, Watchdog
from rq_ep.serve.messages import (
    Aborted,
    Bye,
    CannotContinue,
    Checked,
    DrainRequest,
    Failed,
    FromRank,
    FromSupervisor,
    ImportanceReport,
    Loaded,
    Mark,
    MembersChecked,
    MigrationGivenUp,
    MigrationPlanned,
    Outputs,
    PeerUnreachable,
    PlacementServed,
    RankEnded,
    RankGivenUp,
    RankStarted,
    RankStats,
    Ready,
    RebalanceAnswer,
    RebalanceCommand,
    RebalanceStatus,
    Recorded,
    RecordingFailed,
    Regrouped,
    RoundServed,
)
from rq_ep.serve.process import BackgroundTasks

log = logging.getLogger("rq_ep.serve")


class RankRouter:
    """Routes requests to the ranks and brings their tokens back; listens to the connections of the ranks.

    Args:
        num_ranks: size of the group.
        token: the secret of this run, which the ranks prove that they know.
        observer: receives what the ranks report.
        max_queue_size: requests that may be unfinished at once.
        stall_s: seconds after which a rank that is silent, or makes no progress, counts as lost.
        survives: the group goes on without a rank that is lost while it serves; else it fails.
    """

    def __init__(
        self,
        num_ranks: int,
        token: str,
        observer: GroupObserver,
        *,
        max_queue_size: int,
        stall_s: float,
        survives: bool = False,
    ) -> None:
        self._observer = observer
        self._watchdog = Watchdog(stall_s)
        self.survives = survives
        self.tasks = BackgroundTasks(self.on_bug)
        self.membership = Membership(num_ranks)
        self._connections = RankConnections(num_ranks, token, self)
        self._requests = RoutedRequests(max_queue_size, self._on_cancel, self._on_resumed)
        self._sender = RequestSender(self._connections, self.membership, self._requests)
        self._life = GroupLife(
            num_ranks, self._connections, self.membership, self._requests, self.tasks, self._on_end
        )  # fmt: skip
        self._changes = MemberChanges(
            self.membership, self._connections, self._requests, self._sender, self._watchdog, observer, self.tasks,
            is_serving=lambda: self._life.is_serving,
            give_up=lambda reason: self._life.report(FailureReport(None, reason)),
        )  # fmt: skip

    async def listen(self, sock: socket.socket) -> asyncio.Server:
        """Accept the ranks' connections on a bound socket."""
        return await self._connections.listen(sock)

    # For the routes

    @property
    def state(self) -> GroupState:
        return self._life.state

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    @property
    def num_connected(self) -> int:
        """Ranks whose connection is open."""
        return self._connections.num_open(Role.RANK)

    def num_unfinished_on(self, rank: int) -> int:
        return len(self._requests.on_rank(rank))

    def why_unavailable(self) -> str | None:
        """Why no request can be taken now; None if one can."""
        return self._life.why_unavailable()

    async def generate(self, request: Request, beside: str | None = None) -> AsyncIterator[Output]:
        """Send a request to the least loaded rank, and yield its outputs until it ends; leaving early cancels it.

        Args:
            request: to be answered.
            beside: an unfinished request with the same prompt, which its rank has in its cache.

        Raises:
            ApiError: the server is not taking requests, or the group failed.
        """
        if (reason := self.why_unavailable()) is not None:
            raise ApiError(503, f"not serving: {reason}")
        routed = self._requests.add(request, self.membership.open_ranks, beside)
        try:
            await self._sender.announce(routed)
            while True:
                output = await routed.next_output()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._requests.cancel(routed)

    def mark(self, number: int) -> None:
        """Have every rank receive a number between the same two steps, asleep or not."""
        self._connections.send(self.membership.leader, Mark(number))
        self._sender.wake()

    def rebalance(self, command: RebalanceCommand) -> int:
        """Pass a command on to the leader; which that is."""
        leader = self.membership.leader
        self._connections.send(leader, command)
        return leader

    async def remove_ranks(self, ranks: Collection[int], *, moves: bool) -> None:
        """Have ranks leave once their requests have finished or, with `moves`, have gone to other ranks.

        Raises:
            ChangeRefused: nothing is changed; the others cannot hold the model, for example.
        """
        await self._changes.remove(ranks, moves=moves)

    def add_ranks(self, ranks: Collection[int]) -> None:
        """Have ranks come back.

        Raises:
            ChangeRefused: nothing is changed.
        """
        self._changes.add(ranks)

    # As the listener of the connections

    def on_connect(self, rank: int, role: Role) -> None:
        if self._life.welcome(rank, role):
            (self.membership.connected if role is Role.RANK else self.membership.supervisor_connected)(rank)

    def on_message(self, rank: int, message: FromRank) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    self._requests.deliver(output)
            case RankStats():
                if rank in self.membership.members:
                    self._watchdog.report(rank, self._progress(rank, message))
                    self._changes.checks.note_free(rank, message.free_bytes)
                    self._observer.on_stats(rank, message)
            case Recorded() | RecordingFailed():
                self._observer.on_recorded(message)
            case MigrationPlanned():
                self._observer.on_placement(message)
                self._changes.planned(rank, message)
            case ImportanceReport() | MigrationGivenUp():
                self._connections.send(self.membership.leader, message)
            case RebalanceStatus() | RebalanceAnswer():
                self._observer.on_rebalance(message)
            case RoundServed() | PlacementServed():
                self._observer.on_placement(message)
            case Checked():
                self._observer.on_checked(message)
            case Ready():
                self._life.begin(message.members, message.generation)
                self._watchdog.watch(self.membership.members)
                self._observer.on_ready(message)
            case Loaded():
                self._changes.checks.note_free(rank, message.free_bytes)
                self._changes.carry_out(self.membership.loaded(rank, message.store))
            case PeerUnreachable():
                if self._goes_on:
                    self.membership.unreachable(rank, message.text)
                else:
                    self._life.report(FailureReport(rank, f"rank {rank}: {message.text}", is_consequence=True))
            case Regrouped():
                self._changes.regrouped(rank, message)
            case CannotContinue():
                self._changes.carry_out(self.membership.cannot_continue(message.generation, message.reason))
            case MembersChecked():
                self._changes.checks.take(message)
            case DrainRequest():
                self._life.start_draining(message.timeout_s)
            case Failed():
                if self._goes_on:
                    self._connections.mute(rank)  # it ends by itself, and names its error
                self._lose(rank, f"rank {rank}: {message.text}", message.is_consequence)
            case Aborted():
                self._life.report_shutdown(rank, message)
            case Bye():
                self._watchdog.forget(rank)
            case _:
                assert_never(message)

    def on_supervisor_message(self, rank: int, message: FromSupervisor) -> None:
        match message:
            case RankEnded():
                if self._goes_on:
                    self._changes.carry_out(self.membership.ended(rank, message.status))
                elif self.state is GroupState.LOADING:
                    self._life.report(FailureReport(rank, f"rank {rank} {message.status}"))
            case RankStarted():
                log.info("rank %d is started again (%d)", rank, message.num_restarts)
                self.membership.started(rank, message.num_restarts)
            case RankGivenUp():
                if self._goes_on:
                    log.warning("rank %d is not started again: %s", rank, message.reason)
                    self._changes.carry_out(self.membership.given_up(rank, message.reason))
            case DrainRequest():
                self._life.start_draining(message.timeout_s)
            case Aborted():
                self._life.report_shutdown(rank, message)
            case Bye():
                pass
            case _:
                assert_never(message)

    def on_leave(self, rank: int, role: Role) -> None:
        if self._goes_on:
            left = self.membership.left if role is Role.RANK else self.membership.supervisor_lost
            self._changes.carry_out(left(rank))
        self._life.end_if_all_have_left()

    def on_loss(self, rank: int, text: str) -> None:
        self._lose(rank, text)
        self._life.end_if_all_have_left()

    def on_supervisor_loss(self, rank: int, text: str) -> None:
        if self._goes_on:
            self._changes.carry_out(self.membership.supervisor_lost(rank))
        elif self.state is GroupState.LOADING:
            self._life.report(FailureReport(rank, text))
        self._life.end_if_all_have_left()

    def on_bug(self, error: BaseException) -> None:
        """End the group for an error of this process: it must not go on half."""
        log.error("an error of the HTTP process", exc_info=error)
        self._life.report(FailureReport(None, f"the HTTP process: {type(error).__name__}: {error}"))

    # What follows from what was heard

    @property
    def _goes_on(self) -> bool:
        """Whether the group goes on without a rank that is lost now."""
        return self.survives and self._life.is_serving

    def _lose(self, rank: int, text: str, is_consequence: bool = False) -> None:
        if self._goes_on:
            self._changes.carry_out(self.membership.lost(rank, text))
        elif self.state is not GroupState.STOPPING or rank in self.membership.members:
            self._life.report(FailureReport(rank, text, is_consequence))

    def _progress(self, rank: int, stats: RankStats) -> Progress:
        """The progress of a rank; while a change of the members is under way, since the change began."""
        if not self.membership.is_pending(rank):
            return stats.progress
        return replace(stats.progress, stuck_s=min(stats.progress.stuck_s, self.membership.seconds_in_generation))

    async def watch(self) -> None:
        """Look now and then whether a rank is silent, makes no progress, or has no requests left and may leave."""
        while not self._life.is_over:
            await asyncio.sleep(TICK_S)
            if (stall := self._watchdog.check()) is not None:
                if self._goes_on:
                    self._changes.carry_out(self.membership.stalled(*stall))
                else:
                    self._life.report(FailureReport(None, stall.text))
            if self._goes_on:
                self._changes.check()

    # As the owner of the requests, and of the life of the group

    def _on_cancel(self, routed: RoutedRequest) -> None:
        self._sender.cancel(routed)

    def _on_resumed(self, routed: RoutedRequest) -> None:
        self._changes.resumed(routed)

    def _on_end(self) -> None:
        self._changes.checks.end("the server ends")
        self._observer.on_end()
