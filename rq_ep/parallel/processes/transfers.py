"""Tensors under way between processes, and where to wait for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from rq_ep.parallel.ep_group import MessagesLost, PeerTensor
from rq_ep.parallel.processes.communicators import Communicators
from rq_ep.parallel.processes.generations import Generations
from rq_ep.parallel.processes.peer_messages import MessagesUnderWay


@dataclass(frozen=True)
class TorchArrival:
    """An all-to-all under way; keeps alive the buffer it reads."""

    generations: Generations
    communicators: Communicators
    work: dist.Work
    outgoing: Tensor
    landing: Tensor
    target: Tensor

    def wait(self) -> Tensor:
        with self.generations.running("all-to-all", self.communicators):
            self.communicators.finish_tensors(self.work)
        return self.target if self.landing is self.target else self.target.copy_(self.landing)


@dataclass(frozen=True)
class TorchTransfers:
    """Messages under way; keeps alive the buffers they read."""

    generations: Generations
    communicators: Communicators
    messages: MessagesUnderWay
    outgoing: Sequence[Tensor]
    landings: Sequence[tuple[Tensor, Tensor]]  # where a message arrives, where it belongs

    def wait(self) -> None:
        with self.generations.running("weight transfer", self.communicators):
            if lost := self.messages.finish():
                raise RuntimeError(_named(lost))
        for landing, target in self.landings:
            if landing is not target:
                target.copy_(landing)


@dataclass(frozen=True)
class GlooChannel:
    """Messages between ranks over communicators that nothing else uses: those of the present generation."""

    generations: Generations
    number: int

    @property
    def rank(self) -> int:
        return self.generations.current.seat.rank

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        if lost := self.generations.current.exchange_messages(self.number, sends, receives):
            raise MessagesLost(f"rank {self.rank}: {_named(lost)}", lost)

    def reconnect(self, number: int) -> None:
        communicators = self.generations.current
        try:
            communicators.reconnect_channel(self.number, number)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            text = f"rank {self.rank}: no connection to the other ranks again ({reason})"
            raise MessagesLost(text, communicators.seat.members) from error


def _named(lost: dict[int, str]) -> str:
    """The ranks out of reach, and why."""
    return "; ".join(f"no connection to rank {peer} ({reason})" for peer, reason in sorted(lost.items()))
