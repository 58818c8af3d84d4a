"""A rank of a group whose members change, in a process of its own, that does what a test asks of it."""

import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from rq_ep.parallel import TorchGroup
from tests.forkserver import forkserver

NUM_RANKS = 4
TIMEOUT_S = 60


class Member:
    """The test's end. One task is asked for at a time; announcements may come meanwhile.

    Args:
        rank: the rank's number.
        port: where all ranks meet at first; None: this one starts alone.
    """

    def __init__(self, rank: int, port: int | None) -> None:
        context = forkserver()
        self._pipe, other = context.Pipe()
        self.rank = rank
        self.process = context.Process(target=_run, args=(other, rank, port), daemon=True)
        self.process.start()
        other.close()

    def start(self, task: Callable[..., Any], *args: Any) -> None:
        self._pipe.send((task, args))

    def result(self) -> Any:
        """Of the task; an error is a text."""
        assert self._pipe.poll(TIMEOUT_S), f"rank {self.rank} does not answer"
        return self._pipe.recv()

    def is_busy(self) -> bool:
        """Whether the task asked for is not done."""
        return not self._pipe.poll()

    def announce(self, generation: int) -> None:
        """Tell the rank of a newer generation, and have it abort what is older."""
        self._pipe.send(generation)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class State:
    """The rank's end."""

    def __init__(self, rank: int, port: int | None) -> None:
        torch.set_num_threads(1)
        self.newest = 0  # generation announced
        if port is None:
            self.group = TorchGroup.alone(rank, NUM_RANKS, "cpu", timeout_s=TIMEOUT_S)
        else:
            settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS}
            os.environ |= {key: str(value) for key, value in settings.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.group = TorchGroup.from_environment("cpu", timeout_s=TIMEOUT_S)
        self.channel = self.group.open_host_channel()
        self.channel_failure: list[str] = []


def _run(pipe: Connection, rank: int, port: int | None) -> None:
    state = State(rank, port)
    tasks: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        while True:
            try:
                message = pipe.recv()
            except EOFError:
                os._exit(0)
            if isinstance(message, int):
                state.newest = message
                state.group.abort(below=message)
            else:
                tasks.put(message)

    threading.Thread(target=read, daemon=True).start()
    while True:
        task, args = tasks.get()
        try:
            result = task(state, *args)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        pipe.send(result)


# Tasks


def open_store(state: State) -> tuple[str, int]:
    return state.group.open_store()


def reform(state: State, generation: int, members: list[int], store: tuple[str, int]) -> tuple[int, ...]:
    state.newest = max(state.newest, generation)
    state.group.reform(generation, members, store, lambda: state.newest > generation)
    return state.group.members


def reform_often(state: State, generations: range, members: list[int], store: tuple[str, int]) -> str:
    """Form many generations; returns by how much file descriptors, threads and shared memory have grown."""
    reform(state, generations[0], members, store)
    time.sleep(0.5)  # what is old closes beside
    before = in_use()
    state.group.barrier()  # the next generation closes connections of this one
    for generation in generations[1:]:
        reform(state, generation, members, store)
        state.group.barrier()
    return growth_since(before)


def growth_since(before: tuple[int, int, int]) -> str:
    """What this process has in use beyond `before`, once what ends by itself has had time to; empty if nothing."""
    for _ in range(100):
        after = in_use()
        if all(now <= then for now, then in zip(after, before, strict=True)):
            return ""
        time.sleep(0.1)
    return f"{before} before, {after} after"


def in_use() -> tuple[int, int, int]:
    """File descriptors, threads and shared memory of this process."""
    num_shared = Path("/proc/self/maps").read_text().count("/memfd:rq_ep")
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), num_shared


def everything(state: State) -> dict[str, Any]:
    """Each collective and message once."""
    group, members = state.group, state.group.members
    splits = [rank + 1 if rank in members else 0 for rank in range(NUM_RANKS)]  # rank r gets r + 1 rows of each
    own = [group.rank + 1 if rank in members else 0 for rank in range(NUM_RANKS)]
    rows = group.all_to_all(torch.full((sum(splits), 2), group.rank), splits, own)
    following = members[(members.index(group.rank) + 1) % len(members)]
    preceding = members[members.index(group.rank) - 1]
    borrowed, message = torch.zeros(1000, dtype=torch.uint8), torch.zeros(1000, dtype=torch.uint8)
    sent = torch.full_like(borrowed, group.rank)
    group.start_transfers([(sent, following)], [(borrowed, preceding)]).wait()
    state.channel.exchange([(sent, preceding)], [(message, following)])
    group.barrier()
    return {
        "counts": group.gather_counts(torch.tensor([group.rank + 1, 5])).tolist(),
        "rows": rows[:, 0].tolist(),
        "borrowed": set(borrowed.tolist()) == {preceding},
        "message": set(message.tolist()) == {following},
        "objects": group.all_gather_object({"rank": group.rank}),
        "ints": group.gather_ints([group.rank, 7], "test"),
    }


def gather_counts(state: State) -> Any:
    return state.group.gather_counts(torch.zeros(3, dtype=torch.int64)).tolist()


def all_to_all(state: State) -> Any:
    return state.group.all_to_all(torch.zeros(NUM_RANKS, 2), [1] * NUM_RANKS, [1] * NUM_RANKS).tolist()


def borrow(state: State, src: int) -> None:
    state.group.start_transfers([], [(torch.zeros(1000, dtype=torch.uint8), src)]).wait()


def start_on_channel(state: State, src: int) -> None:
    """Wait for a message on a thread."""
    state.channel_failure = []

    def body() -> None:
        try:
            state.channel.exchange([], [(torch.zeros(1000, dtype=torch.uint8), src)])
        except Exception as error:
            state.channel_failure.append(f"{type(error).__name__}: {error}")

    state.channel_thread = threading.Thread(target=body, daemon=True)
    state.channel_thread.start()


def channel_failure(state: State) -> str:
    state.channel_thread.join(TIMEOUT_S)
    return state.channel_failure[0]


def wrong_peer(state: State, rank: int) -> list[str]:
    """What comes of addressing a rank that is no member, each way."""
    splits = [1 if other == rank else 0 for other in range(NUM_RANKS)]
    piece = torch.zeros(8, dtype=torch.uint8)
    texts = []
    for call in (
        lambda: state.group.all_to_all(torch.zeros(1, 2), splits, [0] * NUM_RANKS),
        lambda: state.group.start_transfers([(piece, rank)], []).wait(),
        lambda: state.channel.exchange([(piece, rank)], []),
    ):
        try:
            call()
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts
