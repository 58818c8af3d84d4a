"""Messages through the memory that ranks of one node share, and over gloo where there is none."""

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from rq_ep.parallel.ep_group import MessagesLost
from rq_ep.parallel.processes.link_operations import copy, hear, say, undone_of
from rq_ep.parallel.processes.node_messages import SEGMENT_BYTES, NodeLink, open_links, portions
from rq_ep.parallel.processes.seat import Seat
from tests.parallel.member import Member, State, growth_since, in_use, open_store, reform

MEMBERS = [0, 1, 2]


@pytest.mark.parametrize(
    ("sizes", "of_portions"),
    [
        ([], [0]),
        ([0], [0]),
        ([1, 0, SEGMENT_BYTES - 1], [SEGMENT_BYTES]),
        ([1, SEGMENT_BYTES, 2 * SEGMENT_BYTES], [SEGMENT_BYTES, SEGMENT_BYTES, SEGMENT_BYTES, 1]),
    ],
)
def test_portions_fill_the_segment_with_all_bytes_in_their_order(sizes: list[int], of_portions: list[int]) -> None:
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    filled = portions(tensors)
    assert [sum(part.nbytes for part in portion) for portion in filled] == of_portions
    segment, arrived = bytearray(SEGMENT_BYTES), b""
    for portion in filled:
        for place, address, nbytes in portion:
            segment[place : place + nbytes] = ctypes.string_at(address, nbytes)
        arrived += segment[: sum(part.nbytes for part in portion)]
    assert arrived == b"".join(tensor.numpy().tobytes() for tensor in tensors)


def test_numbers_of_any_type_are_bytes() -> None:
    sent = torch.full((2, 3), 1.5, dtype=torch.bfloat16)
    ((_, address, nbytes),) = portions([sent])[0]
    assert ctypes.string_at(address, nbytes) == b"\xc0\x3f" * 6


def test_operations_end_at_the_first_that_fails_and_say_why() -> None:
    own, other = socket.socketpair()
    with own, other:
        sent, received = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
        copied = copy(received.ctypes.data, sent.ctypes.data, 100)
        assert undone_of([say(own.fileno()), hear(other.fileno()), copied]) == (3, "")
        assert np.array_equal(received, sent)
        received[:] = 0
        other.close()
        number, reason = undone_of([say(own.fileno()), copied])
        assert (number, received.any()) == (0, False)
        assert "Broken pipe" in reason
        assert undone_of([copied, hear(own.fileno())]) == (1, "its connection has ended")
        assert np.array_equal(received, sent)


class Gathers:
    """`gather` for threads that take the places of ranks; `on_gather` is called with its number and values."""

    def __init__(self, num_members: int) -> None:
        self._values: list[Any] = [None] * num_members
        self._barrier = threading.Barrier(num_members)
        self.num_done = 0
        self.on_gather: Callable[[int, list[Any]], None] = lambda number, values: None

    def of(self, index: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self._values[index] = value
            if self._barrier.wait(10) == 0:
                self.num_done += 1
                self.on_gather(self.num_done, self._values)
            self._barrier.wait(10)
            values = list(self._values)
            self._barrier.wait(10)
            return values

        return gather


def links_of(members: list[int], gathers: Gathers) -> list[dict[int, NodeLink]]:
    seats = [Seat(rank, max(members) + 1, tuple(members)) for rank in members]
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(lambda seat: open_links(seat, gathers.of(seat.index)), seats))


def test_who_knows_no_token_gets_no_link() -> None:
    gathers = Gathers(3)
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(2)]

    def on_gather(number: int, names: list[Any]) -> None:
        if number == 1:
            for stranger in strangers:
                stranger.connect(names[0])
            strangers[0].sendall(bytes(16))

    gathers.on_gather = on_gather
    links = links_of([0, 1, 3], gathers)
    assert [sorted(of_rank) for of_rank in links] == [[1, 3], [0, 3], [0, 1]]
    for stranger in strangers:
        with stranger:
            assert stranger.recv(1) == b""


def test_names_of_another_host_lead_to_no_link() -> None:
    """Its ranks have sockets too, which are not here."""
    gathers = Gathers(2)

    def on_gather(number: int, names: list[Any]) -> None:
        if number == 1:
            names[0] = names[0][:-1] + b"-"

    gathers.on_gather = on_gather
    assert links_of([0, 1], gathers) == [{}, {}]


@pytest.mark.parametrize("missing", [(os, "memfd_create"), (socket, "AF_UNIX")])
def test_a_system_without_shared_memory_has_no_links(missing: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*missing)
    assert links_of([0, 1], Gathers(2)) == [{}, {}]


def linked_ranks(state: State) -> list[int]:
    return sorted(state.group._generations.current._channels[0].links)


def forbid_shared_memory(state: State) -> None:
    del os.memfd_create


def message(src: int, dst: int, size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32).mul_(2 * src + 1).add_(dst).to(torch.uint8)


def exchange_sizes(state: State) -> list[tuple[int, int]]:
    """Exchange several messages with each rank, more to some than to others; returns those that are not right."""
    sizes = [0, 1, 100_000, SEGMENT_BYTES, 1, 2 * SEGMENT_BYTES + 1]
    own, wrong = state.group.rank, []
    peers = [rank for rank in state.group.members if rank != own]
    sends = [(message(own, dst, size), dst) for size in sizes[own:] for dst in peers]
    receives = [(torch.empty(size, dtype=torch.uint8), src) for src in reversed(peers) for size in sizes[src:]]
    state.channel.exchange(sends, receives)
    for received, src in receives:
        if not torch.equal(received, message(src, own, len(received))):
            wrong.append((src, len(received)))
    return wrong


def reconnect_often(state: State, numbers: range) -> str:
    """Make the connections again and again; returns by how much descriptors, threads and shared memory have grown."""
    before = ()
    for number in numbers:
        state.channel.reconnect(number)
        assert exchange_sizes(state) == []
        before = before or in_use()
    return growth_since(before)


def exchange_until_lost(state: State, peers: list[int]) -> str:
    """Exchange messages with ranks until one is lost; returns what is said then, once the others' have arrived."""
    for number in range(1 << 20):
        sent = torch.full((2 * SEGMENT_BYTES,), number % 256, dtype=torch.uint8)
        received = {peer: torch.empty_like(sent) for peer in peers}
        try:
            state.channel.exchange([(sent, peer) for peer in peers], [(to, peer) for peer, to in received.items()])
        except MessagesLost as error:
            arrived = all(torch.equal(to, sent) for peer, to in received.items() if peer not in error.peers)
            return str(error) if arrived else "a message of another rank was lost too"
    return "none was lost"


@pytest.fixture
def ranks() -> Iterator[list[Member]]:
    ranks = [Member(rank, None) for rank in MEMBERS]
    yield ranks
    for member in ranks:
        member.kill()


def on(ranks: list[Member], task: Any, *args: Any) -> list[Any]:
    for member in ranks:
        member.start(task, *args)
    return [member.result() for member in ranks]


@pytest.mark.dist
@pytest.mark.slow
def test_messages_arrive_whole_by_either_way_until_a_rank_is_killed(ranks: list[Member]) -> None:
    store = on(ranks[:1], open_store)[0]
    assert on(ranks, reform, 1, MEMBERS, store) == [(0, 1, 2)] * 3
    assert on(ranks, linked_ranks) == [[1, 2], [0, 2], [0, 1]]
    assert on(ranks, exchange_sizes) == [[]] * 3
    assert on(ranks, reconnect_often, range(4)) == [""] * 3
    assert on(ranks, linked_ranks) == [[1, 2], [0, 2], [0, 1]]

    # Rank 2 can make no memory that is shared; rank 0 and 1 still do.
    on(ranks[2:], forbid_shared_memory)
    assert on(ranks, reform, 2, MEMBERS, store) == [(0, 1, 2)] * 3
    assert on(ranks, linked_ranks) == [[1], [0], []]
    assert on(ranks, exchange_sizes) == [[]] * 3

    ranks[0].start(exchange_until_lost, [1, 2])
    ranks[1].start(exchange_until_lost, [0])
    ranks[2].start(exchange_until_lost, [0])
    time.sleep(0.3)
    assert all(member.is_busy() for member in ranks)
    ranks[1].kill()
    killed_s = time.monotonic()
    assert ranks[0].result().startswith("rank 0: no connection to rank 1 (")
    assert time.monotonic() - killed_s < 5
    assert ranks[2].is_busy(), "it has not lost rank 0"
