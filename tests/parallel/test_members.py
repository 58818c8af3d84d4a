"""Ranks that die, leave and join: the group of those that are left, with holes for the others."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from bench.serving.ports import free_port
from rq_ep.parallel import LocalGroup, TorchGroup, run_local
from rq_ep.parallel.ep_group import MessagesLost, PeerLost, Superseded
from rq_ep.parallel.processes.communicators import Communicators
from rq_ep.parallel.processes.meeting import GenerationStore, meet
from rq_ep.parallel.processes.seat import Seat
from tests.parallel import member as tasks
from tests.parallel.member import NUM_RANKS, Member


class Group:
    """The processes of a group: four ranks and, for rank 2, one that waits to take its place."""

    def __init__(self, port: int) -> None:
        self.ranks = [Member(rank, port) for rank in range(NUM_RANKS)]
        self.spare = Member(2, None)

    def on(self, members: list[int], task: Any, *args: Any) -> list[Any]:
        """The results of a task that all these ranks do."""
        for rank in members:
            self.ranks[rank].start(task, *args)
        return [self.ranks[rank].result() for rank in members]

    def announce(self, members: list[int], generation: int) -> None:
        for rank in members:
            self.ranks[rank].announce(generation)


@pytest.fixture
def group() -> Iterator[Group]:
    with free_port() as port:
        group = Group(port)
        yield group
        for member in (*group.ranks, group.spare):
            member.kill()


def check_everything(group: Group, members: list[int]) -> None:
    """Every collective and message arrives as between the members of R ranks."""
    is_member = np.isin(range(NUM_RANKS), members)
    for rank, seen in zip(members, group.on(members, tasks.everything), strict=True):
        counts = [[other + 1, 5] if is_member[other] else [0, 0] for other in range(NUM_RANKS)]
        assert seen["counts"] == counts
        assert seen["rows"] == [other for other in members for _ in range(rank + 1)]
        assert seen["borrowed"]
        assert seen["message"]
        assert seen["objects"] == [{"rank": other} if is_member[other] else None for other in range(NUM_RANKS)]
        assert seen["ints"] == [[other, 7] for other in members]


@pytest.mark.dist
@pytest.mark.slow
def test_a_group_lives_through_deaths_and_joins(group: Group) -> None:
    ranks = group.ranks
    everyone, survivors = [0, 1, 2, 3], [0, 1, 3]
    check_everything(group, everyone)
    store = group.on(everyone, tasks.open_store)[0]

    # Rank 2 is killed while 0 and 3 are in a collective with it, 1 waits for 3, which leaves, and 0 waits for a message
    # of 1 beside it.
    group.on([0], tasks.start_on_channel, 1)
    ranks[0].start(tasks.gather_counts)
    ranks[1].start(tasks.borrow, 3)
    ranks[3].start(tasks.gather_counts)
    time.sleep(0.1)
    assert all(ranks[rank].is_busy() for rank in survivors)
    ranks[2].kill()
    killed_s = time.monotonic()
    for rank in (0, 3):
        failure = f"PeerLost: rank {rank}: gather of counts failed, another rank may have ended"
        assert failure in ranks[rank].result()
    assert ranks[1].is_busy(), "it waits for a rank that lives"
    group.announce(survivors, 1)
    assert ranks[1].result().startswith("PeerLost: rank 1: weight transfer")
    assert "MessagesLost: rank 0: no connection to rank 1" in group.on([0], tasks.channel_failure)[0]
    assert "the group was aborted" in group.on([0], tasks.gather_counts)[0]
    assert group.on(survivors, tasks.reform, 1, survivors, store) == [(0, 1, 3)] * 3
    assert time.monotonic() - killed_s < 20, "no timeout was waited for"
    check_everything(group, survivors)
    texts = group.on([1], tasks.wrong_peer, 2)[0]
    assert texts[0] == "ValueError: rank 2 is no member, and cannot send or get rows"
    assert "PeerLost: rank 1: weight transfer failed" in texts[1]
    assert "MessagesLost: rank 1: no connection to rank 2 (rank 2 is no member of generation 1)" in texts[2]

    # Its successor joins. A late call that ends what is older than this generation does not end this one.
    ranks[2] = group.spare
    assert group.on(everyone, tasks.reform, 2, everyone, store) == [(0, 1, 2, 3)] * 4
    group.announce(everyone, 2)
    check_everything(group, everyone)

    # Rank 3 is killed, and never comes to generation 3, which is superseded.
    remaining = [0, 1, 2]
    for rank in remaining:
        ranks[rank].start(tasks.all_to_all)
    time.sleep(0.1)
    ranks[3].kill()
    assert all("PeerLost: " in ranks[rank].result() for rank in remaining)
    for rank in remaining:
        ranks[rank].start(tasks.reform, 3, everyone, store)
    time.sleep(0.1)
    assert all(ranks[rank].is_busy() for rank in remaining)
    group.announce(remaining, 4)
    assert all(ranks[rank].result().startswith("Superseded: ") for rank in remaining)
    assert group.on(remaining, tasks.reform, 4, remaining, store) == [(0, 1, 2)] * 3
    check_everything(group, remaining)

    # Rank 0 hosts the store, and dies before it comes to generation 5.
    last = [1, 2]
    for rank in last:
        ranks[rank].start(tasks.reform, 5, remaining, store)
    time.sleep(0.1)
    ranks[0].kill()
    for rank in last:
        assert f"PeerLost: rank {rank}: generation 5 could not be formed: the store" in ranks[rank].result()
    (refused,) = group.on([2], tasks.reform, 6, last, store)
    assert "PeerLost: rank 2: generation 6 could not be formed: the store at 127.0.0.1" in refused
    store = group.on([1], tasks.open_store)[0]
    assert group.on(last, tasks.reform_often, range(7, 30), last, store) == ["", ""]
    check_everything(group, last)
    assert group.on([2], tasks.reform, 30, [2], group.on([2], tasks.open_store)[0]) == [(2,)]
    assert group.on([2], tasks.gather_counts) == [[[0, 0, 0]] * NUM_RANKS]


@pytest.mark.parametrize("ends_by", ["announcement", "abort"])
def test_forming_ends_at_once_when_a_member_has_met_and_then_died(ends_by: str) -> None:
    """gloo waits for that member's connections, and cannot be interrupted."""
    group = TorchGroup.alone(0, 2, "cpu", timeout_s=3)
    store = group.open_store()
    is_superseded = threading.Event()

    def other() -> None:
        meet(GenerationStore(store, 1, lambda: False), [0, 1], 1, "", 10)
        time.sleep(0.2)  # rank 0 is making its communicators
        is_superseded.set() if ends_by == "announcement" else group.abort()

    thread = threading.Thread(target=other)
    thread.start()
    start_s = time.monotonic()
    with pytest.raises(Superseded, match="rank 0: generation 1 could not be formed"):
        group.reform(1, [0, 1], store, is_superseded.is_set)
    assert time.monotonic() - start_s < 2
    thread.join()
    with pytest.raises(PeerLost, match="rank 0: barrier: the group was aborted, generation 0 has ended"):
        group.barrier()
    group.reform(2, [0], store)
    group.barrier()
    group.close()


@pytest.mark.slow
def test_a_collective_has_a_timeout_and_a_channel_has_none() -> None:
    groups = [TorchGroup.alone(rank, 2, "cpu", timeout_s=1) for rank in range(2)]
    channels = [group.open_host_channel() for group in groups]
    store = groups[0].open_store()
    landing = torch.zeros(1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda group: group.reform(1, [0, 1], store), groups))
        receiving = pool.submit(channels[0].exchange, [], [(landing, 1)])
        with pytest.raises(PeerLost, match=r"gather of counts failed.* 1000ms"):
            groups[0].gather_counts(torch.zeros(1, dtype=torch.int64))
        with pytest.raises(PeerLost, match=r"weight transfer failed.* 1000ms"):
            groups[0].start_transfers([], [(torch.zeros(8), 1)]).wait()
        channels[1].exchange([(torch.ones(1), 0)], [])
        receiving.result()
    assert landing.item() == 1
    for group in groups:
        group.close()


class LostWork:
    """A collective whose end gloo never tells."""

    def is_completed(self) -> bool:
        return False

    def wait(self, timeout: timedelta) -> None:
        raise RuntimeError("Operation timed out!")


def test_the_wait_for_a_collective_that_gloo_has_lost_ends_with_the_generation() -> None:
    communicators = Communicators(HashStore(), Seat(0, 1, (0,)), torch.device("cpu"), "gloo", 20, 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(communicators.finish, LostWork())
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        communicators.abort("generation 0 has ended")
        with pytest.raises(RuntimeError, match="cut off: generation 0 has ended"):
            waiting.result(timeout=20)


def on_thread(call: Callable[..., Any], *args: Any) -> Future[Any]:
    """What a call returns; the thread does not hold up the end of the tests if it never does."""
    future: Future[Any] = Future()

    def body() -> None:
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


@pytest.mark.parametrize("ending", [0, 1])
def test_messages_that_are_cut_off_on_their_way_end_at_both_ends(ending: int) -> None:
    """A lent expert and a message of a channel; gloo would wake neither end, whichever of the ranks has ended."""
    groups = [TorchGroup.alone(rank, 2, "cpu", timeout_s=60) for rank in range(2)]
    channels = [group.open_host_channel() for group in groups]
    store = groups[0].open_store()
    list(map(Future.result, [on_thread(group.reform, 1, [0, 1], store) for group in groups]))
    sent = torch.ones(32 << 20, dtype=torch.uint8)
    lent, message = torch.zeros_like(sent), torch.zeros_like(sent)
    times = 400  # under way for seconds, however late this thread gets its turn
    waiting = [
        on_thread(groups[1].start_transfers([], [(lent, 0)] * times).wait),
        on_thread(channels[1].exchange, [], [(message, 0)] * times),
        on_thread(groups[0].start_transfers([(sent, 1)] * times, []).wait),
        on_thread(channels[0].exchange, [(sent, 1)] * times, []),
    ]
    while not (lent[0] and message[0]):
        time.sleep(0)
    assert not any(future.done() for future in waiting)
    groups[ending].abort()
    for future in waiting:
        with pytest.raises(PeerLost, match=r"no connection to rank|the group was aborted"):
            future.result(timeout=10)
    for group in groups:
        group.reform(2, [group.rank], group.open_store())
        group.barrier()
        group.close()


def test_a_channel_whose_connections_break_is_made_anew_beside_the_collectives() -> None:
    groups = [TorchGroup.alone(rank, 2, "cpu", timeout_s=20) for rank in range(2)]
    channels = [group.open_host_channel() for group in groups]
    store = groups[0].open_store()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda group: group.reform(1, [0, 1], store), groups))

        def send() -> float:
            landing = torch.zeros(1)
            receiving = pool.submit(channels[0].exchange, [], [(landing, 1)])
            try:
                channels[1].exchange([(torch.ones(1), 0)], [])
            finally:
                receiving.result()
            return landing.item()

        for number in (5, 6):
            list(pool.map(lambda channel: channel.reconnect(number), channels))  # noqa: B023
            assert send() == 1
            communicators = groups[1]._generations.current
            communicators._connections[-1].shut_down()
            for messages in communicators._channels:
                messages.shut_down()
            with pytest.raises(MessagesLost, match="no connection to rank"):
                send()
        list(pool.map(lambda group: group.barrier(), groups))
        trying = pool.submit(channels[0].reconnect, 7)  # rank 1 does not come
        for group in groups:
            group.abort()
        with pytest.raises(MessagesLost, match="rank 0: no connection to the other ranks again"):
            trying.result(2)
        with pytest.raises(MessagesLost, match="generation 1 has ended"):
            channels[0].exchange([(torch.ones(1), 1)], [])
    for group in groups:
        group.close()


def test_the_ranks_of_one_process_may_have_holes() -> None:
    def main(group: LocalGroup) -> dict[str, Any]:
        rows = torch.full((3, 1), group.rank)
        with pytest.raises(ValueError, match="rank 1 is no member"):
            group.all_to_all(rows, [0, 3, 0], [0, 0, 0])
        return {
            "counts": group.gather_counts(torch.tensor([group.rank, 4])).tolist(),
            "rows": group.all_to_all(rows, [1, 0, 2], [group.rank // 2 + 1, 0, group.rank // 2 + 1])[:, 0].tolist(),
            "objects": group.all_gather_object(group.rank),
        }

    seen = run_local(3, main, members=[0, 2])
    assert [of_rank["counts"] for of_rank in seen] == [[[0, 4], [0, 0], [2, 4]]] * 2
    assert [of_rank["rows"] for of_rank in seen] == [[0, 2], [0, 0, 2, 2]]
    assert [of_rank["objects"] for of_rank in seen] == [[0, None, 2]] * 2
