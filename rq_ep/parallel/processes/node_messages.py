"""The messages of a channel: through shared memory between ranks of one node, over gloo between others.

Two ranks of a node have a segment of memory for each direction, and a socket. The sender copies into its segment and
says with a byte that something is there; the receiver copies it out and says with a byte that it was read. With 4 MiB
that takes half of gloo's CPU, and with small messages a third. When a rank ends, however it does, its socket is closed,
which wakes whoever waits for it; what was announced is whole.

All copies and waits of an exchange are listed first and then made by one call outside of the interpreter: a thread that
came back to it after each would make those wait that compute a step there.

Nothing of this has a name in any folder: the kernel frees it with the last process that has it open. Whether a rank
is on this node is found out by trying: its socket has a random name, which only those reach that share its network
namespace, and the memory is handed over through the socket.

Axes: M members.
"""

import mmap
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from io import FileIO
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rq_ep.parallel.ep_group import PeerTensor
from rq_ep.parallel.processes.link_operations import Operation, copy, hear, say, undone_of
from rq_ep.parallel.processes.peer_messages import GlooMessages, by_peer
from rq_ep.parallel.processes.seat import Seat

SEGMENT_BYTES = 1 << 20  # as much as stays in the caches of two cores: with 4 MiB a copy takes a tenth longer
TOKEN_BYTES = 16
UNREACHABLE = (AttributeError, OSError, TypeError, ValueError)

Bytes = NDArray[np.uint8]


class MessagePart(NamedTuple):
    """A part of a message, and its place in a segment."""

    place: int
    address: int
    nbytes: int


Portion = list[MessagePart]


class NodeLink:
    """What a rank and another of its node share.

    Args:
        connection: to the other; it becomes this link's.
        segments: [2, SEGMENT_BYTES], which the rank that has made the connection, and the other, write to.
        has_connected: whether this rank is that one.
    """

    def __init__(self, connection: socket.socket, segments: Bytes, has_connected: bool) -> None:
        self._connection = connection.detach()  # the descriptor
        self._segments = segments  # kept alive
        outgoing, incoming = segments if has_connected else segments[::-1]
        self._outgoing, self._incoming = outgoing.ctypes.data, incoming.ctypes.data
        self._say, self._hear = say(self._connection), hear(self._connection)

    def __del__(self) -> None:
        os.close(self._connection)  # nothing waits there any more

    def writing(self, portion: Portion) -> list[Operation]:
        """Put a portion into the segment, whose last one was read, and announce it."""
        copies = [copy(self._outgoing + place, address, nbytes) for place, address, nbytes in portion]
        return [*copies, self._say]

    def reading(self, portion: Portion) -> list[Operation]:
        """Wait for a portion, take it out of the segment, and confirm that."""
        copies = [copy(address, self._incoming + place, nbytes) for place, address, nbytes in portion]
        return [self._hear, *copies, self._say]

    def hearing(self) -> list[Operation]:
        """Wait until a portion was read, or the link was accepted."""
        return [self._hear]

    def accept(self) -> None:
        """Have the other know that the link is made.

        Raises:
            OSError: the other is lost.
        """
        os.write(self._connection, b"\0")

    def shut_down(self) -> None:
        """End the connection under those that wait, at both ends, on any thread."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


class ChannelMessages:
    """The messages of a channel.

    Args:
        links: to ranks of the same node.
        messages: with all others.
    """

    def __init__(self, links: dict[int, NodeLink], messages: GlooMessages) -> None:
        self.links = links
        self._messages = messages
        self._lost: dict[int, str] = {}  # of the linked ranks; they may still read what was written last

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> dict[int, str]:
        """Send and receive; both ends list the messages between them in the same order.

        Returns:
            The ranks out of reach, and why they are; what goes to and comes from the others has arrived.
        """
        (to_linked, to_others), (from_linked, from_others) = map(self._divided, (sends, receives))
        over_gloo = self._messages.start(to_others, from_others)
        operations: list[tuple[int, Operation]] = []  # with the ranks that they are of
        for writes, reads in zip_longest(_rounds(to_linked), _rounds(from_linked), fillvalue=()):
            # A rank waits for nothing that another one does in a later round.
            operations += [(peer, one) for peer, portion in writes for one in self.links[peer].writing(portion)]
            operations += [(peer, one) for peer, portion in reads for one in self.links[peer].reading(portion)]
            operations += [(peer, one) for peer, _ in writes for one in self.links[peer].hearing()]
        self._carry_out(operations)
        lost = {peer: reason for peer, reason in self._lost.items() if peer in to_linked or peer in from_linked}
        return lost | over_gloo.finish()

    def _carry_out(self, operations: Sequence[tuple[int, Operation]]) -> None:
        """Make the operations in their order, without those of ranks that are lost."""
        while True:
            operations = [(peer, one) for peer, one in operations if peer not in self._lost]
            number, reason = undone_of([one for _, one in operations])
            if number == len(operations):
                return
            self._lost[operations[number][0]] = reason
            operations = operations[number:]

    def shut_down(self) -> None:
        """End the links under those that wait, at both ends, on any thread."""
        for link in self.links.values():
            link.shut_down()

    def _divided(self, messages: Sequence[PeerTensor]) -> tuple[dict[int, list[Portion]], list[PeerTensor]]:
        """What travels through shared memory with each rank, and the messages over gloo."""
        linked = by_peer([message for message in messages if message[1] in self.links])
        others = [message for message in messages if message[1] not in self.links]
        return {peer: portions(of_peer) for peer, of_peer in linked.items()}, others


def _rounds(portions_of: Mapping[int, list[Portion]]) -> Iterator[list[tuple[int, Portion]]]:
    """The portions that travel together: the first of each rank, then the second."""
    for number in range(max(map(len, portions_of.values()), default=0)):
        yield [(peer, of_peer[number]) for peer, of_peer in portions_of.items() if number < len(of_peer)]


def portions(tensors: Iterable[Tensor]) -> list[Portion]:
    """Cut the messages from a rank to another into portions that fit a segment; both do it alike."""
    filled: list[Portion] = [[]]
    stop = 0
    for tensor in tensors:
        assert tensor.is_contiguous()
        address, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        while address < end:
            if stop == SEGMENT_BYTES:
                filled.append([])
                stop = 0
            nbytes = min(end - address, SEGMENT_BYTES - stop)
            filled[-1].append(MessagePart(stop, address, nbytes))
            address, stop = address + nbytes, stop + nbytes
    return filled


def open_links(seat: Seat, gather: Callable[[Any], list[Any]]) -> dict[int, NodeLink]:
    """Find the other ranks of this node and make the links with them; every member calls this.

    Args:
        seat: this rank's.
        gather: the values of all members, [M].

    Returns:
        The links, by rank. The other end of each has made it too.
    """
    with _listener(len(seat.members)) or nullcontext() as listener:
        names_M = gather(listener and listener.getsockname())
        made: dict[int, tuple[NodeLink, bytes]] = {}
        for peer, name in zip(seat.members[: seat.index], names_M, strict=False):  # others connect to this rank
            with suppress(*UNREACHABLE):
                made[peer] = _connect(name)
        tokens_M = gather({peer: token for peer, (_, token) in made.items()})
        ranks = {
            of_peer[seat.rank]: peer
            for peer, of_peer in zip(seat.members, tokens_M, strict=True)
            if seat.rank in of_peer
        }
        links = _accept(listener, ranks) if listener else {}
    for peer, (link, _) in made.items():
        if not undone_of(link.hearing())[1]:  # it was accepted
            links[peer] = link
    return links


def _listener(num_members: int) -> socket.socket | None:
    """A socket under a random name, which stands in no folder; None where there is no such thing."""
    with suppress(*UNREACHABLE):
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.setblocking(False)
            listener.bind(f"\0rq_ep {secrets.token_hex(TOKEN_BYTES)}")
            listener.listen(num_members)
            return listener
        except OSError:
            listener.close()
    return None


def _connect(name: bytes) -> tuple[NodeLink, bytes]:
    """A link with the rank that listens, and what it will know this rank by."""
    token = secrets.token_bytes(TOKEN_BYTES)
    with socket.socket(socket.AF_UNIX) as connection, FileIO(os.memfd_create("rq_ep"), "r+") as memory:
        connection.setblocking(False)  # a queue that is full is no reason to wait
        connection.connect(name)
        memory.truncate(2 * SEGMENT_BYTES)
        socket.send_fds(connection, [token], [memory.fileno()])
        connection.setblocking(True)
        return NodeLink(connection, _segments(memory), has_connected=True), token


def _accept(listener: socket.socket, ranks: Mapping[bytes, int]) -> dict[int, NodeLink]:
    """Accept the links that other ranks have made.

    Args:
        listener: to which all of them have connected.
        ranks: by what they are known by.
    """
    links = {}
    with suppress(OSError):  # the last one was accepted
        while True:
            connection, _ = listener.accept()
            with suppress(KeyError, *UNREACHABLE), connection:
                connection.setblocking(False)  # a rank has sent it before its token was gathered
                token, (descriptor,), _, _ = socket.recv_fds(connection, TOKEN_BYTES, 1)
                connection.setblocking(True)
                with FileIO(descriptor, "r+") as memory:
                    link = NodeLink(connection, _segments(memory), has_connected=False)
                links[ranks[token]] = link
                link.accept()
    return links


def _segments(memory: FileIO) -> Bytes:
    return np.frombuffer(mmap.mmap(memory.fileno(), 2 * SEGMENT_BYTES), np.uint8).reshape(2, SEGMENT_BYTES)
