"""The agreement that starts every step: each rank announces flags, and all derive the same action from all of them.

Axes: F flags.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

from rq_ep.parallel import TorchGroup
from rq_ep.parallel.ep_group import PeerLost

UNKNOWN = -1


class StepFlags(NamedTuple):
    """What one rank announces before a step."""

    has_step: bool  # it has tokens to run, or a prompt to score
    keeps_running: bool  # its engine was not asked to stop
    stops_now: bool  # its engine was asked to stop without finishing its requests
    has_requests: bool  # unfinished ones, in the batch or not
    num_announced: int  # requests of the whole group that this rank knows of
    mark: int  # the last mark it was given (`Engine.mark`)
    num_rows: int = UNKNOWN  # that it enters every MoE layer with, if it makes a step
    is_prefill: bool = False  # its step has tokens of prompts
    staged: int = 0  # how far its migration of experts has come (`MoverFlags`)
    failed: int = 0  # the last migration that it gives up
    generation: int = 0  # the newest membership of the group that it knows of


class GroupFlags(NamedTuple):
    """The flags of all ranks, merged: the same on every rank."""

    any_has_step: bool
    any_keeps_running: bool
    any_stops_now: bool
    any_has_requests: bool
    all_know_the_same: bool  # of requests
    mark: int  # the newest
    num_rows: tuple[int, ...] | None  # of each member in every MoE layer; None: one of them does not know its own
    any_prefill: bool
    staged: int  # the least
    failed: int  # the highest
    generation: int = 0  # the least: where it is newer than that of the group, all ranks know of it


class Action(Enum):
    """What a rank does in a step. If one rank takes RUN, every other one takes RUN or RUN_EMPTY."""

    RUN = auto()  # its own tokens
    RUN_EMPTY = auto()  # every MoE layer with zero rows, for the ranks that have tokens
    POLL = auto()  # agree again almost at once: a request is on its way, or waits for room
    MEET = auto()  # agree again, as soon as another rank wakes up: this one waits for its part in a migration
    SLEEP = auto()  # until it is woken, at most for a heartbeat
    END = auto()


# Exchanges the flags of this rank for those of all ranks.
GatherFlags = Callable[[StepFlags], Sequence[StepFlags]]


def merge(flags_R: Sequence[StepFlags]) -> GroupFlags:
    """Merge the flags of all ranks."""
    has_step, keeps_running, stops_now, has_requests, num_announced, *others = zip(*flags_R, strict=True)
    mark, num_rows, is_prefill, staged, failed, generation = others
    return GroupFlags(
        any_has_step=any(has_step),
        any_keeps_running=any(keeps_running),
        any_stops_now=any(stops_now),
        any_has_requests=any(has_requests),
        all_know_the_same=min(num_announced) == max(num_announced),
        mark=max(mark),
        num_rows=None if UNKNOWN in num_rows else num_rows,
        any_prefill=any(is_prefill),
        staged=min(staged),
        failed=max(failed),
        generation=min(generation),
    )


def next_action(has_step: bool, group: GroupFlags, staged: int = 0) -> Action:
    """Choose what a rank does next.

    No rank sleeps or ends before all ranks know of the same requests, as one of them may be for it.

    Args:
        has_step: the rank's own flag.
        group: the merged flags of all ranks.
        staged: the rank's own. The rank that has come least far sleeps until it has come further, and the others wait
            for it in the agreement.
    """
    if group.any_stops_now:
        return Action.END
    if group.any_has_step:
        return Action.RUN if has_step else Action.RUN_EMPTY
    if group.any_has_requests or not group.all_know_the_same:
        return Action.POLL
    if not group.any_keeps_running:
        return Action.END
    return Action.MEET if staged > group.staged else Action.SLEEP


def flags_exchange(group: TorchGroup | None) -> GatherFlags:
    """The exchange of flags between the members of a group. None: one rank alone."""
    if group is None:
        return lambda flags: [flags]

    def gather(flags: StepFlags) -> list[StepFlags]:
        rows: list[list[Any]] = group.gather_ints(flags, "agreement on the next step")
        return [StepFlags(*row) for row in rows]

    return gather


def is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank has failed: a collective that could not be finished."""
    return isinstance(error, PeerLost) or isinstance(error.__cause__, PeerLost)  # which a layer wraps
