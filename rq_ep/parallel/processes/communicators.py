"""What the members of a group talk over in one generation: made, aborted and closed as a whole.

Axes: M members, V values, R ranks.
"""

import pickle
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rq_ep.parallel.ep_group import PeerTensor
from rq_ep.parallel.host import made_in_background
from rq_ep.parallel.processes.meeting import GenerationStore, IsOver, unless_over
from rq_ep.parallel.processes.node_messages import ChannelMessages, open_links
from rq_ep.parallel.processes.peer_connections import PeerConnections, open_sockets
from rq_ep.parallel.processes.peer_messages import GlooMessages, NcclMessages
from rq_ep.parallel.processes.seat import Seat

ABORT_TICK = timedelta(seconds=0.2)
CONNECT_TIMEOUT_S = 30.0  # the members have met by then
NO_TIMEOUT = timedelta(days=7)  # gloo wants one


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
        self.why_aborted: str | None = None
        self._timeout = timedelta(seconds=timeout_s)
        self._device = device
        self._store = store
        self._channels: list[ChannelMessages | None] = []
        self._connections: list[PeerConnections] = []
        self._lock = threading.Lock()
        before = open_sockets()
        self.control = self._gloo("control")
        self.data, borrowing = (self._tensors(name) for name in ("data", "borrowing"))
        self.borrowing: Any  # messages
        if backend == "nccl":
            self.borrowing = NcclMessages(borrowing, seat)
        else:
            self.borrowing = GlooMessages(borrowing, seat, self._timeout)
        for _ in range(num_channels):
            self._open_channel()
        self._find_connections(before)

    # Collectives

    def all_to_all(
        self, received: Tensor, sent: Tensor, output_splits_R: Sequence[int] = (), input_splits_R: Sequence[int] = ()
    ) -> Any:
        """Start an all-to-all of tensors, of equal parts or of as many rows of and for each rank."""
        output_splits_M, input_splits_M = map(self.seat.of_members, (output_splits_R, input_splits_R))
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
        """Wait for a collective of gloo, until the generation ends: a message that is cut off then may wait for ever.

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

    def exchange_messages(
        self, channel: int, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]
    ) -> dict[int, str]:
        """Send and receive over a channel, however long it takes. Returns the ranks out of reach, and why they are."""
        with self._lock:
            messages = None if self.why_aborted is not None else self._channels[channel]
        if messages is None:
            reason = self.why_aborted or "it could not be reached again"
            return {peer: reason for _, peer in (*sends, *receives)}
        return messages.exchange(sends, receives)

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
            before_it, self._channels[channel] = self._channels[channel], None  # kept until all members have left it

        def make(is_over: IsOver) -> _Reconnected:
            sockets = open_sockets()
            group = made_in_background(lambda: self._gloo(f"channel {channel}, {number}"))
            connections = PeerConnections(sockets)
            connections.keep_between(self.gather_objects(connections.ends, group))
            return _Reconnected(self._messages(group), connections)

        made = unless_over(make, lambda: self.why_aborted is not None)
        with self._lock:
            if self.why_aborted is None:
                self._channels[channel] = made.messages
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
            for messages in self._channels:
                if messages is not None:
                    messages.shut_down()
            if self.backend == "nccl":
                for group in (self.data, self.borrowing.group):
                    group.abort()

    def close(self) -> None:
        """Free everything, once nothing is under way or it was aborted."""
        with self._lock:
            if self.backend == "nccl" and self.why_aborted is None:
                for group in (self.data, self.borrowing.group):
                    group.shutdown()
            self.why_aborted = self.why_aborted or "it was closed"
            self.control = self.data = self.borrowing = None
            if isinstance(self._store, GenerationStore):
                self._store.close()
            self._channels.clear()
            self._connections.clear()

    def _gloo(self, name: str) -> Any:
        connect_timeout = min(self._timeout, timedelta(seconds=CONNECT_TIMEOUT_S))
        index, num_members = self.seat.index_of(self.seat.rank), len(self.seat.members)
        group = dist.ProcessGroupGloo(self._prefixed(name), index, num_members, connect_timeout)
        group.set_timeout(self._timeout)  # of collectives
        return group

    def _tensors(self, name: str) -> Any:
        """A communicator for tensors on the device."""
        if self.backend == "gloo":
            return self._gloo(name)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        index, num_members = self.seat.index_of(self.seat.rank), len(self.seat.members)
        group: Any = dist.ProcessGroupNCCL(self._prefixed(name), index, num_members, options)
        # NCCL wants every rank at a communicator's first use; transfers concern a few.
        group.allreduce([torch.zeros(1, device=self._device)]).wait()
        return group

    def _prefixed(self, name: str) -> Any:
        return dist.PrefixStore(name, self._store)  # type: ignore[attr-defined]

    def _open_channel(self) -> None:
        # What channels carry can wait: a step's messages come first.
        name = f"channel {len(self._channels)}"
        self._channels.append(self._messages(made_in_background(lambda: self._gloo(name))))

    def _messages(self, group: Any) -> ChannelMessages:
        """Those of a channel, over a communicator of its own; every member calls this."""
        links = open_links(self.seat, lambda value: self.gather_objects(value, group))
        return ChannelMessages(links, GlooMessages(group, self.seat, NO_TIMEOUT))

    def _find_connections(self, before: Collection[str]) -> None:
        """Find the connections to the other members; every member calls this."""
        connections = PeerConnections(before)
        connections.keep_between(self.gather_objects(connections.ends))
        with self._lock:
            self._connections.append(connections)
            if self.why_aborted is not None:
                connections.shut_down()


@dataclass
class _Reconnected:
    """The messages of a channel, and the connections of its communicator."""

    messages: ChannelMessages | None
    connections: PeerConnections

    def close(self) -> None:
        self.messages = None
