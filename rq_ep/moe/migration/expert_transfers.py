"""Experts on their way between ranks, piece by piece.

A word before the first piece, and with each, says whether another one comes. So a rank that fails or is asked to stop
takes part in the messages to their end, and no other waits for it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rq_ep.parallel.ep_group import HostChannel, MessagesLost

MAX_PIECE_BYTES = 4 << 20  # of an expert, after which its way to another rank can be given up


class ExpertTransfer:
    """An expert on its way to or from another rank, in pieces of the same size.

    Args:
        peer: the other rank.
        is_outgoing: whether it goes there.
        nbytes: of the expert.
        max_piece_bytes: of a piece.
    """

    def __init__(self, peer: int, is_outgoing: bool, nbytes: int, max_piece_bytes: int) -> None:
        self.peer = peer
        self.is_outgoing = is_outgoing
        self.num_pieces = -(-nbytes // max_piece_bytes)
        self.buffer: Tensor | None = None  # on the host; None where this rank has failed
        self._nbytes = nbytes
        self._word = torch.ones(1, dtype=torch.uint8)
        self._comes = self._word.numpy()  # without a call of torch, in which other threads take the interpreter

    @property
    def comes(self) -> bool:
        """Whether the next piece comes; at the end, whether all have come."""
        return bool(self._comes[0])

    def say(self, comes: bool) -> None:
        """Have the next word say whether a piece comes after it."""
        self._comes[0] = comes

    def messages(self, number: int) -> list[Tensor]:
        """What travels together: a piece, numbered from 1, and a word on the next one."""
        return [self._piece(number)] * (number > 0) + [self._word] * (number < self.num_pieces)

    def _piece(self, number: int) -> Tensor:
        start, stop = (at * self._nbytes // self.num_pieces for at in (number - 1, number))
        return torch.empty(stop - start, dtype=torch.uint8) if self.buffer is None else self.buffer[start:stop]


def carry(
    transfers: Sequence[ExpertTransfer],
    channel: HostChannel,
    goes_on: Callable[[], bool],
    on_loss: Callable[[MessagesLost], None],
    on_piece: Callable[[], None],
) -> bool:
    """Send and receive experts, a piece of each at a time. Whether all has come.

    Args:
        transfers: of this rank, in an order that both ends have.
        channel: to the other ranks.
        goes_on: whether this rank still sends; asked before each piece.
        on_loss: called where ranks are out of reach; the others wait for this one's messages all the same.
        on_piece: called when the pieces of that number have gone and come.
    """
    lost: set[int] = set()
    left = list(transfers)
    for number in range(max((transfer.num_pieces for transfer in transfers), default=-1) + 1):
        left = [one for one in left if one.comes and number <= one.num_pieces and one.peer not in lost]
        sends_more = goes_on()
        for transfer in left:
            if transfer.is_outgoing and number < transfer.num_pieces:
                transfer.say(sends_more and transfer.buffer is not None)
        sends, receives = (
            [(message, one.peer) for one in left if one.is_outgoing is outgoing for message in one.messages(number)]
            for outgoing in (True, False)
        )
        try:
            channel.exchange(sends, receives)
        except MessagesLost as error:
            lost.update(error.peers)
            on_loss(error)
        if number > 0:
            on_piece()
    return not lost and all(transfer.comes for transfer in transfers)
