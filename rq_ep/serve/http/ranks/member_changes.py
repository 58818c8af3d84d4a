"""Changes of the members, carried out as `Membership` decides; the requests of a rank that is lost go to others."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import assert_never

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks.group_observer import GroupObserver
from rq_ep.serve.http.ranks.member_effects import (
    AskToLeave,
    CommandSupervisor,
    Effect,
    GenerationServes,
    GiveUp,
    RankLost,
    SendRegroup,
)
from rq_ep.serve.http.ranks.membership import ChangeRefused, Membership
from rq_ep.serve.http.ranks.rank_connections import RankConnections
from rq_ep.serve.http.ranks.removal_checks import RemovalChecks
from rq_ep.serve.http.ranks.request_sender import RequestSender
from rq_ep.serve.http.ranks.routed_requests import RoutedRequest, RoutedRequests
from rq_ep.serve.http.ranks.watchdog import Watchdog
from rq_ep.serve.messages import BeginMigration, MigrationPlanned, Regroup, Regrouped
from rq_ep.serve.process import BackgroundTasks

log = logging.getLogger("rq_ep.serve")


class MemberChanges:
    """Has ranks leave, come back and go on without others.

    Args:
        membership: decides.
        connections: to the ranks and their supervisors.
        requests: those that have not ended.
        sender: hands them over to other ranks.
        watchdog: watches the members.
        observer: is told of losses and recoveries.
        tasks: run what takes time.
        is_serving: whether requests are answered.
        give_up: ends the group for a reason.
    """

    def __init__(
        self,
        membership: Membership,
        connections: RankConnections,
        requests: RoutedRequests,
        sender: RequestSender,
        watchdog: Watchdog,
        observer: GroupObserver,
        tasks: BackgroundTasks,
        is_serving: Callable[[], bool],
        give_up: Callable[[str], None],
    ) -> None:
        self._membership = membership
        self._connections = connections
        self._requests = requests
        self._sender = sender
        self._watchdog = watchdog
        self._observer = observer
        self._tasks = tasks
        self._is_serving = is_serving
        self._give_up = give_up
        self.checks = RemovalChecks(membership, connections)
        self._served_s: dict[int, float] = {}  # since when each rank serves in its generation
        self._held: list[MigrationPlanned] = []  # until all members serve in the generation

    # What users ask for

    async def remove(self, ranks: Collection[int], *, moves: bool) -> None:
        """Have ranks leave once their requests have finished or, with `moves`, have gone to other ranks.

        Raises:
            ChangeRefused: nothing is changed; the others cannot hold the model, for example.
        """
        self._membership.check_removal(ranks)
        if not set(ranks).isdisjoint(self._membership.members):
            refusal = await self.checks.refusal(ranks)
            if refusal is not None:
                raise ChangeRefused(refusal)
        self.carry_out(self._membership.remove(ranks))
        for rank in self._membership.leaving:
            if moves and rank in ranks:
                for routed in self._requests.on_rank(rank):
                    self._sender.cancel(routed)
                    self._move(routed)
            self._note_drained(rank)

    def add(self, ranks: Collection[int]) -> None:
        """Have ranks come back.

        Raises:
            ChangeRefused: nothing is changed.
        """
        self.carry_out(self._membership.add(ranks))

    # What happens

    def regrouped(self, rank: int, message: Regrouped) -> None:
        """A rank serves in a generation."""
        self._served_s[rank] = time.monotonic()
        self.carry_out(self._membership.regrouped(rank, message.generation, message.seconds))

    def planned(self, rank: int, message: MigrationPlanned) -> None:
        """A rank has planned a migration, which begins once all members serve: until then they were told to stop."""
        if rank == self._membership.leader and not self._membership.is_pending(rank):  # else it is outdated
            self._held.append(message)
            self._begin_migrations()

    def resumed(self, routed: RoutedRequest) -> None:
        """A request has got its first output on another rank."""
        start_s = max(routed.resumed_s, self._served_s.get(routed.rank, 0.0))
        self._observer.on_recovery({"re-prefill": time.monotonic() - start_s})

    def check(self) -> None:
        """See who waits for whom, and who has no requests left and may leave; to be called now and then."""
        self.carry_out(self._membership.check())
        for rank in self._membership.leaving:
            self._note_drained(rank)

    def _note_drained(self, rank: int) -> None:
        if not self._requests.on_rank(rank):
            self.carry_out(self._membership.drained(rank))

    # What is to be done

    def carry_out(self, effects: Sequence[Effect]) -> None:
        """Do what a change of the members asks for."""
        for effect in effects:
            match effect:
                case SendRegroup():
                    self._regroup(effect.message)
                case CommandSupervisor():
                    self._connections.send_supervisor(effect.rank, effect.message)
                case RankLost():
                    self._cut_off(effect)
                case GenerationServes():
                    times = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in effect.seconds.items())
                    log.info("the members serve in generation %d: %s", self._membership.generation, times)
                    if effect.is_recovery:
                        self._observer.on_recovery(effect.seconds)
                    self._begin_migrations()
                case AskToLeave():
                    self._tasks.start(self._ask_to_leave(effect))
                case GiveUp():
                    self._give_up(effect.reason)
                case _:
                    assert_never(effect)

    def _regroup(self, message: Regroup) -> None:
        log.info("generation %d has the ranks %s", message.generation, message.members)
        self._held.clear()
        self._watchdog.watch(message.members)
        self._connections.send_all(message, message.members)
        self._sender.wake()
        self.checks.ask_again()

    async def _ask_to_leave(self, asked: AskToLeave) -> None:
        """Have ranks leave whose requests have ended, unless the others cannot hold the model any more."""
        refusal = await self.checks.refusal(asked.ranks)
        if refusal is not None:
            log.warning("%s do not leave: %s", ", ".join(f"rank {rank}" for rank in asked.ranks), refusal)
        if self._is_serving():
            self.carry_out(self._membership.may_leave(asked, refusal))

    def _cut_off(self, lost: RankLost) -> None:
        """Hear no more of a rank, and have its requests go on on other ranks."""
        if lost.was_member:
            log.warning("%s: the group goes on without it", lost.reason)
        self._connections.drop(lost.rank)
        self._watchdog.forget(lost.rank)
        self._observer.on_rank_lost(lost.rank, lost.was_member)
        for routed in self._requests.on_rank(lost.rank):
            if self._requests.is_poison(routed, lost.was_serving):
                first, second = routed.lost_ranks[-2:]
                text = f"this request was on rank {first} and on rank {second} when they died: it is not tried again"
                self._requests.fail(routed, ApiError(500, text))
            else:
                self._move(routed)

    def _move(self, routed: RoutedRequest) -> None:
        self._requests.move(routed, self._membership.open_ranks)
        self._observer.on_resumption()
        self._tasks.start(self._sender.announce(routed))

    def _begin_migrations(self) -> None:
        """Have every rank begin the migrations that were planned."""
        if self._membership.is_changing:
            return
        if self._is_serving():
            for planned in self._held:
                begin = BeginMigration(planned.generation, planned.placement, planned.rounds)
                self._connections.send_all(begin, self._membership.members)
        self._held.clear()
