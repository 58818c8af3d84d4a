"""The messages that a rank gets from the HTTP process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rq_ep.engine.requests import Request
from rq_ep.serve.messages.from_rank import ImportanceReport, MigrationGivenUp


@dataclass(frozen=True)
class PromptPart:
    """A part of the prompt of a request that will come, with the rest of its prompt, as an `AddRequest`."""

    id: str
    token_ids: list[int]


@dataclass(frozen=True)
class ImageData:
    """A part of an array of the images of a request that will come as an `AddRequest`."""

    id: str
    name: str
    dtype: str
    shape: list[int]  # of the whole array
    data: str  # base64


@dataclass(frozen=True)
class AddRequest:
    """A request for this rank; with it the group has been given `num_announced`."""

    request: Request
    num_announced: int


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this request any more."""

    id: str


@dataclass(frozen=True)
class Wake:
    """The group has been given `num_announced` requests so far."""

    num_announced: int


@dataclass(frozen=True)
class Mark:
    """A number that is to reach every rank between the same two steps."""

    number: int


@dataclass(frozen=True)
class BeginMigration:
    """Move experts to where a placement has them, beside the steps; every rank gets it."""

    generation: int
    placement: dict[str, Any]
    rounds: list[Any]


@dataclass(frozen=True)
class RebalanceCommand:
    """Rank 0: what a user asks for: start, abort or dry_run. A `RebalanceAnswer` of this number follows."""

    number: int
    action: str


@dataclass(frozen=True)
class Regroup:
    """Form the group of a generation: these ranks are its members, the others are none."""

    generation: int
    members: list[int]
    store: tuple[str, int]  # host and port, where they meet
    joining: list[int]  # members that hold no experts yet


@dataclass(frozen=True)
class CheckMembers:
    """Could these ranks hold the model without the others? A `MembersChecked` of this number follows."""

    number: int
    members: list[int]  # of whom this rank would be the leader
    free_bytes: list[int | None]  # memory of the device of each; None: not known


@dataclass(frozen=True)
class Stop:
    """End well: the requests have ended."""


@dataclass(frozen=True)
class Abort:
    """End at once: the group has failed."""

    reason: str


# To a rank that has loaded its model
ToLoadedRank: TypeAlias = (
    PromptPart
    | ImageData
    | AddRequest
    | Cancel
    | Wake
    | Mark
    | BeginMigration
    | RebalanceCommand
    | MigrationGivenUp
    | ImportanceReport
    | Regroup
    | CheckMembers
)

ToRank: TypeAlias = ToLoadedRank | Stop | Abort

TO_RANK: Mapping[str, type] = {
    "prompt_part": PromptPart,
    "image_data": ImageData,
    "add": AddRequest,
    "cancel": Cancel,
    "wake": Wake,
    "mark": Mark,
    "migrate": BeginMigration,
    "rebalance_command": RebalanceCommand,
    "given_up": MigrationGivenUp,
    "importance": ImportanceReport,
    "regroup": Regroup,
    "check_members": CheckMembers,
    "stop": Stop,
    "abort": Abort,
}
