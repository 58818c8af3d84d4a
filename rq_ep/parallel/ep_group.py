"""The interface of an expert-parallel group: the collectives and messages that a rank needs.

Axes: V values that a rank counts.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.parallel.receive_buffers import ReceiveBuffers

PeerTensor = tuple[Tensor, int]  # a packed expert, uint8 [nbytes], and the rank that it goes to or comes from


class RankFailure(RuntimeError):
    """A rank cannot go on, by its own fault or another's; the message names the rank and its operation."""


class PeerLost(RankFailure):
    """A collective could not be finished: another rank has ended or does not answer."""


class Superseded(PeerLost):
    """A generation of the group was given up before it had formed: a newer one has been announced."""


class MessagesLost(PeerLost):
    """Messages from or to some ranks are lost, and none will come any more.

    Args:
        text: names this rank and the reason.
        peers: those ranks.
    """

    def __init__(self, text: str, peers: Collection[int]) -> None:
        super().__init__(text)
        self.peers = frozenset(peers)


class Transfers(Protocol):
    """Point-to-point messages under way."""

    def wait(self) -> None:
        """Return when all messages are received and those sent may be overwritten."""
        ...


class Arrival(Protocol):
    """An all-to-all under way."""

    def wait(self) -> Tensor:
        """The rows that arrived. Those sent may be overwritten when every rank has returned from this."""
        ...


class EPGroup(Protocol):
    """One rank's side of the group that shares a model's experts. Every member makes the same calls in the same order.

    Ranks keep their numbers for ever. Those that take part now are the members; the others are holes, which send and
    get nothing. Collectives raise `PeerLost` when another member has ended or does not answer in time.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...  # R, holes among them
    @property
    def members(self) -> tuple[int, ...]: ...  # ascending
    @property
    def device(self) -> torch.device: ...
    @property
    def backend(self) -> str: ...  # gloo, nccl or local
    @property
    def receive_buffers(self) -> ReceiveBuffers: ...

    def gather_counts(self, counts_V: Tensor) -> IntArray:
        """[R, V] int64 on the host: the counts of each rank, the same on every rank; zeros for holes.

        Waits for the device.
        """
        ...

    def all_to_all(self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int]) -> Tensor:
        """Send `input_splits[r]` rows to rank r and return the rows of all ranks, `output_splits[r]` of rank r.

        Raises:
            ValueError: the splits do not fit this group or `send`, or a hole is to send or get rows.
        """
        ...

    def start_all_to_all(
        self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> Arrival:
        """`all_to_all` that returns at once; the rows arrive in `out`, contiguous, by default in a new tensor."""
        ...

    def start_transfers(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> Transfers:
        """Start messages between pairs of ranks. Both ends list the messages between them in the same order."""
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks; None for holes."""
        ...

    def barrier(self) -> None: ...

    def clock(self) -> float:
        """Seconds. The difference of two readings is time of this rank, without other ranks of the same process."""
        ...

    def close(self) -> None:
        """Free what the ranks talk over; every member calls this when nothing is under way."""
        ...

    def end(self) -> None:
        """`close` where a collective may be under way: it is cut off, here and on the other members."""
        ...


class HostChannel(Protocol):
    """Messages beside the collectives, through host memory. One thread of each rank uses its end at a time."""

    @property
    def rank(self) -> int: ...

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        """Send and receive tensors on the host; return when all have arrived.

        Both ends list the messages between them in the same order.

        Raises:
            MessagesLost: ranks are out of reach; what goes to and comes from the others has arrived all the same.
        """
        ...

    def reconnect(self, number: int) -> None:
        """Leave the connections behind, some of which may be broken, and make new ones.

        Every rank calls this, with nothing under way on it, and waits for the others for a while.

        Args:
            number: of the new connections, another one at every call, and the same on all ranks.

        Raises:
            MessagesLost: they cannot be made; all ranks are out of reach until another call.
        """
        ...


def check_splits(
    send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], size: int, members: Sequence[int]
) -> None:
    """Raise unless the splits fit: some backends end the process on a mismatch instead."""
    if len(input_splits) != size or len(output_splits) != size:
        raise ValueError(f"{len(input_splits)} input and {len(output_splits)} output splits for {size} ranks")
    if min(*input_splits, *output_splits) < 0 or sum(input_splits) != len(send):
        raise ValueError(f"input splits {input_splits}, output splits {output_splits} do not fit {len(send)} rows")
    if len(members) < size:
        holes = [rank for rank in range(size) if (input_splits[rank] or output_splits[rank]) and rank not in members]
        if holes:
            raise ValueError(f"rank {holes[0]} is no member, and cannot send or get rows")
