"""Who begins a group that need not wait for all of its ranks, and how the others learn that it can be joined.

They meet in the store at the launcher's address, which rank 0 or the launcher hosts. Rank 0 decides who takes part.
"""

import json
import time
from datetime import timedelta
from typing import Any, NamedTuple

from rq_ep.config import Environment
from rq_ep.parallel.processes.world import RendezvousError, as_rendezvous_error, launcher_store, where

TICK_S = 0.05


class FirstMembers(NamedTuple):
    """The ranks that begin, in ascending order, and what rank 0 has told all."""

    ranks: tuple[int, ...]
    word: Any


class FirstMeeting:
    """The meeting as one rank sees it. That of rank 0 must live as long as other ranks may come.

    Args:
        environment: of this rank.
        timeout_s: for rank 0 to come and, on rank 0, for as many ranks as are needed.

    Raises:
        RendezvousError: the store cannot be reached. So do all methods.
    """

    def __init__(self, environment: Environment, timeout_s: float) -> None:
        self._environment = environment
        self._timeout_s = timeout_s
        with as_rendezvous_error(environment):
            # No other ranks are awaited here: they may come later than the group begins.
            self._store = launcher_store(environment, timedelta(seconds=timeout_s), num_awaited=1)

    def members(self, min_ranks: int, wait_s: float, word: Any) -> FirstMembers:
        """Come to the meeting, and wait until it is decided who begins.

        Args:
            min_ranks: rank 0 waits until so many have come,
            wait_s: and then for so many seconds for the others.
            word: of rank 0 to all ranks, also to those that come later; any JSON.
        """
        rank = self._environment.rank
        with as_rendezvous_error(self._environment):
            if rank == 0:
                self._store.set("members", json.dumps([self._gather(min_ranks, wait_s), word]))
            else:
                self._store.set(f"rank {rank}", "")
            ranks, shared = json.loads(self._await("members"))
        return FirstMembers(tuple(ranks), shared)

    def invite(self) -> None:
        """On rank 0: those that have come too late may join the group from now on."""
        self._store.set("invitation", "")

    def await_invitation(self) -> None:
        """Wait until the group can be joined, as long as it takes."""
        with as_rendezvous_error(self._environment):
            self._await("invitation")

    def _gather(self, min_ranks: int, wait_s: float) -> list[int]:
        """The ranks that have come in time."""
        size = self._environment.world_size
        start_s = time.monotonic()
        enough_s = None  # when as many as are needed had come
        while True:
            come = [rank for rank in range(size) if rank == 0 or self._store.check([f"rank {rank}"])]
            now_s = time.monotonic()
            if enough_s is None and len(come) >= min_ranks:
                enough_s = now_s
            if len(come) == size or (enough_s is not None and now_s - enough_s >= wait_s):
                return come
            if enough_s is None and now_s - start_s > self._timeout_s:
                raise RendezvousError(
                    f"{len(come)} of {size} ranks have come to {where(self._environment)} within "
                    f"{self._timeout_s:g} s (--rank-timeout), {come}: begin with fewer than --min-ranks {min_ranks}, "
                    "or start the others"
                )
            time.sleep(TICK_S)

    def _await(self, key: str) -> Any:
        while not self._store.check([key]):  # raises an error where the store has ended
            time.sleep(TICK_S)
        return self._store.get(key)
