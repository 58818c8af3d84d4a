"""How the members of a generation find each other: through a store that one of them hosts.

torch's TCPStore would do, but it looks up the name of every address that it connects to: with a name server that does
not answer, that is 5 s for each member, in which no tokens come.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from rq_ep.parallel.ep_group import PeerLost, Superseded

CONNECT_TIMEOUT_S = 5.0
TICK_S = 0.02  # how often those that wait look whether they still have to
MAX_LINE_BYTES = 1 << 20


class Closable(Protocol):
    """What is given up when nobody wants it any more."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)
IsOver = Callable[[], bool]


class StoreHost:
    """Passes the pairs that a member of a generation sets on to all others, also to those that come later.

    A connection's first line is the generation, each other one a pair.

    Args:
        listener: where it listens from now on.
    """

    def __init__(self, listener: socket.socket) -> None:
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._listener = listener
        self._lock = threading.Lock()
        self._lines: dict[bytes, list[bytes]] = {}  # of the pairs of each generation
        self._present: dict[bytes, list[socket.socket]] = {}
        threading.Thread(target=self._accept, name="rq_ep store", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="rq_ep store", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as lines:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            generation = lines.readline(MAX_LINE_BYTES)
            with self._lock:
                connection.sendall(b"".join(self._lines.setdefault(generation, [])))
                present = self._present.setdefault(generation, [])
                present.append(connection)
            try:
                while line := lines.readline(MAX_LINE_BYTES):
                    with self._lock:
                        self._lines[generation].append(line)
                        for member in present:
                            with suppress(OSError):  # it has ended
                                member.sendall(line)
            finally:
                with self._lock:
                    present.remove(connection)
                    if not present:
                        del self._present[generation], self._lines[generation]


class GenerationStore(dist.Store):  # type: ignore[name-defined, misc]
    """The key-value store of a generation, for torch's backends too. Whoever waits in it can be interrupted.

    Args:
        address: of its host.
        generation: whose store this is.
        is_over: whether waiting has become vain.

    Raises:
        PeerLost: the host is gone. So do all methods, which also raise `Superseded` when it is over.
    """

    def __init__(self, address: tuple[str, int], generation: int, is_over: IsOver) -> None:
        super().__init__()
        self._is_over = is_over
        self._name = f"the store at {address[0]}:{address[1]}"
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._has_ended = False
        try:
            self._connection = socket.create_connection(address, CONNECT_TIMEOUT_S)
            self._connection.settimeout(None)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise PeerLost(f"{self._name} is gone, its rank may have ended ({error})") from None
        self._send(f"{generation}")
        threading.Thread(target=self._receive, name="rq_ep store", daemon=True).start()

    def set(self, key: str, value: str | bytes) -> None:
        self._send(json.dumps([key, value.encode().hex() if isinstance(value, str) else bytes(value).hex()]))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta = timedelta(days=1)) -> None:
        deadline_s = time.monotonic() + timeout.total_seconds()
        with self._changed:
            while not self.check(keys):
                if self._is_over():
                    raise Superseded("another generation has been announced")
                if self._has_ended:
                    raise PeerLost(f"{self._name} is gone, its rank may have ended")
                if time.monotonic() > deadline_s:
                    missing = ", ".join(key for key in keys if key not in self._values)
                    raise PeerLost(f"{missing} has not come within {timeout.total_seconds():g} s")
                self._changed.wait(TICK_S)

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def close(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes its thread

    def _send(self, line: str) -> None:
        try:
            self._connection.sendall(f"{line}\n".encode())
        except OSError as error:
            raise PeerLost(f"{self._name} is gone, its rank may have ended ({error})") from None

    def _receive(self) -> None:
        with suppress(OSError, ValueError), self._connection, self._connection.makefile("rb") as lines:
            for line in lines:
                key, value = json.loads(line)
                with self._changed:
                    self._values[key] = bytes.fromhex(value)
                    self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()


def meet(store: Any, members: Sequence[int], rank: int, word: str, timeout_s: float) -> list[str]:
    """Wait until all members have come to a store of torch's or of a generation.

    Args:
        store: for this meeting alone.
        members: the ranks to come.
        rank: this one.
        word: what this rank has to say.
        timeout_s: how long to wait.

    Returns:
        The words of all members.

    Raises:
        RuntimeError: a member has not come in time, or the store is gone.
    """
    keys = [f"rank {member}" for member in members]
    store.set(f"rank {rank}", word)
    store.wait(keys, timedelta(seconds=timeout_s))
    return [store.get(key).decode() for key in keys]


def unless_over(work: Callable[[IsOver], T], is_over: IsOver) -> T:
    """What `work` makes, on a thread that is left alone once it is over: gloo's connecting cannot be interrupted.

    Raises:
        Superseded: it is over; what is made all the same is closed.
    """
    future: Future[T] = Future()

    def body() -> None:
        try:
            made = work(future.cancelled)
        except BaseException as error:
            with suppress(Exception):  # it is over
                future.set_exception(error)
            return
        try:
            future.set_result(made)
        except Exception:  # it is over
            made.close()

    threading.Thread(target=body, name="rq_ep forming", daemon=True).start()
    while not wait([future], TICK_S).done:
        if is_over() and future.cancel():
            raise Superseded("another generation has been announced")
    return future.result()
