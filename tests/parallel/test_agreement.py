"""Work that all ranks do together, and errors that all of them raise."""

import time

import pytest

from rq_ep.core.errors import UserError
from rq_ep.parallel import LocalGroup, agreement, run_local
from rq_ep.parallel.agreement import is_first_of_node, run_long_on_all_ranks


class CountingGroup(LocalGroup):
    """Counts how often the ranks meet."""

    num_meetings = 0

    def all_gather_object(self, value: object) -> list[object]:
        CountingGroup.num_meetings += 1
        return super().all_gather_object(value)


def test_ranks_meet_again_and_again_while_one_of_them_works_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MEET_EVERY_S", 0.01)
    monkeypatch.setattr(CountingGroup, "num_meetings", 0)

    def work(group: LocalGroup) -> str:
        group.__class__ = CountingGroup
        return run_long_on_all_ranks(group, lambda: time.sleep(0.3) or "slow" if group.rank == 1 else "quick")

    assert run_local(2, work) == ["quick", "slow"]
    assert CountingGroup.num_meetings > 2 * 5


def test_an_error_of_long_work_is_raised_on_every_rank() -> None:
    def fail() -> None:
        raise UserError("the disk is full")

    def work(group: LocalGroup) -> str:
        with pytest.raises(UserError) as error:
            run_long_on_all_ranks(group, fail if group.rank == 1 else lambda: None)
        return str(error.value)

    assert run_local(3, work) == ["rank 1: the disk is full"] * 3


def test_one_rank_of_a_node_is_its_first() -> None:
    assert run_local(3, is_first_of_node) == [True, False, False]
