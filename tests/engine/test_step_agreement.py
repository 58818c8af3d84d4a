"""The agreement on a step, as a table: flags of two ranks in, the action of each out."""

import pytest

from rq_ep.engine.step_agreement import (
    Action,
    GroupFlags,
    StepFlags,
    flags_exchange,
    is_consequence,
    merge,
    next_action,
)
from rq_ep.parallel.ep_group import PeerLost, RankFailure

# has_step, keeps_running, stops_now, has_requests, num_announced, mark
IDLE = StepFlags(False, True, False, False, 3, 0)
BUSY = StepFlags(True, True, False, True, 3, 0)
WAITING = StepFlags(False, True, False, True, 3, 0)  # a request that finds no room in the cache
LEAVING = StepFlags(False, False, False, False, 3, 0)
DRAINING = StepFlags(True, False, False, True, 3, 0)
STUCK_DRAINING = StepFlags(False, False, False, True, 3, 0)
STOPPING = StepFlags(True, False, True, True, 3, 0)
INFORMED = StepFlags(False, True, False, False, 4, 0)  # it knows of a request that others have not been told of


@pytest.mark.parametrize(
    ("one", "other", "action_of_one", "action_of_other"),
    [
        (BUSY, IDLE, Action.RUN, Action.RUN_EMPTY),
        (BUSY, BUSY, Action.RUN, Action.RUN),
        (BUSY, WAITING, Action.RUN, Action.RUN_EMPTY),
        (BUSY, LEAVING, Action.RUN, Action.RUN_EMPTY),
        (BUSY, INFORMED, Action.RUN, Action.RUN_EMPTY),
        (DRAINING, LEAVING, Action.RUN, Action.RUN_EMPTY),
        (IDLE, IDLE, Action.SLEEP, Action.SLEEP),
        (IDLE, LEAVING, Action.SLEEP, Action.SLEEP),
        (IDLE, WAITING, Action.POLL, Action.POLL),
        (IDLE, INFORMED, Action.POLL, Action.POLL),
        (LEAVING, INFORMED, Action.POLL, Action.POLL),
        (LEAVING, STUCK_DRAINING, Action.POLL, Action.POLL),
        (LEAVING, LEAVING, Action.END, Action.END),
        (STOPPING, BUSY, Action.END, Action.END),
        (STOPPING, IDLE, Action.END, Action.END),
    ],
)
def test_the_ranks_act_on_the_same_flags(
    one: StepFlags, other: StepFlags, action_of_one: Action, action_of_other: Action
) -> None:
    group = merge([one, other])
    assert merge([other, one]) == group
    assert (next_action(one.has_step, group), next_action(other.has_step, group)) == (action_of_one, action_of_other)


def test_flags_are_merged_over_the_ranks() -> None:
    flags = [
        BUSY._replace(is_prefill=True, staged=7),
        STOPPING._replace(mark=2, staged=5),
        INFORMED._replace(staged=6, failed=1),
    ]
    assert merge(flags) == GroupFlags(True, True, True, True, False, 2, None, any_prefill=True, staged=5, failed=1)
    assert merge([IDLE]) == GroupFlags(False, True, False, False, True, 0, None, any_prefill=False, staged=0, failed=0)


def test_all_ranks_know_the_rows_of_a_step_or_none_does() -> None:
    flags = [BUSY._replace(num_rows=5), IDLE._replace(num_rows=0), BUSY._replace(num_rows=2)]
    assert merge(flags).num_rows == (5, 0, 2)
    assert merge([*flags, BUSY]).num_rows is None


def test_one_rank_agrees_with_itself() -> None:
    assert list(flags_exchange(None)(BUSY)) == [BUSY]


def test_errors_that_follow_from_another_are_told_apart() -> None:
    def layer_error(cause: Exception) -> RankFailure:
        try:
            raise RankFailure("MoE layer 3 on rank 1: it broke") from cause
        except RankFailure as error:
            return error

    assert is_consequence(PeerLost("gone"))
    assert is_consequence(layer_error(PeerLost("rank 1: all-to-all failed")))
    assert not is_consequence(layer_error(KeyError(3)))
    assert not is_consequence(RuntimeError("out of memory"))
