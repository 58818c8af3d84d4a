"""Groups that need not wait for all of their ranks: who begins, and what the others learn."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from bench.serving.ports import free_port
from rq_ep.config import Environment
from rq_ep.parallel.processes.first_members import FirstMeeting, FirstMembers
from rq_ep.parallel.processes.world import RendezvousError


@pytest.fixture
def environment() -> Iterator[Environment]:
    with free_port() as port:
        yield Environment(world_size=3, master_port=port)


def test_those_that_have_come_begin_and_a_late_one_is_invited_later(environment: Environment) -> None:
    ranks = [replace(environment, rank=rank) for rank in range(3)]
    hosted = FirstMeeting(ranks[0], 20)
    with ThreadPoolExecutor() as threads:
        others = [threads.submit(FirstMeeting(ranks[1], 20).members, 2, 0.0, None)]
        assert hosted.members(2, 0.0, {"a": 1}) == others[0].result() == FirstMembers((0, 1), {"a": 1})
        late = FirstMeeting(ranks[2], 20)
        assert late.members(2, 0.0, None) == FirstMembers((0, 1), {"a": 1})
        invited = threads.submit(late.await_invitation)
        assert not invited.done()
        hosted.invite()
        invited.result(20)


def test_all_begin_where_all_come_in_time(environment: Environment) -> None:
    hosted = FirstMeeting(environment, 20)
    with ThreadPoolExecutor() as threads:
        found = threads.submit(hosted.members, 1, 60.0, None)
        for rank in (2, 1):
            threads.submit(FirstMeeting(replace(environment, rank=rank), 20).members, 1, 60.0, None)
        assert found.result(20).ranks == (0, 1, 2)


def test_too_few_ranks_are_an_error_that_says_how_many_have_come(environment: Environment) -> None:
    with pytest.raises(RendezvousError, match=r"1 of 3 ranks have come to .* within 0.1 s .*--min-ranks 2"):
        FirstMeeting(environment, 0.1).members(2, 0.0, None)
