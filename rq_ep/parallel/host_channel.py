"""Messages between ranks beside their collectives: through host memory, on a communicator and a thread of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from rq_ep.parallel.ep_group import PeerLost, PeerTensor


class HostChannel(Protocol):
    """One rank's end. One thread of each rank uses it at a time."""

    @property
    def rank(self) -> int: ...

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        """Send and receive tensors on the host; return when all have arrived.

        Both ends list the messages between them in the same order.

        Raises:
            PeerLost: a rank has ended, or does not answer in time.
        """
        ...


@dataclass(frozen=True)
class GlooChannel:
    """A channel over a gloo group that nothing else uses."""

    group: dist.ProcessGroup
    rank: int

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        try:
            works = [dist.irecv(landing, group=self.group, group_src=src) for landing, src in receives]
            works += [dist.isend(piece, group=self.group, group_dst=dst) for piece, dst in sends]
            for work in works:
                assert work is not None, "this process is a member of the group"
                work.wait()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise PeerLost(f"rank {self.rank}: moving experts failed, another rank may have ended: {reason}") from error
