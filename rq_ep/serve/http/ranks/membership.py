"""The members of a group that shrinks and grows: what happens to each rank, and what is to be done about it.

Every change of the members has a number, the generation, and is under way until every member serves in it. A loss
begins a new generation at once, whatever is under way. Ranks join and leave only when no change is under way.
"""

import time
from collections.abc import Callable, Collection, Sequence

from rq_ep.serve.http.ranks.blame import FailureReport, blame
from rq_ep.serve.http.ranks.member_effects import (
    AskToLeave,
    CommandSupervisor,
    Effect,
    GenerationServes,
    GiveUp,
    RankLost,
    SendRegroup,
)
from rq_ep.serve.http.ranks.member_states import ABSENT, MemberState, RankRecords
from rq_ep.serve.http.ranks.rank_connections import DIED
from rq_ep.serve.http.ranks.recovery_times import RecoveryTimes
from rq_ep.serve.messages import KillRank, Regroup, StartRank, StopRank

UNREACHABLE_S = 5.0  # how long members may wait for one that does not answer, or for the news of its death
CROSSING_S = 2.0  # a report that comes this soon after a `Regroup` was sent before its rank had received that
MAX_RETRIES = 1  # how often the same members form the group anew when all say that they cannot reach another one
BY_REQUEST = "by request"


class ChangeRefused(ValueError):
    """A change of the members that was asked for and cannot be made."""


class Membership:
    """Turns what happens to ranks into effects, which the caller is to carry out in their order.

    Args:
        num_ranks: size of the group; ranks are never renumbered.
        clock: seconds.
        calendar: seconds since the epoch.
    """

    def __init__(
        self,
        num_ranks: int,
        clock: Callable[[], float] = time.monotonic,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self.generation = 0
        self.members: tuple[int, ...] = tuple(range(num_ranks))
        self.joining: frozenset[int] = frozenset()  # the members that this generation has taken in
        self.num_failures = 0
        self._may_grow = False  # before the group serves for the first time, and once it drains
        self.ranks = RankRecords(num_ranks, calendar)
        self._pending: set[int] = set()  # members that do not serve in the generation yet
        self._drained: set[int] = set()  # members that leave, and have no requests any more
        self._asked: AskToLeave | None = None  # the question that has no answer yet
        self._times = RecoveryTimes(clock)
        self._losses: list[str] = []
        self._unreachable: dict[int, tuple[float, str]] = {}  # rank -> when it reported another one, and its words
        self._num_retries = 0

    # What others ask

    @property
    def leader(self) -> int:
        """The lowest member that did not just join."""
        return min(rank for rank in self.members if rank not in self.joining)

    @property
    def open_ranks(self) -> list[int]:
        """The ranks that new requests may go to."""
        return [rank for rank in self.members if self.ranks[rank].state is MemberState.SERVING]

    @property
    def is_changing(self) -> bool:
        """Whether some member does not serve in the generation yet."""
        return bool(self._pending)

    def is_pending(self, rank: int) -> bool:
        """Whether a member does not serve in the generation yet."""
        return rank in self._pending

    @property
    def leaving(self) -> list[int]:
        """The members that leave once they have no requests."""
        return [rank for rank in self.members if self.ranks[rank].state is MemberState.LEAVING]

    @property
    def seconds_in_generation(self) -> float:
        """For how long the members have been these."""
        return self._times.seconds_in_generation

    @property
    def _without_experts(self) -> frozenset[int]:
        """The members that join, and hold no experts before they serve."""
        return self.joining & self._pending

    # What happens

    def start(self, members: Sequence[int] | None = None, generation: int = 0) -> None:
        """The group serves, for the first time.

        Args:
            members: those that it begins with; None: all ranks.
            generation: in which they serve.
        """
        self._may_grow = True
        self.members = self.members if members is None else tuple(members)
        for rank, record in enumerate(self.ranks):
            if rank in self.members:
                record.generation = generation
                self._set(rank, MemberState.SERVING)
            else:
                self._set(rank, MemberState.EXPECTED, "it has not come yet")
        self.generation = generation

    def drain(self) -> None:
        """The group drains: no rank joins any more."""
        self._may_grow = False

    def connected(self, rank: int) -> None:
        """A process of the rank has connected."""
        record = self.ranks[rank]
        if record.state in (MemberState.EXPECTED, MemberState.LOST, MemberState.RESTARTING):
            came_late = record.state is MemberState.EXPECTED
            self._set(rank, MemberState.LOADING, "it came late" if came_late else record.reason)

    def loaded(self, rank: int, store: tuple[str, int]) -> list[Effect]:
        """The rank has a model; if it is no member, it could join."""
        record = self.ranks[rank]
        record.store = store
        if rank not in self.members and record.state is MemberState.LOADING:
            self._set(rank, MemberState.JOINING, record.reason)
            return self._advance()
        return []

    def lost(self, rank: int, reason: str, detect_s: float = 0.0) -> list[Effect]:
        """The connection of the rank has ended without a good-bye, or what it sends makes no sense.

        Args:
            rank: of the group.
            reason: why, with the name of the rank.
            detect_s: for how long it had been silent already.
        """
        record = self.ranks[rank]
        if record.state in ABSENT:
            return []
        if record.has_supervisor and not record.is_stopping:
            record.num_ends_to_come += 1  # the supervisor will report the end of the process as well (`ended`)
        return self._end(rank, reason, detect_s)

    def left(self, rank: int) -> list[Effect]:
        """The connection of the rank has ended with a good-bye."""
        if self.ranks[rank].is_stopping:
            return self._end(rank, BY_REQUEST)
        return self.lost(rank, f"rank {rank} has left")

    def stalled(self, rank: int, reason: str, seconds: float) -> list[Effect]:
        """The rank makes no progress: its supervisor ends its process, and it counts as lost."""
        return [CommandSupervisor(rank, KillRank(reason)), *self.lost(rank, reason, seconds)]

    def unreachable(self, rank: int, text: str) -> None:
        """The rank cannot reach another member, and waits for what is to be done."""
        is_late = rank in self._pending and self.seconds_in_generation < CROSSING_S
        if rank in self.members and not is_late:
            self._unreachable.setdefault(rank, (self._clock(), text))

    def check(self) -> list[Effect]:
        """Act on members that have waited too long for another one; to be called now and then.

        Those that have not reported count as lost. If all have reported, they form the group anew, once.
        """
        if not self._unreachable or self._clock() - min(self._unreachable.values())[0] < UNREACHABLE_S:
            return []
        reports = [FailureReport(rank, f"rank {rank}: {text}", True) for rank, (_, text) in self._unreachable.items()]
        silent = [rank for rank in self.members if rank not in self._unreachable]
        reason = blame(self.members, reports).text
        if not self._unreachable.keys() <= self._without_experts:
            effects: list[Effect] = []
            for rank in silent:
                effects += self.stalled(rank, f"rank {rank} does not answer ({reports[0].text})", UNREACHABLE_S)
            if effects:
                return effects
            if self._num_retries < MAX_RETRIES:
                self._num_retries += 1
                self._begin_recovery(0.0)
                return self._new_generation(self.members, self._without_experts)
        return [GiveUp(reason)]

    def regrouped(self, rank: int, generation: int, seconds: dict[str, float]) -> list[Effect]:
        """The rank serves in a generation."""
        if generation != self.generation or rank not in self._pending:
            return []
        self._pending.discard(rank)
        self.ranks[rank].generation = generation
        if self.ranks[rank].state is MemberState.JOINING:
            self._set(rank, MemberState.SERVING)
        self._times.add(seconds)
        if self._pending:
            return []
        self._num_retries = 0
        self._losses.clear()
        return [GenerationServes(*self._times.end()), *self._advance()]

    def cannot_continue(self, generation: int, reason: str) -> list[Effect]:
        """The members of a generation cannot serve the model."""
        return [GiveUp(reason)] if generation == self.generation else []

    # What supervisors report

    def supervisor_connected(self, rank: int) -> None:
        self.ranks[rank].has_supervisor = True
        self.ranks[rank].num_ends_to_come = 0

    def supervisor_lost(self, rank: int) -> list[Effect]:
        """The supervisor of the rank has ended, and with it its process."""
        record = self.ranks[rank]
        record.has_supervisor, record.is_given_up = False, True
        reason = f"rank {rank}: its supervisor has ended"
        if record.state in (MemberState.RESTARTING, MemberState.REMOVED):
            self._set(rank, MemberState.LOST, reason)
        return self.lost(rank, reason)

    def ended(self, rank: int, status: str) -> list[Effect]:
        """The process of the rank has ended by itself. The end of its connection may come before this or after it."""
        record, reason = self.ranks[rank], f"rank {rank} {status}"
        is_known = record.num_ends_to_come > 0
        if is_known:
            record.num_ends_to_come -= 1
        if record.state is MemberState.LOST and record.reason.startswith(f"rank {rank} {DIED}"):
            record.reason = reason  # an error that the rank has named, or its stall, says more
        elif record.state is MemberState.RESTARTING and not is_known:
            self._set(rank, MemberState.LOST, reason)
        return [] if is_known or record.state in ABSENT else self._end(rank, reason)

    def started(self, rank: int, num_restarts: int) -> None:
        """The process of the rank was started again."""
        record = self.ranks[rank]
        record.num_restarts, record.num_ends_to_come, record.is_given_up = num_restarts, 0, False
        if record.state in (MemberState.EXPECTED, MemberState.LOST):
            self._set(rank, MemberState.RESTARTING, record.reason)

    def given_up(self, rank: int, reason: str) -> list[Effect]:
        """The process of the rank has ended, and is not started again."""
        record = self.ranks[rank]
        effects = [] if record.state in ABSENT else self._end(rank, f"rank {rank}: {reason}")
        record.is_given_up = True
        if record.state is not MemberState.REMOVED:
            self._set(rank, MemberState.LOST, f"rank {rank}: {reason}")
        return effects

    # What users ask for

    def staying(self, ranks: Collection[int]) -> list[int]:
        """The members without these ranks, those that leave already, and those that hold no experts yet."""
        return sorted(set(self.members) - set(ranks) - set(self.leaving) - self._without_experts)

    def check_removal(self, ranks: Collection[int]) -> None:
        """Check whether ranks may be asked to leave.

        Raises:
            ChangeRefused: they may not.
        """
        for rank in sorted(set(ranks)):
            record = self.ranks[rank]
            if record.state in (MemberState.LEAVING, MemberState.REMOVED):
                raise ChangeRefused(f"rank {rank} is {record.state.value} already")
            if rank in self._without_experts:
                raise ChangeRefused(f"rank {rank} is joining: try again once it serves")
            if not record.has_supervisor and record.state is not MemberState.SERVING:
                raise ChangeRefused(f"rank {rank} has no process: {record.reason}")
        if not set(self.open_ranks) - set(ranks):
            raise ChangeRefused("at least one rank has to stay: end the server by SIGTERM instead")

    def remove(self, ranks: Collection[int]) -> list[Effect]:
        """Have ranks leave: the members among them once they have no requests (`drained`), the others at once.

        Raises:
            ChangeRefused: nothing is changed.
        """
        self.check_removal(ranks)
        effects: list[Effect] = []
        for rank in sorted(set(ranks)):
            if rank in self.members:
                self._set(rank, MemberState.LEAVING, BY_REQUEST)
            else:
                effects.append(self._stop(rank))
        return effects

    def drained(self, rank: int) -> list[Effect]:
        """A member that leaves has no requests any more."""
        if rank in self.leaving:
            self._drained.add(rank)
        return self._advance()

    def may_leave(self, asked: AskToLeave, refusal: str | None) -> list[Effect]:
        """Whether members may go, or why they have to stay."""
        self._asked = None
        going = [rank for rank in asked.ranks if rank in self.leaving]
        if asked.generation != self.generation or not going:  # other members would be left now
            return self._advance()
        if refusal is not None:
            for rank in going:
                self._stay(rank, f"it stays: {refusal}")
            return self._advance()
        self._times.begin_change()
        members = sorted(set(self.members) - set(going))
        return [*self._new_generation(members, ()), *map(self._stop, going)]

    def add(self, ranks: Collection[int]) -> list[Effect]:
        """Have ranks come back that were removed, or were given up, and those stay that have not left yet.

        Raises:
            ChangeRefused: nothing is changed.
        """
        for rank in sorted(set(ranks)):
            record = self.ranks[rank]
            may_start = record.state is MemberState.REMOVED or record.is_given_up
            if may_start and not record.has_supervisor:
                raise ChangeRefused(f"the launcher has no process for rank {rank}: {record.reason or 'it has ended'}")
            if not may_start and (record.state is not MemberState.LEAVING or record.is_stopping):
                raise ChangeRefused(f"rank {rank} is {record.state.value}: there is nothing to add")
        effects: list[Effect] = []
        for rank in sorted(set(ranks)):
            record = self.ranks[rank]
            if record.state is MemberState.LEAVING:
                self._stay(rank)
            else:
                record.is_given_up = False
                self._set(rank, MemberState.RESTARTING, "added " + BY_REQUEST)
                effects.append(CommandSupervisor(rank, StartRank()))
        return effects

    # The generations

    def _end(self, rank: int, reason: str, detect_s: float = 0.0) -> list[Effect]:
        """A rank has no process any more."""
        record = self.ranks[rank]
        was_member, was_serving = rank in self.members, rank not in self._pending
        effects: list[Effect] = []
        if record.state is MemberState.LEAVING:
            if not record.is_stopping:
                effects.append(self._stop(rank))
            record.is_stopping = False
            self._set(rank, MemberState.REMOVED, reason)
        else:
            self._set(rank, MemberState.LOST, reason)
        record.store = None
        if not was_member:
            return [RankLost(rank, reason, False, False), *effects]
        record.num_failures += 1
        self.num_failures += 1
        self._losses.append(reason)
        self._begin_recovery(detect_s)
        left = [other for other in self.members if other != rank]
        joining = self._without_experts - {rank}
        if not set(left) - joining:
            return [GiveUp(f"no rank is left that holds the model: {'; '.join(self._losses)}")]
        if not any(self.ranks[other].state is MemberState.SERVING for other in left):
            for other in set(left) - joining:
                self._stay(other)
        # The members are told first: they wait for the one that is lost.
        return [*self._new_generation(left, joining), RankLost(rank, reason, True, was_serving), *effects]

    def _begin_recovery(self, detect_s: float) -> None:
        """Note when the first sign of a loss came."""
        first_s = min((at_s for at_s, _ in self._unreachable.values()), default=self._clock())
        self._times.begin_recovery(max(detect_s, self._clock() - first_s))

    def _advance(self) -> list[Effect]:
        """Let ranks join, or ask whether some may leave, if nothing is under way."""
        if self._pending:
            return []
        coming = set(self.ranks.in_state(MemberState.JOINING)) - set(self.members)
        if coming and self._may_grow:
            self._times.begin_change()
            return self._new_generation(sorted({*self.members, *coming}), coming)
        going = tuple(rank for rank in self.leaving if rank in self._drained)
        asked = AskToLeave(going, self.generation)
        if not going or asked == self._asked:
            return []
        self._asked = asked
        return [asked]

    def _new_generation(self, members: Sequence[int], joining: Collection[int]) -> list[Effect]:
        self.generation += 1
        self.members, self.joining = tuple(members), frozenset(joining)
        self._pending = set(members)
        self._drained &= self._pending
        self._times.begin_generation()
        self._unreachable.clear()
        store = self.ranks[self.leader].store
        if store is None:
            return [GiveUp(f"rank {self.leader} has no store in which the members could meet")]
        return [SendRegroup(Regroup(self.generation, list(self.members), store, sorted(self.joining)))]

    def _stop(self, rank: int) -> CommandSupervisor:
        """Have the process of a rank end that is no member any more."""
        record = self.ranks[rank]
        record.is_stopping = record.state not in ABSENT
        self._set(rank, MemberState.LEAVING if record.is_stopping else MemberState.REMOVED, BY_REQUEST)
        return CommandSupervisor(rank, StopRank())

    def _stay(self, rank: int, reason: str = "") -> None:
        """Call off the leave of a member."""
        self._drained.discard(rank)
        self._set(rank, MemberState.SERVING, reason)

    def _set(self, rank: int, state: MemberState, reason: str = "") -> None:
        self.ranks.set(rank, state, reason, self.generation)
