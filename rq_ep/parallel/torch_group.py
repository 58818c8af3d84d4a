"""A group of processes over torch.distributed: NCCL where every rank has a GPU of its own, gloo elsewhere."""

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rq_ep.config import Environment, keep_gloo_on_loopback
from rq_ep.core.arrays import IntArray
from rq_ep.parallel.ep_group import PeerTensor, check_splits
from rq_ep.parallel.processes.communicators import Communicators
from rq_ep.parallel.processes.generations import Generations, as_peer_lost
from rq_ep.parallel.processes.meeting import meet
from rq_ep.parallel.processes.seat import Seat
from rq_ep.parallel.processes.transfers import GlooChannel, TorchArrival, TorchTransfers
from rq_ep.parallel.processes.transport import choose_transport, device_of, gpu_name
from rq_ep.parallel.processes.world import begin_world, store_in_world
from rq_ep.parallel.receive_buffers import ReceiveBuffers

log = logging.getLogger(__name__)


class TorchGroup:
    """A group of processes whose members may change.

    What the members of one generation talk over are `Communicators`; a later generation has others. Objects, barriers
    and integers of the host travel beside the tensors, and borrowed experts beside the collectives. Channels are
    opened where they are asked for (`open_host_channel`), and live through all generations.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        ranks: Sequence[int] | None = None,
        local_rank: int = 0,
        timeout_s: float = 300.0,
        owns_world: bool = False,
        alone_as: tuple[int, int] | None = None,
    ) -> None:
        """Build the group on an initialised torch.distributed.

        Args:
            device: auto, cpu or cuda.
            ranks: global ranks of the members, ascending; default: the whole world. Only members call this.
            local_rank: number of this process on its node; chooses the GPU.
            timeout_s: after so many seconds without an answer a rank counts as lost.
            owns_world: `close` also ends torch.distributed.
            alone_as: (rank, R): torch.distributed is not needed, as this rank is the only member at first.
        """
        if alone_as is None:
            ranks = range(dist.get_world_size()) if ranks is None else ranks
            seat = Seat(list(ranks).index(dist.get_rank()), len(ranks), tuple(range(len(ranks))))
            store = store_in_world(ranks)
        else:
            rank, size = alone_as
            seat, store = Seat(rank, size, (rank,)), dist.HashStore()  # type: ignore[attr-defined]
        self.rank, self.size = seat.rank, seat.size
        with as_peer_lost(f"rank {self.rank}: the ranks cannot meet"):
            words = meet(store, seat.members, seat.rank, gpu_name(local_rank) or "", timeout_s)
        transport = choose_transport(device, [word or None for word in words])
        self.device = device_of(transport.device_type, local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.receive_buffers = ReceiveBuffers(self.device)
        with as_peer_lost(f"rank {self.rank}: the group could not be formed"):
            first = Communicators(store, seat, self.device, transport.backend, timeout_s, 0)
        self._generations = Generations(first, self.device, local_rank, timeout_s, owns_world)
        log.info("rank %d of %d: %s on %s (%s)", self.rank, self.size, self.backend, self.device, transport.reason)

    @classmethod
    def from_environment(cls, device: str = "auto", timeout_s: float = 300.0) -> "TorchGroup":
        """The group of all processes a launcher started; a process started by hand is a group of one.

        torch.distributed is initialised here unless it is already.

        Raises:
            RendezvousError: the ranks cannot meet.
            UserError: the launcher's variables are incomplete, or `device` is not there.
        """
        environment = Environment.from_os()
        owns_world = not dist.is_initialized()
        if owns_world:
            timeout = timedelta(seconds=timeout_s)
            if environment.is_one_node:
                keep_gloo_on_loopback()
            if environment.world_size == 1:
                store = dist.HashStore()  # type: ignore[attr-defined]
                dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
            else:
                begin_world(environment, timeout)
        return cls(device, local_rank=environment.local_rank, timeout_s=timeout_s, owns_world=owns_world)

    @classmethod
    def alone(
        cls, rank: int, size: int, device: str = "auto", *, local_rank: int = 0, timeout_s: float = 300.0
    ) -> "TorchGroup":
        """A group of `size` ranks of which this one is the only member, until it joins the others by `reform`."""
        if Environment.from_os().is_one_node:
            keep_gloo_on_loopback()
        return cls(device, local_rank=local_rank, timeout_s=timeout_s, alone_as=(rank, size))

    @property
    def members(self) -> tuple[int, ...]:
        return self._generations.current.seat.members

    @property
    def generation(self) -> int:
        """The number of this membership; 0: the first one."""
        return self._generations.current.seat.generation

    @property
    def backend(self) -> str:
        return self._generations.current.backend

    @property
    def operation(self) -> str | None:
        """The one that this rank waits for now, read by a watchdog."""
        return self._generations.operation

    # A change of the members

    def open_store(self) -> tuple[str, int]:
        """Host a store in which members of later generations meet; returns its address."""
        return self._generations.open_store()

    def abort(self, below: int | None = None) -> None:
        """End the collectives and messages under way, here and, as connections end, on the other members.

        Any thread may call this at any time. What is under way and what follows raises `PeerLost` until `reform`.

        Args:
            below: only those of generations below this one: the one that was announced may have formed already.
                None: those of whatever generation there is, or that is forming.
        """
        self._generations.abort(below)

    def reform(
        self,
        generation: int,
        members: Sequence[int],
        store: tuple[str, int],
        is_superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        """Form the group anew; every member calls this. What is under way in an older generation ends.

        Args:
            generation: higher than any before.
            members: ranks, this one among them.
            store: where they meet: the address that `open_store` returned on one of them.
            is_superseded: asked again and again whether a newer generation has been announced.

        Raises:
            Superseded: a newer generation has been announced, or `abort` was called.
            PeerLost: a member or the store is gone, or a member has not come in time. A newer generation is needed.
        """
        self._generations.reform(generation, members, store, is_superseded)

    def raise_if_aborted(self) -> None:
        """Raise `PeerLost` if this generation was aborted: what a GPU has computed since may be wrong."""
        self._generations.raise_if_aborted()

    # Collectives and messages

    def gather_counts(self, counts_V: Tensor) -> IntArray:
        with self._generations.running("gather of counts") as communicators:
            counts_V = self._to_wire(counts_V)
            num_members = len(communicators.seat.members)
            counts_MV = counts_V.new_empty(num_members, len(counts_V))
            # One hop, where a gather goes round the ring: with 4 ranks on 2 cores gloo takes half the time.
            sent_MV = counts_V.expand(num_members, -1).contiguous()
            communicators.finish_tensors(communicators.all_to_all(counts_MV, sent_MV))
            return communicators.seat.of_ranks(counts_MV.cpu().numpy())

    def all_to_all(self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int]) -> Tensor:
        return self.start_all_to_all(send, input_splits, output_splits).wait()

    def start_all_to_all(
        self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> TorchArrival:
        check_splits(send, input_splits, output_splits, self.size, self.members)
        target = send.new_empty(sum(output_splits), *send.shape[1:]) if out is None else out
        wire = self._to_wire(send).contiguous()
        landing = torch.empty_like(target, device="cpu") if self._is_staged else target
        with self._generations.running("all-to-all") as communicators:
            work = communicators.all_to_all(landing, wire, output_splits, input_splits)
        return TorchArrival(self._generations, communicators, work, wire, landing, target)

    def start_transfers(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> TorchTransfers:
        landings = [(torch.empty_like(to, device="cpu") if self._is_staged else to, to) for to, _ in receives]
        outgoing = [self._to_wire(piece) for piece, _ in sends]
        with self._generations.running("weight transfer") as communicators:
            messages = communicators.borrowing.start(
                [(piece, dst) for piece, (_, dst) in zip(outgoing, sends, strict=True)],
                [(landing, src) for (landing, _), (_, src) in zip(landings, receives, strict=True)],
            )
        return TorchTransfers(self._generations, communicators, messages, outgoing, landings)

    def open_host_channel(self) -> GlooChannel:
        """Communicators for messages beside the collectives, one in each generation; every member calls this.

        A rank that is slow there holds up no step. One that has ended closes its connections, which ends the waiting.
        """
        return GlooChannel(self._generations, self._generations.open_channel())

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._generations.running("gather of objects") as communicators:
            for rank, of_rank in zip(self.members, communicators.gather_objects(value), strict=True):
                values[rank] = of_rank
        return values

    def gather_ints(self, values: Sequence[int], operation: str) -> list[list[int]]:
        """As many integers of each member, in their order; holes are left out."""
        with self._generations.running(operation) as communicators:
            return communicators.gather_ints(values)

    def barrier(self) -> None:
        with self._generations.running("barrier") as communicators:
            communicators.finish(communicators.control.barrier())

    def clock(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        """End the communicators; every member calls it when nothing is under way."""
        self._generations.close()

    def end(self) -> None:
        """`abort` and `close`: end the communicators here, whatever is under way and whatever the others do."""
        self.abort()
        self.close()

    @property
    def _is_staged(self) -> bool:
        return self.device.type == "cuda" and self.backend == "gloo"

    def _to_wire(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self._is_staged else tensor
