"""Messages between pairs of ranks, over gloo or NCCL.

Once a connection of gloo's has ended, whoever waits for a message that has not begun to travel is woken. Nobody is who
waits for one that was cut off on its way, at either end, and gloo would end all connections with a timeout of such a
wait. So nobody here waits for a message that may have been cut off: an empty one follows those from a rank to another,
and an empty answer comes back. These two have no middle in which they could be cut off.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from rq_ep.parallel.ep_group import PeerTensor
from rq_ep.parallel.processes.seat import Seat

CONTENT, ANSWER = 0, 1  # tags


class MessagesUnderWay(Protocol):
    """Messages of one rank that have started together."""

    def finish(self) -> dict[int, str]:
        """Return when all have arrived, but for those of ranks out of reach: which these are, and why.

        Raises:
            RuntimeError: with NCCL, they have failed.
        """
        ...


class GlooMessages:
    """The messages of a rank over a communicator of gloo, which nothing else uses.

    Args:
        group: the communicator.
        seat: this rank's.
        timeout: for each to come.
    """

    def __init__(self, group: Any, seat: Seat, timeout: timedelta) -> None:
        self.group = group
        self.seat = seat
        self.timeout = timeout
        self.answers: dict[int, Any] = {}  # the last one to each rank, kept until it has gone out

    def start(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> "GlooMessagesUnderWay":
        """Start messages; both ends list those between them in the same order."""
        return GlooMessagesUnderWay(self, by_peer(sends), by_peer(receives))


class GlooMessagesUnderWay:
    """`MessagesUnderWay` over gloo; keeps alive the tensors."""

    def __init__(
        self, messages: GlooMessages, sends: Mapping[int, list[Tensor]], receives: Mapping[int, list[Tensor]]
    ) -> None:
        self._messages = messages
        self._lost: dict[int, str] = {}
        self._arrivals: dict[int, list[Any]] = {}  # of each rank; the last one is empty
        self._answers: dict[int, Any] = {}
        self._sent: list[Any] = []
        group, index_of = messages.group, messages.seat.index_of
        for peer, landings in receives.items():  # before anything is sent: a sender waits for them
            with self._noting(peer):
                self._arrivals[peer] = [group.recv([to], index_of(peer), CONTENT) for to in (*landings, _empty())]
        for peer, pieces in sends.items():
            with self._noting(peer):
                self._answers[peer] = group.recv([_empty()], index_of(peer), ANSWER)
                for piece in (*pieces, _empty()):
                    self._sent.append(group.send([piece], index_of(peer), CONTENT))

    def finish(self) -> dict[int, str]:
        messages = self._messages
        for peer, arrivals in self._arrivals.items():
            with self._noting(peer):
                for arrival in reversed(arrivals):  # once the empty one is here, so are those before it
                    arrival.wait(messages.timeout)
                # The answer before this one has gone out: the peer has waited for it before it sent these messages.
                index = messages.seat.index_of(peer)
                messages.answers[peer] = messages.group.send([_empty()], index, ANSWER)
        for peer, answer in self._answers.items():
            with self._noting(peer):
                answer.wait(messages.timeout)
        return self._lost

    @contextmanager
    def _noting(self, peer: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._lost[peer] = str(error).partition("\n")[0]


class NcclMessages:
    """The messages of a rank over a communicator of NCCL.

    Args:
        group: the communicator.
        seat: this rank's.
    """

    def __init__(self, group: Any, seat: Seat) -> None:
        self.group = group
        self._seat = seat

    def start(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> "NcclMessagesUnderWay":
        """Start messages; both ends list those between them in the same order."""
        if not sends and not receives:
            return NcclMessagesUnderWay([])
        self.group._start_coalescing()  # NCCL wants both ends in one launch
        for landing, src in receives:
            self.group.recv([landing], self._seat.index_of(src), CONTENT)
        for piece, dst in sends:
            self.group.send([piece], self._seat.index_of(dst), CONTENT)
        return NcclMessagesUnderWay([self.group._end_coalescing()])


class NcclMessagesUnderWay:
    """`MessagesUnderWay` over NCCL: the stream waits for them, and not the host."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def finish(self) -> dict[int, str]:
        for work in self._works:
            work.wait()  # with a timeout the host would wait
        return {}


def by_peer(messages: Sequence[PeerTensor]) -> Mapping[int, list[Tensor]]:
    """The tensors of each rank, in their order."""
    by_peer = defaultdict(list)
    for tensor, peer in messages:
        by_peer[peer].append(tensor)
    return by_peer


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)
