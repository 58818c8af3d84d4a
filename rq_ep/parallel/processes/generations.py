"""What a rank talks over while the members of its group are the same, its end, and how the next members meet."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rq_ep.config import Environment, bind_for_ranks
from rq_ep.parallel.ep_group import PeerLost, Superseded
from rq_ep.parallel.processes.communicators import Communicators
from rq_ep.parallel.processes.meeting import GenerationStore, IsOver, StoreHost, meet, unless_over
from rq_ep.parallel.processes.seat import Seat
from rq_ep.parallel.processes.transport import gpu_name


class Generations:
    """The communicators of the present generation, after which others come. Whatever waits for another rank runs here.

    Args:
        first: of the first members.
        device: where tensors live.
        local_rank: number of this process on its node.
        timeout_s: for members to meet.
        owns_world: torch.distributed ends with the first generation.
    """

    def __init__(
        self, first: Communicators, device: torch.device, local_rank: int, timeout_s: float, owns_world: bool
    ) -> None:
        self.current = first
        self.operation: str | None = None  # that this rank waits for now
        self._device = device
        self._local_rank = local_rank
        self._timeout_s = timeout_s
        self._owns_world = owns_world
        self._num_channels = 0
        self._hosted_store: StoreHost | None = None
        self._changing = threading.Lock()  # guards what follows, and changes of `current`
        self._newest = 0  # generation that has begun to form here
        self._aborted_below = 0  # generations that this rank has done with

    @contextmanager
    def running(self, operation: str, communicators: Communicators | None = None) -> Iterator[Communicators]:
        """Name an operation, for a watchdog and in the error if it fails.

        Args:
            operation: over the communicators, which this yields.
            communicators: default: those of the present generation.

        Raises:
            PeerLost: another rank may have ended, or the generation was aborted.
        """
        communicators = communicators or self.current
        self.operation = operation
        try:
            _raise_if_aborted(communicators, operation)
            yield communicators
            _raise_if_aborted(communicators, operation)
        except PeerLost:
            raise
        except RuntimeError:
            _raise_if_aborted(communicators, operation)
            with as_peer_lost(f"rank {communicators.seat.rank}: {operation} failed, another rank may have ended"):
                raise
        finally:
            self.operation = None

    def raise_if_aborted(self) -> None:
        """Raise `PeerLost` if the present generation was aborted."""
        _raise_if_aborted(self.current, "computation")

    def open_channel(self) -> int:
        """Open a channel for messages, in this generation and in all later ones. Returns its number."""
        with self.running("opening of a channel") as communicators:
            communicators.open_channel()
        self._num_channels += 1
        return self._num_channels - 1

    def open_store(self) -> tuple[str, int]:
        """Host a store in which members of later generations meet; returns its address."""
        if self._hosted_store is None:
            self._hosted_store = StoreHost(bind_for_ranks(Environment.from_os()))
        return self._hosted_store.address

    def abort(self, below: int | None = None) -> None:
        """End what is under way, here and, as connections end, on the other members; as `TorchGroup.abort`."""
        with self._changing:
            below = self._newest + 1 if below is None else below
            self._aborted_below = max(self._aborted_below, below)
            generation = self.current.seat.generation
            if generation < self._aborted_below:
                self.current.abort(f"generation {generation} has ended")

    def reform(
        self, generation: int, members: Sequence[int], store: tuple[str, int], is_superseded: Callable[[], bool]
    ) -> None:
        """Go on with the members of another generation; as `TorchGroup.reform`."""
        before = self.current
        seat = Seat(before.seat.rank, before.seat.size, tuple(sorted(members)), generation)
        self.abort(generation)
        with self._changing:
            self._newest = generation
        # On a thread: gloo's take 10 ms each to close, in which they do nothing.
        threading.Thread(target=self._close, args=(before,), name="rq_ep closing", daemon=True).start()

        def make(is_over: IsOver) -> Communicators:
            own = GenerationStore(store, generation, is_over)
            try:
                word = (gpu_name(self._local_rank) or "") if self._device.type == "cuda" else ""
                words = meet(own, seat.members, seat.rank, word, self._timeout_s)
                backend = "nccl" if all(words) and len(set(words)) == len(words) else "gloo"
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # of this thread
                return Communicators(own, seat, self._device, backend, self._timeout_s, self._num_channels)
            except BaseException:
                own.close()
                raise

        self.operation = f"forming of generation {generation}"
        try:
            with as_peer_lost(f"rank {seat.rank}: generation {generation} could not be formed"):
                made = unless_over(make, lambda: is_superseded() or generation < self._aborted_below)
        finally:
            self.operation = None
        with self._changing:
            if generation >= self._aborted_below:
                self.current = made
                return
        made.close()
        raise Superseded(f"rank {seat.rank}: generation {generation} was given up before it had formed")

    def close(self) -> None:
        """End the communicators; every member calls it when nothing is under way."""
        self._close(self.current)
        if self._hosted_store is not None:
            self._hosted_store.close()

    def _close(self, communicators: Communicators) -> None:
        communicators.close()
        if self._owns_world and dist.is_initialized():
            dist.destroy_process_group()  # its connections lead to the first members


def _raise_if_aborted(communicators: Communicators, operation: str) -> None:
    if (why := communicators.why_aborted) is not None:
        raise PeerLost(f"rank {communicators.seat.rank}: {operation}: the group was aborted, {why}")


@contextmanager
def as_peer_lost(what: str) -> Iterator[None]:
    """Say in the errors of torch what could not be done."""
    try:
        yield
    except RuntimeError as error:
        kind = Superseded if isinstance(error, Superseded) else PeerLost
        reason = str(error).partition("\n")[0]
        raise kind(f"{what}: {reason}") from error
