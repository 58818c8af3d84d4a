"""One step of a rank, in lockstep with the others: agree on it, then run a batch, score a prompt, follow, or sleep.

A step that another rank cuts off by its death has delivered nothing. What was prepared for it is kept, and makes one of
the next steps once the group has recovered. Ranks need not make the cut step again together: each has its own batches,
and what a layer gives for a row does not depend on who else is in the step.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from rq_ep.engine.progress import ProgressTracker
from rq_ep.engine.requests import Batch
from rq_ep.engine.step_agreement import (
    UNKNOWN,
    Action,
    GatherFlags,
    GroupFlags,
    StepFlags,
    is_consequence,
    merge,
    next_action,
)
from rq_ep.moe.migration.expert_mover import MoverFlags

POLL_S = 0.001


class GroupNumbers(NamedTuple):
    """The numbers in which a rank that has just joined the group agrees with the others."""

    generation: int  # of the group's membership
    mark: int  # the last one that any rank was given
    num_announced: int  # requests


# Returns when the rank may make steps again, with the numbers that the group has agreed on. It is given the error that
# has cut a step off, or None where the group changes between two steps, and this rank's numbers.
Recover = Callable[[BaseException | None, GroupNumbers], GroupNumbers]


class Batches(Protocol):
    """The batches of this rank's requests."""

    @property
    def keeps_running(self) -> bool:
        """Whether nobody has asked for the end."""

    @property
    def stops_now(self) -> bool:
        """Whether the end was asked for without finishing the requests."""

    def has_requests(self) -> bool: ...

    def prepare(self) -> bool:
        """Put the next batch together; whether there is one."""

    def run(self) -> None:
        """Run the batch that was prepared, and deliver its tokens."""

    def restart(self) -> None:
        """The step of the batch that was prepared was cut off: one of the next ones makes it again."""

    def contents(self) -> Batch:
        """The requests in the batch that was prepared."""

    def has_prompts(self) -> bool:
        """Whether the batch that was prepared has tokens of prompts."""


class Prompts(Protocol):
    """The prompts of this rank that are to be scored."""

    under_way: list[tuple[str, int]]

    def has_work(self) -> bool: ...

    def step(self, is_wanted: Callable[[str], bool]) -> bool: ...

    def restart(self) -> None:
        """The step was cut off: one of the next ones makes it again."""


class StepLoop:
    """The steps of one rank. All ranks enter every MoE layer together: those without tokens do so with zero rows.

    Args:
        gather_flags: exchanges the flags that start a step.
        prompts: the prompts that are to be scored.
        is_wanted: whether the request of an id is still wanted.
        empty_step: enters every MoE layer with zero rows.
        on_mark: called with a mark (`Engine.mark`), between the same two steps on every rank.
        mover_flags: what this rank announces of the migration of experts under way; None: experts never move.
        on_agreement: called with what the group has agreed on, between the same two steps on every rank.
        recover: called when another rank has cut a step off, or when all ranks know of a new membership (`regroup`);
            None: such an error ends the loop.
        announce_rows: called with the rows of each member in every MoE layer of the step that begins, and with None
            when it has ended, or where a member does not know its own.
        around_batch: called with what returns the batch of a step; the step is made inside of what it returns.
        progress: follows the steps.
        heartbeat_s: longest sleep of an idle group, in seconds.
        wake_up: set to end a sleep.
    """

    def __init__(
        self,
        *,
        gather_flags: GatherFlags,
        prompts: Prompts,
        is_wanted: Callable[[str], bool],
        empty_step: Callable[[], None],
        on_mark: Callable[[int], None],
        mover_flags: Callable[[], MoverFlags] | None,
        on_agreement: Callable[[GroupFlags], None],
        announce_rows: Callable[[Sequence[int] | None], None],
        recover: Recover | None = None,
        around_batch: Callable[[Callable[[], Batch]], AbstractContextManager[None]] = lambda _: nullcontext(),
        progress: ProgressTracker,
        heartbeat_s: float,
        wake_up: threading.Event,
    ) -> None:
        self._gather_flags = gather_flags
        self._prompts = prompts
        self._is_wanted = is_wanted
        self._empty_step = empty_step
        self._on_mark = on_mark
        self._mover_flags = mover_flags
        self._on_agreement = on_agreement
        self._recover = recover
        self._announce_rows = announce_rows
        self._around_batch = around_batch
        self._progress = progress
        self._heartbeat_s = heartbeat_s
        self._wake_up = wake_up
        self._num_announced = 0
        self._mark = 0  # the last one that this rank was given,
        self._passed_mark = 0  # and the last one that the group has passed
        self._newest_generation = 0  # of the group's membership that this rank was told of,
        self._generation = 0  # and the one that it serves in
        self._is_scoring = False  # in the step under way, rather than running a batch
        self._has_batch = False
        self.num_steps = 0  # with tokens of this rank
        self.steps_s = 0.0

    def wake(self, num_announced: int) -> None:
        """End a sleep: the group has been given `num_announced` requests so far, one of them perhaps to this rank."""
        self._num_announced = max(self._num_announced, num_announced)
        self._wake_up.set()

    def mark(self, number: int) -> None:
        """Have `on_mark` of every rank called with this number between the same two steps; numbers rise."""
        self._mark = number
        self._wake_up.set()

    def regroup(self, generation: int) -> None:
        """Have the group recover in a newer generation, before one of the next steps, once all ranks know of it."""
        self._newest_generation = max(self._newest_generation, generation)
        self._wake_up.set()

    def batch(self, batches: Batches) -> Batch:
        """The requests in the step under way on this rank; to be read within it, on the loop's thread."""
        if self._is_scoring:
            return Batch(self._prompts.under_way, True)
        return batches.contents() if self._has_batch else Batch([], False)

    def step(self, batches: Batches) -> bool:
        """Make one step of the group; False ends the loop, on every rank."""
        try:
            return self._step(batches)
        except Exception as error:
            if self._recover is None or not is_consequence(error):
                raise
            self._change_group(error, batches)
            return True

    def _step(self, batches: Batches) -> bool:
        self._wake_up.clear()
        num_announced = self._num_announced  # before requests are looked at: it must not count one that was not seen
        # Scoring and batches take turns: neither waits for the other's last request.
        self._is_scoring = self._prompts.has_work() and not (self._is_scoring and batches.has_requests())
        self._has_batch = not self._is_scoring and batches.prepare()
        flags = StepFlags(
            has_step=self._is_scoring or self._has_batch,
            keeps_running=batches.keeps_running,
            stops_now=batches.stops_now,
            has_requests=batches.has_requests() or self._prompts.has_work(),
            num_announced=num_announced,
            mark=self._mark,
            generation=self._newest_generation,
            num_rows=self._num_rows(batches),
        )
        if self._mover_flags is not None:
            is_prefill = self._is_scoring or (self._has_batch and batches.has_prompts())
            flags = flags._replace(is_prefill=is_prefill, **self._mover_flags()._asdict())
        self._progress.begin_step()
        group = merge(self._gather_flags(flags))
        self._progress.end_agreement()
        if group.generation > self._generation and self._recover is not None:
            self._change_group(None, batches)
            return True
        if group.mark > self._passed_mark and not group.any_stops_now:
            self._passed_mark = group.mark
            self._on_mark(group.mark)
        if not group.any_stops_now:
            self._on_agreement(group)
        self._announce_rows(group.num_rows)
        try:
            return self._act(next_action(flags.has_step, group, flags.staged), batches)
        finally:
            self._announce_rows(None)

    def _num_rows(self, batches: Batches) -> int:
        if not self._has_batch:
            return UNKNOWN if self._is_scoring else 0
        batch = batches.contents()
        return UNKNOWN if batch.has_images else sum(size for _, size in batch.parts)

    def _change_group(self, error: BaseException | None, batches: Batches) -> None:
        """Keep what was prepared, and return when the group serves again."""
        assert self._recover is not None
        if self._has_batch:
            batches.restart()
        if self._is_scoring:
            self._prompts.restart()
        numbers = GroupNumbers(self._generation, max(self._mark, self._passed_mark), self._num_announced)
        self._progress.end_generation()
        self._generation, self._passed_mark, self._num_announced = self._recover(error, numbers)
        self._progress.begin_generation(self._generation)
        self._newest_generation = max(self._newest_generation, self._generation)

    def _act(self, action: Action, batches: Batches) -> bool:
        match action:
            case Action.RUN:
                start_s = time.perf_counter()
                self._run(batches)
                self.num_steps += 1
                self.steps_s += time.perf_counter() - start_s
            case Action.RUN_EMPTY:
                self._empty_step()
            case Action.POLL:
                self._wake_up.wait(timeout=POLL_S)
            case Action.SLEEP:
                self._wake_up.wait(timeout=self._heartbeat_s)
        return action is not Action.END

    def _run(self, batches: Batches) -> None:
        if not self._is_scoring:
            with self._around_batch(batches.contents):
                batches.run()
        elif not self._prompts.step(self._is_wanted):
            self._empty_step()  # nobody wants the prompt any more, and the group waits for this rank
