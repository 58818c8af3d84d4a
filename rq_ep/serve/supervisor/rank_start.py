"""What a supervisor and the process of its rank say to each other: JSON lines over two pipes.

The rank's process reads a `RankStart` first, and `Command`s after it; when the pipe ends, so has the supervisor. In the
other direction go `Report`s. The token of the run goes through the pipe, as any user can read a command line, and the
environment is handed on to every process below and printed by tools.
"""

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from rq_ep.config import ServeConfig, as_mapping, from_mapping


@dataclass(frozen=True)
class HubAddress:
    """Where the HTTP process listens for the ranks, and the secret that they show it."""

    address: tuple[str, int]
    token: str


@dataclass(frozen=True)
class Rejoin:
    """The rank is started again, and joins a group that serves: it meets nobody at MASTER_ADDR."""

    hub: HubAddress
    num_restarts: int  # of this rank's process, this one included


@dataclass(frozen=True)
class RankStart:
    """How a rank's process begins.

    Args:
        config: what to serve.
        hub: of rank 0 at the first start: the other ranks learn it when all meet.
        problem: why the HTTP process could not be started; raised once the ranks have met, on all of them.
        rejoin: None at the first start.
    """

    config: ServeConfig
    hub: HubAddress | None = None
    problem: str | None = None
    rejoin: Rejoin | None = None


# From the supervisor


@dataclass(frozen=True)
class PassSignal:
    """The supervisor got a signal of this name."""

    name: str


@dataclass(frozen=True)
class Leave:
    """End in good order and at once: the rank is no member of the group any more."""


@dataclass(frozen=True)
class EndFailed:
    """End at once with an error."""

    reason: str


Command: TypeAlias = PassSignal | Leave | EndFailed


# From the rank


@dataclass(frozen=True)
class Late:
    """The group has begun without this rank, which joins it: it goes on without this rank, should it fail."""

    hub: HubAddress


@dataclass(frozen=True)
class Serving:
    """The rank serves: from now on the group goes on without it, should it fail."""

    hub: HubAddress


@dataclass(frozen=True)
class Ending:
    """The rank is about to end on purpose, and is not to be started again."""


Report: TypeAlias = Late | Serving | Ending

KINDS = {kind.__name__: kind for kind in (RankStart, PassSignal, Leave, EndFailed, Late, Serving, Ending)}


def to_line(message: RankStart | Command | Report) -> bytes:
    """The line of a message; short ones are written to a pipe as a whole or not at all."""
    return json.dumps({"kind": type(message).__name__, **vars(message)}, default=_as_json).encode() + b"\n"


def from_line(line: bytes) -> Any:
    """The message of a line."""
    fields = json.loads(line)
    kind = KINDS[fields.pop("kind")]
    if kind is RankStart:
        fields["config"] = from_mapping(ServeConfig, fields["config"])
        fields["rejoin"] = (rejoin := fields["rejoin"]) and Rejoin(_hub(rejoin["hub"]), rejoin["num_restarts"])
    if "hub" in fields:
        fields["hub"] = fields["hub"] and _hub(fields["hub"])
    return kind(**fields)


def _hub(fields: dict[str, Any]) -> HubAddress:
    host, port = fields["address"]
    return HubAddress((host, port), fields["token"])


def _as_json(value: Any) -> Any:
    return as_mapping(value) if isinstance(value, ServeConfig) else vars(value)
