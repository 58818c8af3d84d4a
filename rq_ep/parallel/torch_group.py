"""A group of processes over torch.distributed: NCCL where every rank has a GPU of its own, gloo elsewhere."""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rq_ep.config import Environment, keep_gloo_on_loopback
from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_choice
from rq_ep.parallel.ep_group import MessagesLost, PeerLost, PeerTensor, check_splits
from rq_ep.parallel.receive_buffers import ReceiveBuffers

log = logging.getLogger(__name__)

NO_TIMEOUT = timedelta(days=7)  # gloo wants one


class RendezvousError(UserError):
    """The ranks cannot meet where the launcher says. It may be raised on some of them only."""


class Transport(NamedTuple):
    """Where tensors live and which backend moves them, and why."""

    device_type: str
    backend: str
    reason: str


def choose_transport(wanted: str, gpus: Sequence[str | None]) -> Transport:
    """Choose device and backend for all ranks.

    Args:
        wanted: auto, cpu or cuda.
        gpus: for each rank a name of the GPU it would use that is unique in the cluster; None without one.

    Raises:
        UserError: cuda is wanted where a rank has no GPU.
    """
    check_choice("device", wanted, ("auto", "cpu", "cuda"))
    without = [rank for rank, gpu in enumerate(gpus) if gpu is None]
    if wanted == "cuda" and without:
        raise UserError(f"--device cuda: rank {without[0]} has no CUDA device; use --device cpu")
    is_exclusive = not without and len(set(gpus)) == len(gpus)
    if wanted == "cpu":
        return Transport("cpu", "gloo", "as asked")
    if is_exclusive:
        return Transport("cuda", "nccl", "every rank has a GPU of its own")
    if wanted == "cuda":
        return Transport("cuda", "gloo", "ranks share a GPU, which NCCL refuses: tensors travel through host memory")
    return Transport("cpu", "gloo", "not every rank has a GPU of its own")


class TorchGroup:
    """A group of processes.

    It has three communicators of its own: `control` (gloo, for objects, barriers and all that must not block a GPU),
    one for collectives on tensors, and one for borrowed experts, which travel beside the collectives. More are opened
    where they are asked for (`open_host_channel`).
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        ranks: Sequence[int] | None = None,
        local_rank: int = 0,
        timeout_s: float = 300.0,
        owns_world: bool = False,
    ) -> None:
        """Build the group on an initialised torch.distributed.

        Args:
            device: auto, cpu or cuda.
            ranks: global ranks of the members, ascending; default: the whole world. Only members call this.
            local_rank: number of this process on its node; chooses the GPU.
            timeout_s: after so many seconds without an answer a rank counts as lost.
            owns_world: `close` also ends torch.distributed.
        """
        self._owns_world = owns_world
        self.operation: str | None = None  # the one that this rank waits for now, read by a watchdog
        members = None if ranks is None else list(ranks)
        self._new_group: Callable[..., Any] = partial(
            dist.new_group, members, timeout=timedelta(seconds=timeout_s), use_local_synchronization=members is not None
        )
        self._channels: list[Any] = []
        self.control = self._new_group(backend="gloo")
        self.rank: int = dist.get_rank(self.control)
        self.size: int = dist.get_world_size(self.control)

        transport = choose_transport(device, self.all_gather_object(_gpu_name(local_rank)))
        self.device = _own_device(transport.device_type, local_rank)
        self.backend = transport.backend
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._is_staged = self.device.type == "cuda" and self.backend == "gloo"
        self.receive_buffers = ReceiveBuffers(self.device)
        self._data = self._new_group(backend=self.backend)
        self._borrowing = self._new_group(backend=self.backend)
        if self.backend == "nccl":  # NCCL wants every rank at a communicator's first use; transfers concern a few
            for group in (self._data, self._borrowing):
                dist.all_reduce(torch.zeros(1, device=self.device), group=group)
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
                _meet(environment, timeout)
        return cls(device, local_rank=environment.local_rank, timeout_s=timeout_s, owns_world=owns_world)

    def gather_counts(self, counts_V: Tensor) -> IntArray:
        counts_V = self._to_wire(counts_V)
        counts_RV = counts_V.new_empty(self.size, len(counts_V))
        # One hop, where a gather goes round the ring: with 4 ranks on 2 cores gloo takes half the time.
        with self._naming("gather of counts"):
            dist.all_to_all_single(counts_RV, counts_V.expand(self.size, -1).contiguous(), group=self._data)
        result: IntArray = counts_RV.cpu().numpy()
        return result

    def all_to_all(self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int]) -> Tensor:
        return self.start_all_to_all(send, input_splits, output_splits).wait()

    def start_all_to_all(
        self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> "TorchArrival":
        check_splits(send, input_splits, output_splits, self.size)
        target = send.new_empty(sum(output_splits), *send.shape[1:]) if out is None else out
        wire = self._to_wire(send).contiguous()
        landing = torch.empty_like(target, device="cpu") if self._is_staged else target
        with self._naming("all-to-all"):
            work = dist.all_to_all_single(
                landing, wire, list(output_splits), list(input_splits), group=self._data, async_op=True
            )
        return TorchArrival(self, work, wire, landing, target)

    def start_transfers(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> "TorchTransfers":
        landings = [(torch.empty_like(to, device="cpu") if self._is_staged else to, to) for to, _ in receives]
        outgoing = [self._to_wire(piece) for piece, _ in sends]
        with self._naming("weight transfer"):
            works = self._start_messages(
                [(piece, dst) for piece, (_, dst) in zip(outgoing, sends, strict=True)],
                [(landing, src) for (landing, _), (_, src) in zip(landings, receives, strict=True)],
            )
        return TorchTransfers(self, works, outgoing, landings)

    def _start_messages(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> list[Any]:
        group = self._borrowing
        if self.backend == "gloo":  # receives first: a sender waits for them
            return [dist.irecv(landing, group=group, group_src=src) for landing, src in receives] + [
                dist.isend(piece, group=group, group_dst=dst) for piece, dst in sends
            ]
        operations = [dist.P2POp(dist.isend, piece, group=group, group_peer=dst) for piece, dst in sends]
        operations += [dist.P2POp(dist.irecv, landing, group=group, group_peer=src) for landing, src in receives]
        return dist.batch_isend_irecv(operations) if operations else []  # NCCL wants both ends in one launch

    def open_host_channel(self) -> "GlooChannel":
        """A communicator for messages beside the collectives; every rank calls this.

        A rank that is slow there holds up no step. One that has ended closes its connections, which ends the waiting.
        """
        self._channels.append(self._new_group(backend="gloo", timeout=NO_TIMEOUT))
        return GlooChannel(self._channels[-1], self.rank)

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._naming("gather of objects"):
            dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        with self._naming("barrier"):
            dist.barrier(group=self.control)

    def clock(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        """End the communicators; every rank calls it when nothing is under way."""
        if not dist.is_initialized():
            return
        if self._owns_world:
            dist.destroy_process_group()
        else:
            for group in (*self._channels, self._borrowing, self._data, self.control):
                dist.destroy_process_group(group)

    def _to_wire(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self._is_staged else tensor

    @contextmanager
    def _naming(self, operation: str) -> Iterator[None]:
        self.operation = operation
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise PeerLost(f"rank {self.rank}: {operation} failed, another rank may have ended: {reason}") from error
        finally:
            self.operation = None


@dataclass(frozen=True)
class TorchArrival:
    """An all-to-all under way; keeps alive the buffer it reads."""

    group: TorchGroup
    work: dist.Work
    outgoing: Tensor
    landing: Tensor
    target: Tensor

    def wait(self) -> Tensor:
        with self.group._naming("all-to-all"):
            self.work.wait()
        return self.target if self.landing is self.target else self.target.copy_(self.landing)


@dataclass(frozen=True)
class TorchTransfers:
    """Messages under way; keeps alive the buffers they read."""

    group: TorchGroup
    works: Sequence[dist.Work]
    outgoing: Sequence[Tensor]
    landings: Sequence[tuple[Tensor, Tensor]]  # where a message arrives, where it belongs

    def wait(self) -> None:
        with self.group._naming("weight transfer"):
            for work in self.works:
                work.wait()
        for landing, target in self.landings:
            if landing is not target:
                target.copy_(landing)


@dataclass(frozen=True)
class GlooChannel:
    """Messages between ranks over a gloo group that nothing else uses."""

    group: dist.ProcessGroup
    rank: int

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        starts = [partial(dist.irecv, landing, group=self.group, group_src=src) for landing, src in receives]
        starts += [partial(dist.isend, piece, group=self.group, group_dst=dst) for piece, dst in sends]
        peers = [peer for _, peer in (*receives, *sends)]
        lost: dict[int, str] = {}
        works = []
        for start, peer in zip(starts, peers, strict=True):
            with _noting(lost, peer):
                works.append((start(), peer))
        for work, peer in works:
            with _noting(lost, peer):
                assert work is not None, "this process is a member of the group"
                work.wait()
        if lost:
            text = "; ".join(f"no connection to rank {peer} ({reason})" for peer, reason in sorted(lost.items()))
            raise MessagesLost(f"rank {self.rank}: {text}", lost)


@contextmanager
def _noting(lost: dict[int, str], peer: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost[peer] = str(error).partition("\n")[0]


def _meet(environment: Environment, timeout: timedelta) -> None:
    """Initialise torch.distributed over the store at the launcher's address."""
    addr, port = environment.master_addr, environment.master_port
    host = f"[{addr}]" if ":" in addr else addr
    url = f"tcp://{host}:{port}?rank={environment.rank}&world_size={environment.world_size}"
    try:
        shared, rank, size = next(dist.rendezvous(url, timeout=timeout))  # type: ignore[attr-defined]
        # torchrun may keep its store when it restarts ranks, with the addresses of the ones before.
        own = dist.PrefixStore(f"attempt {environment.restart_count}", shared)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:  # torch's own errors are RuntimeErrors
        reason = str(error).partition("\n")[0]
        raise RendezvousError(
            f"rank {environment.rank} cannot meet the others at MASTER_ADDR={addr}, MASTER_PORT={port} ({reason}): "
            "the address must be rank 0's, and the port free there"
        ) from None


def _gpu_name(local_rank: int) -> str | None:
    if not torch.cuda.is_available():
        return None
    device = _own_device("cuda", local_rank)
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _own_device(device_type: str, local_rank: int) -> torch.device:
    return (
        torch.device("cuda", local_rank % torch.cuda.device_count()) if device_type == "cuda" else torch.device("cpu")
    )
