"""One rank's part in the migrations of its group: begun, given up and followed between steps."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.strategy import Planner
from rq_ep.engine.progress import MoverProgress
from rq_ep.engine.step_agreement import GroupFlags
from rq_ep.moe import EPExperts
from rq_ep.moe.migration.expert_mover import ExpertMover, Migration, MigrationEnd, MoverFlags
from rq_ep.moe.migration.round_staging import ReadExpert
from rq_ep.parallel.ep_group import HostChannel
from rq_ep.rebalancing.pace import Pace
from rq_ep.serve.messages import BeginMigration
from rq_ep.solver.migration.move_rounds import read_rounds

log = logging.getLogger("rq_ep.serve")

CLOSE_TIMEOUT_S = 10.0


class MigrationObserver(Protocol):
    """Follows migrations; called on the engine's thread."""

    def on_round(self, layers: Mapping[int, LayerPlacement]) -> None:
        """A round serves: layers by their position, as they are now."""

    def on_end(self, is_committed: bool, reason: str) -> None:
        """A migration has ended; `reason`: why this rank gave it up, if it did."""


class GroupMover:
    """Begins migrations one after another, each when the one before has ended on this rank.

    Args:
        layers, channel, planner_of, read_expert, reads_formats, pace: as for `ExpertMover`.
        wake: has the ranks agree on a step soon, though nobody may have tokens.
        on_failure: called with the generation of a migration that this rank has given up, and why, unless somebody
            observes it here.
    """

    def __init__(
        self,
        layers: Sequence[EPExperts],
        channel: HostChannel,
        planner_of: Callable[[LayerPlacement], Planner],
        read_expert: ReadExpert,
        reads_formats: bool,
        pace: Pace,
        wake: Callable[[], None],
        on_failure: Callable[[int, str], None],
    ) -> None:
        self._layers = layers
        self._on_failure = on_failure
        self._observer: MigrationObserver | None = None
        self._to_begin: deque[Migration] = deque()
        self._is_moving = False
        self._asked_for = 0  # the migration that was begun last by a message
        self._newest = 0  # or in another way
        self._outcome: tuple[MigrationEnd, str] | None = None  # of the last one that has ended
        self._mover = ExpertMover(
            layers, channel, planner_of, read_expert, reads_formats=reads_formats,
            pace=pace, wake=wake, on_round=self._round_serves, on_end=self._ended,
        )  # fmt: skip

    # While the group changes, on the engine's thread

    @property
    def committed(self) -> tuple[int, int]:
        """The migration of the last round that serves here, and its rounds that do."""
        return self._mover.committed

    @property
    def newest(self) -> int:
        """The highest number of a migration that this rank has heard of."""
        return max(self._newest, self._mover.flags.failed)

    def suspend(self) -> None:
        """Move nothing more, and return when nothing is under way here; messages must have been ended by the group."""
        self._mover.suspend()

    def resume(self, committed: tuple[int, int], generation: int) -> None:
        """Go on with what any rank has committed, without what is left of the migrations begun or asked for so far.

        Args:
            committed: the highest of all ranks.
            generation: higher than that of every migration so far, and lower than of those to come.
        """
        self._observer = None
        self._to_begin.clear()
        self._newest = generation
        self._mover.resume(committed, generation)

    def carry_out(
        self, migration: Migration, gather: Callable[[MoverFlags], Sequence[MoverFlags]]
    ) -> tuple[MigrationEnd, str]:
        """Carry a migration out while no steps are made; returns its end and why this rank gave it up, if it did.

        Args:
            migration: every rank carries it out.
            gather: the flags of all ranks.
        """
        self._outcome = None
        self._newest = migration.generation
        self._mover.begin(migration)
        while self._outcome is None:
            self._mover.wait_for_round()
            flags_R = gather(self._mover.flags)
            staged, failed = min(flags.staged for flags in flags_R), max(flags.failed for flags in flags_R)
            self._mover.between_steps(staged, failed, is_idle=True)
        return self._outcome

    def observe(self, observer: MigrationObserver | None) -> None:
        """Have the migrations to come followed."""
        self._observer = observer

    # On any thread

    def begin(self, message: BeginMigration) -> None:
        """Begin a migration before one of the next steps."""
        placement = Placement.from_dict(message.placement)
        self._asked_for = self._newest = message.generation
        self._to_begin.append(Migration(message.generation, placement, read_rounds(message.rounds)))

    def abort(self, generation: int, reason: str) -> None:
        """Give a migration up, on all ranks."""
        self._mover.abort(generation, reason)

    def stop(self) -> None:
        """Give up what is under way: the engine is about to stop."""
        if self._asked_for:
            self._mover.abort(self._asked_for, "the server was shut down")

    def close(self) -> None:
        """End, after the engine; messages that other ranks wait for are sent first."""
        closing = threading.Thread(target=self._mover.close, name="rq_ep mover's end", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    @property
    def progress(self) -> MoverProgress:
        """How far this rank has come."""
        mover = self._mover
        return MoverProgress(mover.flags.staged, mover.num_pieces, mover.activity, mover.is_exchanging)

    # For the engine

    def flags(self) -> MoverFlags:
        """What to announce before the next step."""
        return self._mover.flags

    def on_agreement(self, flags: GroupFlags) -> None:
        """Take part in what all ranks do between the same two steps."""
        self._mover.between_steps(flags.staged, flags.failed, is_idle=not flags.any_has_step)
        if self._to_begin and not self._is_moving:
            self._is_moving = True
            self._mover.begin(self._to_begin.popleft())

    def _round_serves(self, positions: Sequence[int]) -> None:
        if self._observer is not None:
            self._observer.on_round({position: self._layers[position].placement for position in positions})

    def _ended(self, generation: int, end: MigrationEnd, reason: str) -> None:
        self._is_moving = False
        self._outcome = end, reason
        is_committed = end is MigrationEnd.COMMITTED
        if self._observer is not None:
            self._observer.on_end(is_committed, reason)
        elif reason and not is_committed:
            log.warning("re-placement %d was given up: %s", generation, reason)
            self._on_failure(generation, reason)
