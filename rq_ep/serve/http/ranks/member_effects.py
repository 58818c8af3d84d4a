"""What a change of the members asks for; `MemberChanges` carries it out."""

from dataclasses import dataclass
from typing import TypeAlias

from rq_ep.serve.messages import KillRank, Regroup, StartRank, StopRank


@dataclass(frozen=True)
class SendRegroup:
    """Send a message to all members."""

    message: Regroup


@dataclass(frozen=True)
class CommandSupervisor:
    """Send a message to the supervisor of a rank."""

    rank: int
    message: StartRank | StopRank | KillRank


@dataclass(frozen=True)
class RankLost:
    """Cut a rank off, and send its requests on.

    `was_serving`: it was, so that one of its requests may be what has ended it.
    """

    rank: int
    reason: str
    was_member: bool
    was_serving: bool


@dataclass(frozen=True)
class GenerationServes:
    """Every member serves in the generation. `seconds` has those of each part, the longest of all members."""

    is_recovery: bool  # and not only ranks that join or leave
    seconds: dict[str, float]


@dataclass(frozen=True)
class AskToLeave:
    """Find out whether the other members could hold the model without these; `may_leave` takes the answer."""

    ranks: tuple[int, ...]
    generation: int


@dataclass(frozen=True)
class GiveUp:
    """End the group."""

    reason: str


Effect: TypeAlias = SendRegroup | CommandSupervisor | RankLost | GenerationServes | AskToLeave | GiveUp
