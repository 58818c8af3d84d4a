"""Moving experts between ranks beside the steps of a group that serves: staged, verified, and committed together.

A round's experts arrive on a thread, in buffers that do not serve yet. Each rank announces in the agreement that starts
every step how far it has come. When all have staged a round, all let it serve between the same two steps, and the next
round begins. If any rank fails, all give the migration up between the same two steps: the round that was committed last
serves on every rank.

Connections may be what has failed. So after a migration that was given up, the next one begins with new ones.

When the group changes its members, nothing is moved from `suspend` on, and `resume` gives up whatever is under way. A
rank that has not heard of the last agreement then commits the round that others have committed: all had staged it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.strategy import Planner
from rq_ep.moe.migration.expert_transfers import MAX_PIECE_BYTES, carry
from rq_ep.moe.migration.round_staging import Arrivals, MovableLayer, ReadExpert, RoundStaging, Transfers
from rq_ep.parallel.ep_group import HostChannel, MessagesLost
from rq_ep.rebalancing.pace import Pace
from rq_ep.solver.migration.move_rounds import MoveRound

ROUNDS_PER_GENERATION = 1 << 20


@dataclass(frozen=True)
class Migration:
    """The way to a placement, under a number that is higher than that of any before."""

    generation: int
    placement: Placement
    rounds: tuple[MoveRound, ...]


class MigrationEnd(Enum):
    """How a migration has ended, on all ranks alike."""

    COMMITTED = auto()  # all rounds serve
    ABORTED = auto()  # some may serve; the others were given up


class MoverFlags(NamedTuple):
    """What a rank announces before a step."""

    staged: int  # generation * ROUNDS_PER_GENERATION + rounds that are staged here; the least of all ranks counts
    failed: int  # the last generation that this rank gives up; the highest of all ranks counts


NO_MIGRATION = MoverFlags(0, 0)


class _Progress:
    """A migration under way on this rank."""

    def __init__(self, migration: Migration) -> None:
        self.migration = migration
        self.num_committed = 0  # rounds
        self.num_staged = 0  # rounds that this rank is done with, well or not
        self.has_ended = False
        self.is_dropped = False  # no other rank waits for its messages
        self.layers: dict[int, tuple[LayerPlacement, Planner]] = {}  # that the round staged last changes, by position


class ExpertMover:
    """One rank's part in the migrations of its group.

    Args:
        layers, read_expert, reads_formats: as for `RoundStaging`.
        channel: to the other ranks, for this alone.
        planner_of: the strategy's planner for a layer.
        pace: how fast experts move while there are steps.
        wake: called on any thread when the ranks are to agree on a step soon, though nobody may have tokens.
        on_round: called on the engine's thread when a round serves, with the positions of its layers.
        on_end: called on the engine's thread when a migration has ended, with its generation and why this rank gave it
            up, if it did.
    """

    def __init__(
        self,
        layers: Sequence[MovableLayer],
        channel: HostChannel,
        planner_of: Callable[[LayerPlacement], Planner],
        read_expert: ReadExpert | None,
        *,
        reads_formats: bool = False,
        pace: Pace,
        wake: Callable[[], None] = lambda: None,
        on_round: Callable[[Sequence[int]], None] = lambda positions: None,
        on_end: Callable[[int, MigrationEnd, str], None] = lambda generation, end, reason: None,
    ) -> None:
        self._layers = layers
        self._channel = channel
        self._planner_of = planner_of
        self._pace = pace
        max_piece_bytes = pace.bytes_per_step or MAX_PIECE_BYTES
        self._staging = RoundStaging(
            layers, channel.rank, read_expert, reads_formats, max_piece_bytes, self._note_activity
        )
        self._wake = wake
        self._on_round = on_round
        self._on_end = on_end
        self._changed = threading.Condition()  # guards what follows
        self._current: _Progress | None = None
        self._begun: deque[_Progress] = deque()  # also those that have ended: other ranks wait for their messages
        self._flags = NO_MIGRATION
        self._num_steps = 0
        self._is_idle = True  # no rank has tokens in the step under way
        self._is_staging = False
        self._is_suspended = False
        self._reconnects = False  # before the next migration: the one before was given up
        self.committed = (0, 0)  # the migration of the last round that serves, and its rounds that do
        self._rested = (0.0, 0.0)  # when the thread last did, and the CPU time that it had taken
        self._given_up = (0, "")  # the last generation that this rank gave up before it knew of others, and why
        self._closes = False
        # For whoever looks for a rank that is stuck; any thread may read them.
        self.num_pieces = 0  # of experts that this rank has sent and received
        self.activity = ""  # of the thread, such as "verifies expert 3 of layer 5"; empty: nothing is to be done now
        self.is_exchanging = False  # it waits for other ranks' messages
        self._thread = threading.Thread(target=self._run, name="rq_ep mover", daemon=True)
        self._thread.start()

    @property
    def flags(self) -> MoverFlags:
        """What to announce before the next step."""
        return self._flags

    def begin(self, migration: Migration) -> None:
        """Start a migration; every rank is given the same ones in the same order."""
        with self._changed:
            assert self._current is None, "a migration is under way"
            self._current = _Progress(migration)
            self._begun.append(self._current)
            self._changed.notify_all()

    def abort(self, generation: int, reason: str) -> None:
        """Give up a migration, on all ranks before one of the next steps; nothing if it has ended."""
        with self._changed:
            if generation <= self._flags.failed:
                return
            self._given_up = (generation, reason)
            self._flags = self._flags._replace(failed=generation)
            self._changed.notify_all()
        self._wake()

    def between_steps(self, staged: int, failed: int, is_idle: bool = False) -> None:
        """Commit or give up, as all ranks do between the same two steps. Called on the engine's thread.

        Args:
            staged: the least of all ranks' flags.
            failed: the highest of all ranks' flags.
            is_idle: whether no rank has tokens in the step that begins.
        """
        with self._changed:
            self._num_steps += 1
            self._is_idle = is_idle
            self._flags = self._flags._replace(failed=max(self._flags.failed, failed))
            current = self._current
            if current is not None:
                if failed >= current.migration.generation:
                    self._end(current, MigrationEnd.ABORTED)
                elif staged > _code(current.migration, current.num_committed):
                    self._commit(current)
            if self._begun:  # otherwise no step needs to wake the thread
                self._changed.notify_all()

    # While the group changes, on the engine's thread

    def suspend(self) -> None:
        """Move nothing more, and return when nothing is under way here; messages must have been ended by the group."""
        with self._changed:
            self._is_suspended = self._is_idle = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_staging)

    def resume(self, committed: tuple[int, int], generation: int) -> None:
        """Go on with what any rank has committed, and without what is left of the migrations begun so far.

        Args:
            committed: the highest of all ranks.
            generation: higher than that of every migration so far, and lower than of those to come.
        """
        with self._changed:
            current = self._current
            if current is not None:
                if committed == (current.migration.generation, current.num_committed + 1):
                    self._commit(current)
                if not current.has_ended:
                    self._end(current, MigrationEnd.ABORTED)
            for progress in self._begun:
                progress.is_dropped = True
            self.committed = committed
            self._flags = MoverFlags(generation * ROUNDS_PER_GENERATION, generation)
            self._is_suspended = self._reconnects = False
            self._changed.notify_all()

    def wait_for_round(self) -> None:
        """Return when this rank is done with its part of the round under way, well or not."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._current is None or self._current.num_staged > self._current.num_committed
            )

    def close(self) -> None:
        """End the thread, when the engine has ended; a migration under way ends once no other rank waits for it."""
        with self._changed:
            self._closes = True
            self._changed.notify_all()
        self._thread.join()

    # On the engine's thread

    def _commit(self, current: _Progress) -> None:
        migration = current.migration
        current.num_committed += 1
        self.committed = (migration.generation, current.num_committed)
        for position, (placement, planner) in current.layers.items():
            self._layers[position].replace_placement(placement, planner)
        self._on_round(tuple(current.layers))
        if current.num_committed == len(migration.rounds):
            self._end(current, MigrationEnd.COMMITTED)

    def _end(self, current: _Progress, end: MigrationEnd) -> None:
        current.has_ended = True
        self._current = None
        migration = current.migration
        self._flags = self._flags._replace(staged=_code(migration, len(migration.rounds)))  # no rank waits for another
        generation, reason = self._given_up
        self._on_end(migration.generation, end, reason if generation == migration.generation else "")

    # On the mover's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closes or self._begun)
                if not self._begun:
                    return
                progress = self._begun[0]
            self._connect_again(progress)
            for number, moves in enumerate(progress.migration.rounds):
                with self._changed:
                    self._changed.wait_for(lambda: self._may_stage(progress, number))  # noqa: B023
                    if progress.is_dropped or progress.num_committed < number:
                        break
                    self._is_staging = True
                self._stage(progress, number, moves)
                self.activity, self.is_exchanging = "", False
                with self._changed:
                    self._is_staging, progress.num_staged = False, number + 1
                    self._changed.notify_all()
            with self._changed:
                self._changed.wait_for(lambda: progress.has_ended or self._closes)  # noqa: B023
                self._begun.popleft()
                self._reconnects = not progress.is_dropped and progress.num_committed < len(progress.migration.rounds)
            self.activity = "frees what does not serve"
            for layer in self._layers:
                layer.bank.discard_staged()
            self.activity = ""

    def _connect_again(self, progress: _Progress) -> None:
        """Begin a migration with new connections, if the one before was given up, on all ranks alike."""
        with self._changed:
            self._changed.wait_for(lambda: self._may_stage(progress, 0))
            if progress.is_dropped or not self._reconnects:
                return
            self._is_staging = True
        self.activity, self.is_exchanging = "connects to the other ranks again", True
        try:
            self._channel.reconnect(progress.migration.generation)
        except MessagesLost as error:
            self.abort(progress.migration.generation, str(error))
        self.activity, self.is_exchanging = "", False
        with self._changed:
            self._is_staging = False
            self._changed.notify_all()

    def _may_stage(self, progress: _Progress, number: int) -> bool:
        """Whether a round's turn has come, or never will."""
        if progress.is_dropped or self._closes:
            return True
        return not self._is_suspended and (progress.num_committed == number or progress.has_ended)

    def _stage(self, progress: _Progress, number: int, moves: MoveRound) -> None:
        """This rank's part of a round: send, receive, convert, read, verify, and announce it."""
        migration = progress.migration
        transfers = self._staging.transfers(moves)
        arrivals: Arrivals = {}
        try:
            arrivals = self._staging.prepare(moves, transfers)
        except Exception as error:  # the other ranks wait for messages all the same
            self.abort(migration.generation, self._named(error))
        try:
            if not self._carry(migration, transfers) or self._flags.failed >= migration.generation:
                return  # given up, here or elsewhere: the next agreement says so
            self._staging.verify(arrivals)
            after = moves.applied_to([layer.placement for layer in self._layers], migration.placement)
            progress.layers = {
                position: (after[position], self._planner_of(after[position])) for position in moves.layers
            }
        except Exception as error:
            self.abort(migration.generation, self._named(error))
            return
        with self._changed:
            if progress.has_ended:
                return
            self._flags = self._flags._replace(staged=_code(migration, number + 1))
        self._wake()

    def _note_activity(self, activity: str) -> None:
        self.activity = activity

    def _named(self, error: Exception) -> str:
        return f"rank {self._channel.rank}: {error}"

    def _carry(self, migration: Migration, transfers: Transfers) -> bool:
        """Send and receive piece by piece, as slowly as the pace asks for. Whether all has come."""
        peers = sorted({transfer.peer for transfer in transfers.values()})
        self.activity, self.is_exchanging = f"exchanges experts with rank {', '.join(map(str, peers))}", True

        def on_piece() -> None:
            self.num_pieces += 1
            self._rest(migration)

        has_come = carry(
            list(transfers.values()),
            self._channel,
            goes_on=lambda: self._flags.failed < migration.generation,
            on_loss=lambda error: self.abort(migration.generation, str(error)),
            on_piece=on_piece,
        )
        self.is_exchanging = False
        return has_come

    def _rest(self, migration: Migration) -> None:
        """Wait until a step has passed or, without a bound of bytes, as long as the thread's share of a core asks for.

        Not where the group is idle, or nothing more is sent.
        """

        def may_go_on() -> bool:
            is_given_up = self._closes or self._flags.failed >= migration.generation
            has_passed = is_bounded and self._num_steps > num_steps
            return self._is_idle or is_given_up or has_passed

        is_bounded = self._pace.bytes_per_step is not None
        now, rested = (time.monotonic(), time.thread_time()), self._rested
        timeout_s = None if is_bounded else self._pace.rest_s(now[0] - rested[0], now[1] - rested[1])
        with self._changed:
            num_steps = self._num_steps
            self._changed.wait_for(may_go_on, timeout_s)
        self._rested = (time.monotonic(), time.thread_time())


def _code(migration: Migration, num_rounds: int) -> int:
    """How far a rank has come, as one number."""
    return migration.generation * ROUNDS_PER_GENERATION + num_rounds
