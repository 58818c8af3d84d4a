"""How the members of a generation find each other: in a key-value store that one of them hosts."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from rq_ep.config import Environment, bind_for_ranks
from rq_ep.parallel.ep_group import PeerLost, Superseded

STORE_TIMEOUT = timedelta(seconds=30)
CONNECT_TIMEOUT_S = 5.0
FIRST_TICK_S, LAST_TICK_S = 0.001, 0.02


class Closable(Protocol):
    """What is given up when nobody wants it any more."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)
IsOver = Callable[[], bool]


def host_store(environment: Environment) -> tuple[Any, tuple[str, int]]:
    """Begin to host a store that the other ranks can reach; returns it and its address. It ends with the object."""
    with bind_for_ranks(environment) as listener:
        host, port = listener.getsockname()[:2]
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
    return store, (host, port)


def connect_store(address: tuple[str, int]) -> Any:
    """A connection to a store.

    Raises:
        PeerLost: nobody listens there any more.
    """
    host, port = address
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()  # torch tries for long, and logs each failure
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)  # type: ignore[attr-defined]
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise PeerLost(f"the store at {host}:{port} is gone, its rank may have ended: {reason}") from None


def meet(store: Any, members: Sequence[int], rank: int, word: str, is_over: IsOver, timeout_s: float) -> list[str]:
    """Wait until all members have come.

    Args:
        store: for this meeting alone.
        members: the ranks to come.
        rank: this one.
        word: what this rank has to say.
        is_over: asked again and again whether waiting has become vain.
        timeout_s: how long to wait.

    Returns:
        The words of all members.

    Raises:
        Superseded: waiting has become vain.
        PeerLost: a member has not come in time, or the store is gone.
    """
    keys = [f"member {member}" for member in members]
    deadline_s, tick_s = time.monotonic() + timeout_s, FIRST_TICK_S
    try:
        store.set(f"member {rank}", word)
        while not store.check(keys):
            if is_over():
                raise Superseded("another generation has been announced")
            if time.monotonic() > deadline_s:
                missing = [str(member) for member, key in zip(members, keys, strict=True) if not store.check([key])]
                raise PeerLost(f"rank {', '.join(missing)} has not come within {timeout_s:g} s")
            time.sleep(tick_s)
            tick_s = min(tick_s * 1.5, LAST_TICK_S)
        return [store.get(key).decode() for key in keys]
    except PeerLost:
        raise
    except RuntimeError as error:  # of torch
        reason = str(error).partition("\n")[0]
        raise PeerLost(f"the store is gone, its rank may have ended: {reason}") from None


def unless_over(work: Callable[[IsOver], T], is_over: IsOver) -> T:
    """What `work` makes, on a thread that is left alone once it is over: some calls of torch cannot be interrupted.

    Raises:
        Superseded: it is over; what is made all the same is closed.
    """
    future: Future[T] = Future()

    def body() -> None:
        try:
            made = work(future.cancelled)
        except BaseException as error:
            if not future.cancelled():
                with suppress(Exception):  # cancelled in this moment
                    future.set_exception(error)
            return
        try:
            future.set_result(made)
        except Exception:
            made.close()

    threading.Thread(target=body, name="rq_ep reform", daemon=True).start()
    while not wait([future], LAST_TICK_S).done:
        if is_over() and future.cancel():
            raise Superseded("another generation has been announced")
    return future.result()
