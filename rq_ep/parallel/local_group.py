"""A group whose ranks are threads of one process that take turns, so that a rank's time is its own."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Semaphore, Thread
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.parallel.ep_group import PeerTensor, RankFailure, check_splits
from rq_ep.parallel.receive_buffers import ReceiveBuffers

T = TypeVar("T")


def run_local(
    num_ranks: int,
    fn: Callable[["LocalGroup"], T],
    device: str | torch.device = "cpu",
    members: Sequence[int] | None = None,
) -> list[T]:
    """Run `fn` on every member of a group inside this process; returns each member's result."""
    return LocalWorld(num_ranks, device, members=members).run(fn)


def single_group(device: str | torch.device = "cpu") -> "LocalGroup":
    """A group of one rank, without processes or threads."""
    return LocalWorld(1, device).groups[0]


class LocalWorld:
    """The groups of all members of one process; they can be kept and run again and again."""

    def __init__(
        self,
        num_ranks: int,
        device: str | torch.device = "cpu",
        clock: Callable[[], float] = time.perf_counter,
        members: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            num_ranks: R.
            device: of all ranks.
            clock: seconds of the process; a rank's clock leaves out the turns of the others.
            members: ranks, ascending; default: all.
        """
        members = tuple(range(num_ranks) if members is None else members)
        self._scheduler = _Scheduler(num_ranks, members, clock)
        self.groups = tuple(LocalGroup(rank, num_ranks, torch.device(device), self._scheduler) for rank in members)

    def run(self, fn: Callable[["LocalGroup"], T]) -> list[T]:
        """Call `fn` with each rank's group, in the gradient mode, inference mode and stream of the caller.

        An exception on one rank ends all and is raised here.
        """
        if len(self.groups) == 1:
            return [fn(self.groups[0])]
        scheduler = self._scheduler
        scheduler.reset()
        results: dict[int, T] = {}
        has_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        device = self.groups[0].device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # threads begin with another

        def body(group: LocalGroup) -> None:
            scheduler.begin(group.rank)
            on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
            try:
                if scheduler.error is None:
                    with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad), on_stream:
                        results[group.rank] = fn(group)
            except _OtherRankFailed:
                pass
            except BaseException as error:
                error.add_note(f"on rank {group.rank} of {group.size} in one process")
                scheduler.error = scheduler.error or error
            finally:
                scheduler.end(group.rank)

        threads = [Thread(target=body, args=(group,), daemon=True) for group in self.groups]
        for thread in threads:
            thread.start()
        scheduler.turns[self.groups[0].rank].release()
        for thread in threads:
            thread.join()
        if scheduler.error is not None:
            raise scheduler.error
        return [results[group.rank] for group in self.groups]


class LocalGroup:
    """One rank's side of a group that lives in one process."""

    backend = "local"

    def __init__(self, rank: int, size: int, device: torch.device, scheduler: "_Scheduler") -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.members = scheduler.members
        self.receive_buffers = ReceiveBuffers(device)
        self._scheduler = scheduler

    def gather_counts(self, counts_V: Tensor) -> IntArray:
        counts_R = self._scheduler.gather(self.rank, "gather of counts", counts_V.cpu().numpy())
        nothing_V = np.zeros(len(counts_V), np.int64)
        return np.stack([nothing_V if counts_V is None else counts_V for counts_V in counts_R])

    def all_to_all(self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int]) -> Tensor:
        return self.start_all_to_all(send, input_splits, output_splits).wait()

    def start_all_to_all(
        self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> "LocalArrival":
        check_splits(send, input_splits, output_splits, self.size, self.members)
        number = self._scheduler.contribute(self.rank, "all-to-all", torch.split(send, list(input_splits)))
        return LocalArrival(self.rank, self._scheduler, number, output_splits, out)

    def start_transfers(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> "LocalTransfers":
        for piece, dst in sends:
            self._scheduler.send(self.rank, dst, piece)
        return LocalTransfers(self.rank, self._scheduler, receives)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._scheduler.gather(self.rank, "gather of objects", value)

    def barrier(self) -> None:
        self._scheduler.gather(self.rank, "barrier", None)

    def clock(self) -> float:
        return self._scheduler.seconds(self.rank)

    def close(self) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class LocalArrival:
    """Rows on their way from all ranks; copied when they are waited for."""

    rank: int
    scheduler: "_Scheduler"
    number: int
    output_splits: Sequence[int]
    out: Tensor | None

    def wait(self) -> Tensor:
        of_ranks = self.scheduler.collect(self.rank, self.number)
        sent = [0 if pieces is None else len(pieces[self.rank]) for pieces in of_ranks]
        pieces = [pieces[self.rank] for pieces in of_ranks if pieces is not None]
        if sent != list(self.output_splits):
            raise ValueError(
                f"rank {self.rank} expects {list(self.output_splits)} rows of the ranks, but they send {sent}"
            )
        return torch.cat(pieces) if self.out is None else torch.cat(pieces, out=self.out)


@dataclass(frozen=True)
class LocalTransfers:
    """Messages on their way from other ranks; copied when they are waited for."""

    rank: int
    scheduler: "_Scheduler"
    receives: Sequence[PeerTensor]

    def wait(self) -> None:
        for landing, src in self.receives:
            landing.copy_(self.scheduler.receive(src, self.rank))


class _OtherRankFailed(BaseException):
    """Ends the thread of a rank after another one failed."""


class _Scheduler:
    """Cooperative scheduling of the ranks' threads, their collectives and messages. A rank waits by ending its turn.

    Only the rank whose turn it is touches the state.
    """

    def __init__(self, num_ranks: int, members: tuple[int, ...], clock: Callable[[], float]) -> None:
        self.num_ranks = num_ranks
        self.members = members
        self.clock = clock
        self.others_s = [0.0] * num_ranks  # time of the other ranks' turns
        self.reset()

    def reset(self) -> None:
        self.turns = [Semaphore(0) for _ in range(self.num_ranks)]
        self.error: BaseException | None = None
        self._has_ended = [rank not in self.members for rank in range(self.num_ranks)]
        self._waits_for = ["its turn"] * self.num_ranks
        self._num_collectives = [0] * self.num_ranks  # that each rank has joined
        self._contributions: dict[int, dict[int, tuple[str, Any]]] = {}  # collective -> rank -> operation, value
        self._num_collected: dict[int, int] = {}  # collective -> ranks that have its result
        self._messages: dict[tuple[int, int], deque[Tensor]] = {}  # (source, destination) -> not yet received
        self._idle_turns = 0  # since anything happened that a rank may wait for

    def begin(self, rank: int) -> None:
        self.turns[rank].acquire()

    def end(self, rank: int) -> None:
        self._has_ended[rank] = True
        self._waits_for[rank] = "nothing, it has ended"
        self._idle_turns = 0
        if (following := self._following(rank)) is not None:
            self.turns[following].release()

    def seconds(self, rank: int) -> float:
        """Time that passed in a rank's own turns."""
        return self.clock() - self.others_s[rank]

    def gather(self, rank: int, operation: str, value: Any) -> list[Any]:
        """Every rank's value, once all members have joined the collective; None for the others."""
        return self.collect(rank, self.contribute(rank, operation, value))

    def contribute(self, rank: int, operation: str, value: Any) -> int:
        """Join the next collective with a value; returns the collective's number."""
        number = self._num_collectives[rank]
        self._num_collectives[rank] += 1
        self._contributions.setdefault(number, {})[rank] = (operation, value)
        self._idle_turns = 0
        return number

    def collect(self, rank: int, number: int) -> list[Any]:
        """Every rank's value of a collective, once all members have joined it; None for the others."""
        contributions = self._contributions[number]
        while len(contributions) < len(self.members):
            self._end_turn(rank, contributions[rank][0])
        if len({operation for operation, _ in contributions.values()}) > 1:
            calls = ", ".join(f"rank {other}: {contributions[other][0]}" for other in sorted(contributions))
            raise RankFailure(f"ranks call different collectives ({calls})")
        self._num_collected[number] = self._num_collected.get(number, 0) + 1
        if self._num_collected[number] == len(self.members):
            del self._contributions[number], self._num_collected[number]
        return [contributions[other][1] if other in contributions else None for other in range(self.num_ranks)]

    def send(self, src: int, dst: int, message: Tensor) -> None:
        self._messages.setdefault((src, dst), deque()).append(message)
        self._idle_turns = 0

    def receive(self, src: int, dst: int) -> Tensor:
        messages = self._messages.setdefault((src, dst), deque())
        while not messages:
            self._end_turn(dst, f"an expert from rank {src}")
        self._idle_turns = 0
        return messages.popleft()

    def _end_turn(self, rank: int, waits_for: str) -> None:
        """Let the other ranks continue; return when it is this rank's turn again."""
        self._waits_for[rank] = waits_for
        self._idle_turns += 1
        following = self._following(rank)
        if following is None or self._idle_turns > 2 * self.num_ranks:
            waits = ", ".join(f"rank {other} for {self._waits_for[other]}" for other in self.members)
            raise RankFailure(f"rank {rank} waits in vain ({waits})")
        end_s = self.clock()
        self.turns[following].release()
        self.turns[rank].acquire()
        self.others_s[rank] += self.clock() - end_s
        if self.error is not None:
            raise _OtherRankFailed

    def _following(self, rank: int) -> int | None:
        for step in range(1, self.num_ranks):
            other = (rank + step) % self.num_ranks
            if not self._has_ended[other]:
                return other
        return None
