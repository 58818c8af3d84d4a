"""torch.distributed's own group of all processes, where the first members of a group meet, and the launcher's store."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  # its defaults keep the group of the import, with its threads

from rq_ep.config import Environment
from rq_ep.core.errors import UserError


class RendezvousError(UserError):
    """The ranks cannot meet where the launcher says. It may be raised on some of them only."""


def begin_world(environment: Environment, timeout: timedelta) -> None:
    """Initialise torch.distributed over the store at the launcher's address.

    Raises:
        RendezvousError: the ranks cannot meet.
    """
    rank, size = environment.rank, environment.world_size
    with as_rendezvous_error(environment):
        store = launcher_store(environment, timeout, size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def launcher_store(environment: Environment, timeout: timedelta, num_awaited: int) -> Any:
    """The store at the launcher's address, for this start of the ranks.

    Args:
        environment: of this rank; rank 0 hosts the store, unless the launcher does.
        timeout: for its host to come.
        num_awaited: ranks that rank 0 waits for, itself included.
    """
    addr, port = environment.master_addr, environment.master_port
    host = f"[{addr}]" if ":" in addr else addr
    url = f"tcp://{host}:{port}?rank={environment.rank}&world_size={num_awaited}"
    shared, _, _ = next(dist.rendezvous(url, timeout=timeout))  # type: ignore[attr-defined]
    # torchrun may keep its store when it restarts ranks, with the addresses of the ones before.
    return dist.PrefixStore(f"attempt {environment.restart_count}", shared)  # type: ignore[attr-defined]


@contextmanager
def as_rendezvous_error(environment: Environment) -> Iterator[None]:
    """Name the address at which the ranks cannot meet."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:  # torch's own errors are RuntimeErrors
        reason = str(error).partition("\n")[0]
        raise RendezvousError(
            f"rank {environment.rank} cannot meet the others at {where(environment)} ({reason}): "
            "the address must be rank 0's, and the port free there"
        ) from None


def where(environment: Environment) -> str:
    """The launcher's address, as its variables say it."""
    return f"MASTER_ADDR={environment.master_addr}, MASTER_PORT={environment.master_port}"


def store_in_world(ranks: Sequence[int]) -> Any:
    """A part of torch.distributed's own store, for one more group of these ranks."""
    shared = dist.distributed_c10d._get_default_store()
    name = f"rq_ep group of ranks {list(ranks)}"
    number = shared.add(f"{name} of rank {dist.get_rank()}", 1)  # as many as of the other ranks
    return dist.PrefixStore(f"{name} number {number}", shared)  # type: ignore[attr-defined]
