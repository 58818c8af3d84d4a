"""The messages between the HTTP process and the supervisor of a rank, which starts the process of the rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from rq_ep.serve.messages.from_rank import Aborted, Bye, DrainRequest
from rq_ep.serve.messages.to_rank import Abort, Stop


@dataclass(frozen=True)
class RankEnded:
    """The process of the rank has ended though nobody had asked for it."""

    status: str  # such as "was killed by SIGKILL"


@dataclass(frozen=True)
class RankStarted:
    """The process of the rank was started again."""

    num_restarts: int


@dataclass(frozen=True)
class RankGivenUp:
    """The process of the rank has ended, and is not started again."""

    reason: str


@dataclass(frozen=True)
class StartRank:
    """Start the process of the rank, which has none."""


@dataclass(frozen=True)
class KillRank:
    """End the process of the rank at once: it makes no progress. It counts as one that has failed."""

    reason: str


@dataclass(frozen=True)
class StopRank:
    """End the process of the rank in an orderly way, and start it only when a `StartRank` says so."""


FromSupervisor: TypeAlias = RankEnded | RankStarted | RankGivenUp | DrainRequest | Aborted | Bye
ToSupervisor: TypeAlias = StartRank | KillRank | StopRank | Stop | Abort

FROM_SUPERVISOR: Mapping[str, type] = {
    "rank_ended": RankEnded,
    "rank_started": RankStarted,
    "rank_given_up": RankGivenUp,
    "drain": DrainRequest,
    "aborted": Aborted,
    "bye": Bye,
}
TO_SUPERVISOR: Mapping[str, type] = {
    "start_rank": StartRank,
    "kill_rank": KillRank,
    "stop_rank": StopRank,
    "stop": Stop,
    "abort": Abort,
}
