"""Every rank in one process: a thread each and a baton, so that one computes at a time and its time is its own."""

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


def run_local(num_ranks: int, fn: Callable[["LocalGroup"], T], device: str | torch.device = "cpu") -> list[T]:
    """Run `fn` on every rank of a group inside this process; returns what each rank returned.

    An exception on one rank ends all and is raised here.
    """
    return LocalWorld(num_ranks, device).run(fn)


def single_group(device: str | torch.device = "cpu") -> "LocalGroup":
    """A group of one rank, without processes or threads."""
    return LocalWorld(1, device).groups[0]


class LocalWorld:
    """The groups of all ranks of one process; they can be kept and run again and again."""

    def __init__(self, num_ranks: int, device: str | torch.device = "cpu") -> None:
        self.baton = _Baton(num_ranks)
        self.groups = tuple(LocalGroup(rank, num_ranks, torch.device(device), self.baton) for rank in range(num_ranks))

    def run(self, fn: Callable[["LocalGroup"], T]) -> list[T]:
        """Call `fn` with each rank's group. Gradient and inference mode and stream of the caller hold on every rank."""
        if len(self.groups) == 1:
            return [fn(self.groups[0])]
        baton = self.baton
        baton.reset()
        results: dict[int, T] = {}
        has_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        device = self.groups[0].device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # threads begin with another

        def body(group: LocalGroup) -> None:
            baton.begin(group.rank)
            on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
            try:
                if baton.error is None:
                    with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad), on_stream:
                        results[group.rank] = fn(group)
            except _Ended:
                pass
            except BaseException as error:
                error.add_note(f"on rank {group.rank} of {group.size} in one process")
                baton.error = baton.error or error
            finally:
                baton.end(group.rank)

        threads = [Thread(target=body, args=(group,), daemon=True) for group in self.groups]
        for thread in threads:
            thread.start()
        baton.turns[0].release()
        for thread in threads:
            thread.join()
        if baton.error is not None:
            raise baton.error
        return [results[rank] for rank in range(len(self.groups))]


class LocalGroup:
    """One rank's side of a group that lives in one process."""

    backend = "local"

    def __init__(self, rank: int, size: int, device: torch.device, baton: "_Baton") -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.receive_buffers = ReceiveBuffers(device)
        self._baton = baton

    def gather_counts(self, counts_N: Tensor) -> IntArray:
        return np.stack(self._baton.meet(self.rank, "gather of counts", counts_N.cpu().numpy()))

    def all_to_all(self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int]) -> Tensor:
        return self.start_all_to_all(send, input_splits, output_splits).wait()

    def start_all_to_all(
        self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> "LocalArrival":
        check_splits(send, input_splits, output_splits, self.size)
        number = self._baton.bring(self.rank, "all-to-all", torch.split(send, list(input_splits)))
        return LocalArrival(self.rank, self._baton, number, output_splits, out)

    def start_transfers(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> "LocalTransfers":
        for piece, dst in sends:
            self._baton.post(self.rank, dst, piece)
        return LocalTransfers(self.rank, self._baton, receives)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._baton.meet(self.rank, "gather of objects", value)

    def barrier(self) -> None:
        self._baton.meet(self.rank, "barrier", None)

    def clock(self) -> float:
        return time.perf_counter() - self._baton.away_s[self.rank]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class LocalArrival:
    """Rows that all ranks have put down or will; copied when they are waited for."""

    rank: int
    baton: "_Baton"
    number: int
    output_splits: Sequence[int]
    out: Tensor | None

    def wait(self) -> Tensor:
        pieces = [pieces[self.rank] for pieces in self.baton.fetch(self.rank, self.number)]
        if [len(piece) for piece in pieces] != list(self.output_splits):
            found = [len(piece) for piece in pieces]
            raise ValueError(
                f"rank {self.rank} expects {list(self.output_splits)} rows of the ranks, but they send {found}"
            )
        return torch.cat(pieces) if self.out is None else torch.cat(pieces, out=self.out)


@dataclass(frozen=True)
class LocalTransfers:
    """Messages of one rank's neighbours, copied when they are waited for."""

    rank: int
    baton: "_Baton"
    receives: Sequence[PeerTensor]

    def wait(self) -> None:
        for wanted, src in self.receives:
            wanted.copy_(self.baton.take(src, self.rank))


class _Ended(BaseException):
    """Another rank failed: leave this one's thread."""


class _Baton:
    """Whose turn it is, and what the ranks have put down for each other. Only the rank whose turn it is touches it."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.away_s = [0.0] * num_ranks  # time each rank spent without the baton
        self.reset()

    def reset(self) -> None:
        self.turns = [Semaphore(0) for _ in range(self.num_ranks)]
        self.error: BaseException | None = None
        self._has_ended = [False] * self.num_ranks
        self._waits_for = ["its turn"] * self.num_ranks
        self._num_met = [0] * self.num_ranks
        self._met: dict[int, dict[int, tuple[str, Any]]] = {}  # number of the meeting -> rank -> what it brings
        self._num_left: dict[int, int] = {}
        self._posted: dict[tuple[int, int], deque[Tensor]] = {}
        self._idle_passes = 0

    def begin(self, rank: int) -> None:
        self.turns[rank].acquire()

    def end(self, rank: int) -> None:
        self._has_ended[rank] = True
        self._waits_for[rank] = "nothing, it has ended"
        self._idle_passes = 0
        if (following := self._following(rank)) is not None:
            self.turns[following].release()

    def meet(self, rank: int, operation: str, value: Any) -> list[Any]:
        """Put down a value for a collective and return every rank's, once all have come."""
        return self.fetch(rank, self.bring(rank, operation, value))

    def bring(self, rank: int, operation: str, value: Any) -> int:
        """Put down a value for a collective; returns the number under which to fetch what the others bring."""
        number = self._num_met[rank]
        self._num_met[rank] += 1
        self._met.setdefault(number, {})[rank] = (operation, value)
        self._idle_passes = 0
        return number

    def fetch(self, rank: int, number: int) -> list[Any]:
        brought = self._met[number]
        while len(brought) < self.num_ranks:
            self._pass(rank, brought[rank][0])
        if len({name for name, _ in brought.values()}) > 1:
            calls = ", ".join(f"rank {other}: {brought[other][0]}" for other in sorted(brought))
            raise RankFailure(f"ranks call different collectives ({calls})")
        self._num_left[number] = self._num_left.get(number, 0) + 1
        if self._num_left[number] == self.num_ranks:
            del self._met[number], self._num_left[number]
        return [brought[other][1] for other in range(self.num_ranks)]

    def post(self, src: int, dst: int, piece: Tensor) -> None:
        self._posted.setdefault((src, dst), deque()).append(piece)
        self._idle_passes = 0

    def take(self, src: int, dst: int) -> Tensor:
        waiting = self._posted.setdefault((src, dst), deque())
        while not waiting:
            self._pass(dst, f"an expert from rank {src}")
        self._idle_passes = 0
        return waiting.popleft()

    def _pass(self, rank: int, waits_for: str) -> None:
        """Let the others go on; return when it is this rank's turn again."""
        self._waits_for[rank] = waits_for
        self._idle_passes += 1
        following = self._following(rank)
        if following is None or self._idle_passes > 2 * self.num_ranks:
            waits = ", ".join(f"rank {other} for {what}" for other, what in enumerate(self._waits_for))
            raise RankFailure(f"rank {rank} waits in vain ({waits})")
        left_s = time.perf_counter()
        self.turns[following].release()
        self.turns[rank].acquire()
        self.away_s[rank] += time.perf_counter() - left_s
        if self.error is not None:
            raise _Ended

    def _following(self, rank: int) -> int | None:
        for step in range(1, self.num_ranks):
            other = (rank + step) % self.num_ranks
            if not self._has_ended[other]:
                return other
        return None
