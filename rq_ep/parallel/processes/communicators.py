"""What the members of a group talk over in one generation: made, aborted and closed as a whole.

Axes: M members, V values, R ranks.
"""

import pickle
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.parallel.ep_group import PeerTensor
from rq_ep.parallel.host import made_in_background
from rq_ep.parallel.processes.meeting import GenerationStore, IsOver, unless_over
from rq_ep.parallel.processes.peer_connections import PeerConnections, open_sockets

ABORT_TICK = timedelta(seconds=0.2)
CONNECT_TIMEOUT_S = 30.0  # the members have met by then
NO_TIMEOUT = timedelta(days=7)  # gloo wants one


class Seat(NamedTuple):
    """A rank's place among the members of one generation."""

    rank: int
    size: int  # R
    members: tuple[int, ...]  # ranks, ascending
    generation: int = 0

    @property
    def has_holes(self) -> bool:
        return len(self.members) < self.size


class Communicators:
    """The communicators of one generation.

    `control` (gloo) is for objects, barriers and all that must not block a GPU, `data` for collectives on tensors, and
    `borrowing` for borrowed experts, which travel beside those; each channel has one of gloo. They are objects of
    torch's backends that are entered nowhere: a thread that still waits in those of a generation is none of the next
    one's business.

    Args:
        store: for these alone; all members have met there, and make them at once.
        seat: this rank's.
        device: of this rank.
        backend: of its tensors, gloo or nccl.
        timeout_s: after so many seconds without an answer a rank counts as lost.
        num_channels: to open at once.
    """

    def __init__(
        self, store: Any, seat: Seat, device: torch.device, backend: str, timeout_s: float, num_channels: int
    ) -> None:
        self.seat = seat
        self.backend = backend
        self.timeout = timedelta(seconds=timeout_s)
        self.why_aborted: str | None = None
        self.channels: list[Any] = []
        self._device = device
        self._store = store
        self._index = {rank: index for index, rank in enumerate(seat.members)}
        self._connections: list[PeerConnections] = []
        self._lock = threading.Lock()
        before = open_sockets()
        self.control = self._gloo("control")
        self.data, self.borrowing = (self._tensors(name) for name in ("data", "borrowing"))
        for _ in range(num_channels):
            self._open_channel()
        self._find_connections(before)

    # Ranks and members

    def index_of(self, rank: int) -> int:
        """A rank's number among the members.

        Raises:
            RuntimeError: it is none of them.
        """
        try:
            return self._index[rank]
        except KeyError:
            raise RuntimeError(f"rank {rank} is no member of generation {self.seat.generation}") from None

    def of_members(self, values_R: Sequence[int]) -> list[int]:
        """[M] of a value for each rank."""
        return [values_R[rank] for rank in self.seat.members] if values_R and self.seat.has_holes else list(values_R)

    def of_ranks(self, values_MV: IntArray) -> IntArray:
        """[R, V] of a row for each member: zeros for the others."""
        if not self.seat.has_holes:
            return values_MV
        values_RV = np.zeros((self.seat.size, values_MV.shape[1]), values_MV.dtype)
        values_RV[list(self.seat.members)] = values_MV
        return values_RV

    # Collectives

    def all_to_all(
        self, received: Tensor, sent: Tensor, output_splits_R: Sequence[int] = (), input_splits_R: Sequence[int] = ()
    ) -> Any:
        """Start an all-to-all of tensors, of equal parts or of as many rows of and for each rank."""
        output_splits_M, input_splits_M = self.of_members(output_splits_R), self.of_members(input_splits_R)
        return self.data.alltoall_base(received, sent, output_splits_M, input_splits_M)

    def gather_ints(self, values_V: Sequence[int], over: Any = None) -> list[list[int]]:
        """[M][V]: as many integers of each member; over `control`, or a channel.

        Each member sends its own to all: one hop, where gloo's gather goes round a ring. With four processes on two
        cores that is 1.2 ms instead of 4.8 ms.
        """
        values_MV = torch.tensor(values_V, dtype=torch.int64).repeat(len(self.seat.members), 1)
        received_MV = torch.empty_like(values_MV)
        self.finish((over or self.control).alltoall_base(received_MV, values_MV, [], []))
        return received_MV.tolist()

    def gather_objects(self, value: Any, over: Any = None) -> list[Any]:
        """[M]: the value of each member; over `control`, or a channel."""
        payload = pickle.dumps(value)
        num_members = len(self.seat.members)
        sizes = [size for (size,) in self.gather_ints([len(payload)], over)]
        sent = torch.frombuffer(bytearray(payload), dtype=torch.uint8).repeat(num_members)
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        self.finish((over or self.control).alltoall_base(received, sent, sizes, [len(payload)] * num_members))
        return [pickle.loads(piece.numpy().tobytes()) for piece in received.split(sizes)]

    def finish_tensors(self, work: Any) -> None:
        """Wait for an `all_to_all`; with NCCL, only the stream does. Raises as `finish`."""
        if self.backend == "nccl":
            work.wait()
        else:
            self.finish(work)

    def finish(self, work: Any) -> None:
        """Wait for a collective of gloo, until the generation ends: a send that is cut off then may wait for ever.

        Raises:
            RuntimeError: it has failed, or it was cut off.
        """
        while not work.is_completed():
            with suppress(RuntimeError):  # it is late, or has an error of its own, which the last wait raises
                work.wait(ABORT_TICK)
            if self.why_aborted is not None and not work.is_completed():
                raise RuntimeError(f"it was cut off: {self.why_aborted}")
        work.wait()

    # Messages

    def start_messages(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> list[Any]:
        """Start messages of `borrowing` between pairs of ranks; returns what to wait for."""
        group = self.borrowing
        if self.backend == "gloo":
            return [start() for start, _ in self._starts(group, sends, receives)]
        if not sends and not receives:
            return []
        group._start_coalescing()  # NCCL wants both ends in one launch
        for start, _ in self._starts(group, sends, receives):
            start()
        return [group._end_coalescing()]

    def exchange_messages(
        self, channel: int, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor], generation: int | None = None
    ) -> dict[int, str]:
        """Send and receive over a channel, however long it takes.

        Returns:
            The ranks out of reach, and why they are: all of them, if this is not the `generation` that is wanted.
        """
        with self._lock:
            has_ended = self.why_aborted is not None or generation not in (None, self.seat.generation)
            group = None if has_ended else self.channels[channel]
        if group is None:
            is_other = generation not in (None, self.seat.generation)
            ended = f"generation {generation} has ended" if is_other else "it could not be reached again"
            reason = self.why_aborted or ended
            return {peer: reason for _, peer in (*sends, *receives)}
        lost: dict[int, str] = {}
        works = []
        for start, peer in self._starts(group, sends, receives):
            with _noting(lost, peer):
                works.append((start(), peer))
        for work, peer in works:
            with _noting(lost, peer):
                work.wait(NO_TIMEOUT)
        return lost

    def wait(self, works: Sequence[Any]) -> None:
        """Wait for messages that were started."""
        for work in works:
            if self.backend == "gloo":
                work.wait(self.timeout)  # messages have the timeout that the connections were made with
            else:
                work.wait()  # by the stream: with a timeout the host would wait

    def _starts(
        self, group: Any, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]
    ) -> list[tuple[Callable[[], Any], int]]:
        """What starts each message, and the peer. Receives come first: with gloo a sender waits for them."""

        def receive(landing: Tensor, src: int) -> Any:
            return group.recv([landing], self.index_of(src), 0)

        def send(piece: Tensor, dst: int) -> Any:
            return group.send([piece], self.index_of(dst), 0)

        starts = [(partial(receive, landing, src), src) for landing, src in receives]
        return starts + [(partial(send, piece, dst), dst) for piece, dst in sends]

    # Life

    def open_channel(self) -> None:
        """Open one more channel; every member calls this."""
        before = open_sockets()
        self._open_channel()
        self._find_connections(before)

    def reconnect_channel(self, channel: int, number: int) -> None:
        """Make the connections of a channel anew, beside all other channels; every member calls this.

        Raises:
            RuntimeError: a member has not come in time, or the generation was aborted; the channel is closed.
        """
        with self._lock:
            before_it, self.channels[channel] = self.channels[channel], None  # kept until all members have left it

        def make(is_over: IsOver) -> _Channel:
            sockets = open_sockets()
            group = made_in_background(lambda: self._gloo(f"channel {channel}, {number}"))
            connections = PeerConnections(sockets)
            connections.keep_between(self.gather_objects(connections.ends, group))
            return _Channel(group, connections)

        made = unless_over(make, lambda: self.why_aborted is not None)
        with self._lock:
            if self.why_aborted is None:
                self.channels[channel] = made.group
                self._connections.append(made.connections)
        del before_it

    def abort(self, reason: str) -> None:
        """End what is under way, here and, as the connections end, on the other members. On any thread."""
        with self._lock:
            if self.why_aborted is not None:
                return
            self.why_aborted = reason
            for connections in self._connections:
                connections.shut_down()
            if self.backend == "nccl":
                for group in (self.data, self.borrowing):
                    group.abort()

    def close(self) -> None:
        """Free everything, once nothing is under way or it was aborted."""
        with self._lock:
            if self.backend == "nccl" and self.why_aborted is None:
                for group in (self.data, self.borrowing):
                    group.shutdown()
            self.why_aborted = self.why_aborted or "it was closed"
            self.control = self.data = self.borrowing = None
            if isinstance(self._store, GenerationStore):
                self._store.close()
            self.channels.clear()
            self._connections.clear()

    def _gloo(self, name: str) -> Any:
        connect_timeout = min(self.timeout, timedelta(seconds=CONNECT_TIMEOUT_S))
        index, num_members = self.index_of(self.seat.rank), len(self.seat.members)
        group = dist.ProcessGroupGloo(self._prefixed(name), index, num_members, connect_timeout)
        group.set_timeout(self.timeout)  # of collectives
        return group

    def _tensors(self, name: str) -> Any:
        """A communicator for tensors on the device."""
        if self.backend == "gloo":
            return self._gloo(name)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self.timeout
        index, num_members = self.index_of(self.seat.rank), len(self.seat.members)
        group: Any = dist.ProcessGroupNCCL(self._prefixed(name), index, num_members, options)
        # NCCL wants every rank at a communicator's first use; transfers concern a few.
        group.allreduce([torch.zeros(1, device=self._device)]).wait()
        return group

    def _prefixed(self, name: str) -> Any:
        return dist.PrefixStore(name, self._store)  # type: ignore[attr-defined]

    def _open_channel(self) -> None:
        # What channels carry can wait: a step's messages come first.
        name = f"channel {len(self.channels)}"
        self.channels.append(made_in_background(lambda: self._gloo(name)))

    def _find_connections(self, before: Collection[str]) -> None:
        """Find the connections to the other members; every member calls this."""
        connections = PeerConnections(before)
        connections.keep_between(self.gather_objects(connections.ends))
        with self._lock:
            self._connections.append(connections)
            if self.why_aborted is not None:
                connections.shut_down()


@dataclass
class _Channel:
    """A communicator for messages, and its connections."""

    group: Any
    connections: PeerConnections

    def close(self) -> None:
        self.group = None


@contextmanager
def _noting(lost: dict[int, str], peer: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost[peer] = str(error).partition("\n")[0]
