"""What is known of each rank of a group that shrinks and grows, and what has happened to it.

A rank goes through these states, and is a member while it serves or leaves, and while the members take it in:

    LOADING -> JOINING -> SERVING -> LEAVING -> REMOVED -> RESTARTING -> LOADING    (at first: LOADING -> SERVING)
    LOADING, JOINING or SERVING -> LOST -> RESTARTING -> LOADING
    EXPECTED -> LOADING    (where the group begins without it)
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

MAX_EVENTS = 200


class MemberState(Enum):
    """State of a rank."""

    LOADING = "loading"  # its process loads the model
    JOINING = "joining"  # its model is loaded: the members take it in
    SERVING = "serving"
    LEAVING = "leaving"  # on purpose: it gets no new requests, or its process is about to end
    REMOVED = "removed"  # on purpose: it has no process
    EXPECTED = "expected"  # it has not come yet
    LOST = "lost"  # its process has ended, or does not answer
    RESTARTING = "restarting"  # its process was started, and has not connected yet


ABSENT = (MemberState.EXPECTED, MemberState.LOST, MemberState.RESTARTING, MemberState.REMOVED)


@dataclass
class RankRecord:
    """What is known of a rank."""

    state: MemberState
    reason: str
    since: float  # seconds since the epoch
    generation: int = 0  # the last one that it has served in
    store: tuple[str, int] | None = None
    num_failures: int = 0
    num_restarts: int = 0
    has_supervisor: bool = False
    is_given_up: bool = False  # its supervisor does not start it again by itself
    is_stopping: bool = False  # it is no member any more, and its supervisor was told to end it
    num_ends_to_come: int = 0  # reports of its supervisor on ends that are known already


class RankRecords:
    """The records of all ranks, by their numbers, and the changes of their states.

    Args:
        num_ranks: size of the group.
        calendar: seconds since the epoch.
    """

    def __init__(self, num_ranks: int, calendar: Callable[[], float]) -> None:
        self._calendar = calendar
        self._records = [RankRecord(MemberState.LOADING, "", calendar()) for _ in range(num_ranks)]
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[RankRecord]:
        return iter(self._records)

    def __getitem__(self, rank: int) -> RankRecord:
        return self._records[rank]

    def in_state(self, state: MemberState) -> list[int]:
        """The ranks in a state, in order."""
        return [rank for rank, record in enumerate(self._records) if record.state is state]

    def set(self, rank: int, state: MemberState, reason: str, generation: int) -> None:
        """Have a rank be in a state, for a reason, since a generation of the group."""
        record = self._records[rank]
        if record.state is not state:
            record.since = self._calendar()
            about = {"rank": rank, "state": state.value, "reason": reason, "generation": generation}
            self.events.append({"time": record.since, **about})
        record.state, record.reason = state, reason

    def degradation(self) -> str | None:
        """Why fewer ranks serve than there are; None if all do."""
        missing = [rank for rank, record in enumerate(self._records) if record.state is not MemberState.SERVING]
        if not missing:
            return None
        about = []
        for rank in missing:
            record = self._records[rank]
            about.append(f"rank {rank} is {record.state.value}" + (f" ({record.reason})" if record.reason else ""))
        return f"{len(self) - len(missing)} of {len(self)} ranks serve: {'; '.join(about)}"
