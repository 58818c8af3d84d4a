"""Every message between the HTTP process and the ranks. On the wire a message is a JSON object in a frame.

The object has the fields of a dataclass below, and its `kind` as the tables `FROM_RANK` and `TO_RANK` name it.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Any, TypeAlias, TypedDict, get_args, get_origin, get_type_hints

import numpy as np

from rq_ep.engine.progress import MoverProgress, Progress
from rq_ep.engine.requests import Output, Request, Sampling, Score

MAX_MESSAGE_BYTES = 16 << 20  # the longest in practice is `Ready`, with the placement of a large model
PROMPT_PART_TOKENS = 1 << 16  # in one message
IMAGE_PART_BYTES = 4 << 20
NO_MOVER = MoverProgress()


class MessageError(ValueError):
    """Something that is no message of its direction, or whose fields are not those of its kind."""


class MessageTooLong(MessageError):
    """A message of more than `MAX_MESSAGE_BYTES`."""


# From a rank


@dataclass(frozen=True)
class Checked:
    """Rank 0: the checkpoint is in order, and is about to be loaded."""

    model: str  # its folder on rank 0's machine
    why_text_only: str | None = None  # None: it takes images


@dataclass(frozen=True)
class Ready:
    """Rank 0: every rank can serve."""

    max_model_len: int
    vocab_size: int
    expert_bytes: list[dict[str, int]]  # of each rank, by weight format
    placement: dict[str, Any]  # as `placement.json` holds it
    info: dict[str, Any]


@dataclass(frozen=True)
class Outputs:
    """New tokens of requests."""

    outputs: list[Output]


class LoadSums(TypedDict):
    """The load of the MoE layers over some steps; every list has an entry for each of `layers`."""

    layers: list[int]
    num_calls_L: list[int]
    pairs_LR: list[list[int]]
    counts_LE: list[list[int]]
    formats_L: list[dict[str, int]]  # routed pairs by weight format
    imbalance_L: list[float]  # max/mean over ranks, mean of the calls
    seconds: dict[str, float]  # by phase of a layer call, over all layers and calls
    borrowed_experts: int
    borrowed_bytes: int


@dataclass(frozen=True)
class RankStats:
    """Figures of a rank: requests and cache now, steps and load since the last message."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    progress: Progress
    num_steps: int
    steps_s: float
    loads: LoadSums | None = None  # from rank 0 alone: every rank plans the same
    mover: MoverProgress = NO_MOVER


@dataclass(frozen=True)
class Recorded:
    """Rank 0: a recording has ended, and was written."""

    path: str
    num_steps: int
    num_tokens: int
    is_full: bool


@dataclass(frozen=True)
class RecordingFailed:
    """Rank 0: a recording has ended, and was not written."""

    reason: str


@dataclass(frozen=True)
class MigrationPlanned:
    """Rank 0: every rank is to move experts, as `BeginMigration` says."""

    generation: int
    placement: dict[str, Any]  # the goal, as `placement.json` holds it
    rounds: list[Any]  # of each: what arrives and what is dropped, as (position of a layer, fields of a `Move`)


@dataclass(frozen=True)
class PlacementServed:
    """Rank 0: on all ranks these layers serve, or all of a placement."""

    generation: int
    layers: list[dict[str, Any]]  # those that have changed, as `placement.json` holds them
    placement: dict[str, Any] | None = None  # at the end of a migration
    expert_bytes: list[dict[str, int]] | None = None  # with it, of each rank, by weight format
    bytes_R: list[int] | None = None  # without it, of each rank


@dataclass(frozen=True)
class RebalanceStatus:
    """Rank 0: the state of re-placements."""

    state: str
    generation: int  # of the last migration that was begun
    decision: dict[str, Any] | None  # the last one, with its reason
    results: dict[str, int]  # decisions by what became of them
    moved_bytes: int  # that have reached ranks since the start
    done_bytes: int  # of the migration under way
    left_bytes: int
    progress_s: float  # since the last progress; 0 where nothing is under way
    problem: str  # of the last thing that failed, or empty
    num_failures: int = 0  # in a row
    retry_s: float = 0.0  # until the next decision may be made by itself


@dataclass(frozen=True)
class RebalanceAnswer:
    """Rank 0: what became of the command of a number."""

    number: int
    refusal: str | None
    decision: dict[str, Any] | None


@dataclass(frozen=True)
class MigrationGivenUp:
    """A rank has given a migration up, which ends it on all; rank 0 gets it too."""

    generation: int
    reason: str


@dataclass(frozen=True)
class ImportanceReport:
    """What experts of a rank have contributed in the steps that it sampled; the HTTP process passes it on to rank 0."""

    rows: list[Any]  # of each layer: its position, experts, sums of their weighted output norms, numbers of pairs


@dataclass(frozen=True)
class DrainRequest:
    """The rank got a signal to shut down: unfinished requests have `timeout_s` left."""

    timeout_s: float


@dataclass(frozen=True)
class Failed:
    """The rank is about to end with an error. `is_consequence`: the error is that another rank has failed."""

    text: str
    is_consequence: bool


@dataclass(frozen=True)
class Aborted:
    """The rank got a signal, and ends now: a second one, or one while it loads."""

    signal: str
    was_loading: bool


@dataclass(frozen=True)
class Bye:
    """The last message of a connection that is closed on purpose."""


FromRank: TypeAlias = (
    Checked
    | Ready
    | Outputs
    | RankStats
    | Recorded
    | RecordingFailed
    | MigrationPlanned
    | PlacementServed
    | RebalanceStatus
    | RebalanceAnswer
    | MigrationGivenUp
    | ImportanceReport
    | DrainRequest
    | Failed
    | Aborted
    | Bye
)


# To a rank


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
class Stop:
    """End well: the requests have ended."""


@dataclass(frozen=True)
class Abort:
    """End at once: the group has failed."""

    reason: str


ToRank: TypeAlias = (
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
    | Stop
    | Abort
)

FROM_RANK: Mapping[str, type] = {
    "checked": Checked,
    "ready": Ready,
    "outputs": Outputs,
    "stats": RankStats,
    "recorded": Recorded,
    "recording_failed": RecordingFailed,
    "migration": MigrationPlanned,
    "served": PlacementServed,
    "rebalance": RebalanceStatus,
    "rebalance_answer": RebalanceAnswer,
    "given_up": MigrationGivenUp,
    "importance": ImportanceReport,
    "drain": DrainRequest,
    "failed": Failed,
    "aborted": Aborted,
    "bye": Bye,
}
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
    "stop": Stop,
    "abort": Abort,
}
KINDS = {message_type: kind for table in (FROM_RANK, TO_RANK) for kind, message_type in table.items()}


def encode(message: FromRank | ToRank) -> bytes:
    """The JSON of a message.

    Raises:
        MessageTooLong: no receiver would take it.
    """
    kind = KINDS[type(message)]
    body = json.dumps({"kind": kind, **vars(message)}, separators=(",", ":"), default=_as_json).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageTooLong(f"a message {kind!r} of {len(body)} bytes, more than {MAX_MESSAGE_BYTES}")
    return body


def shorter_outputs(message: Outputs, error: MessageTooLong) -> list[Outputs]:
    """Messages in place of one that is too long: one for each output; of a single one, the error of its request."""
    if len(message.outputs) > 1:
        return [Outputs([output]) for output in message.outputs]
    return [Outputs([Output(output.request_id, [], "error", str(error)) for output in message.outputs])]


def request_in_parts(request: Request) -> tuple[list[PromptPart | ImageData], Request]:
    """The images of a request, the parts of a prompt too long for one message, and the request with the rest."""
    size = PROMPT_PART_TOKENS
    if request.images:
        parts_of_images = [
            part for name, array in request.images.items() for part in _image_parts(request, name, array)
        ]
        parts_of_prompt, last = request_in_parts(replace(request, images={}))
        return [*parts_of_images, *parts_of_prompt], last
    if len(request.prompt_ids) <= size:
        return [], request
    *parts, rest = (request.prompt_ids[at : at + size] for at in range(0, len(request.prompt_ids), size))
    return [PromptPart(request.id, part) for part in parts], replace(request, prompt_ids=rest)


def _image_parts(request: Request, name: str, array: Any) -> Iterator[ImageData]:
    raw = np.ascontiguousarray(array).tobytes()
    for at in range(0, max(len(raw), 1), IMAGE_PART_BYTES):
        data = base64.b64encode(raw[at : at + IMAGE_PART_BYTES]).decode()
        yield ImageData(request.id, name, array.dtype.str, list(array.shape), data)


def images_of(parts: Sequence[ImageData]) -> dict[str, Any]:
    """The arrays of the images of a request, whose parts came in order.

    Raises:
        MessageError: they make none.
    """
    raw: dict[str, bytearray] = {}
    for part in parts:
        raw.setdefault(part.name, bytearray()).extend(base64.b64decode(part.data))
    try:
        return {part.name: np.frombuffer(raw[part.name], part.dtype).reshape(part.shape) for part in parts}
    except (TypeError, ValueError) as error:
        raise MessageError(f"images that are no arrays: {error}") from None


def decode_from_rank(body: bytes) -> FromRank:
    """The message that a rank sent.

    Raises:
        MessageError: it is none.
    """
    message: FromRank = _decode(body, FROM_RANK)
    return message


def decode_to_rank(body: bytes) -> ToRank:
    """The message that the HTTP process sent.

    Raises:
        MessageError: it is none.
    """
    message: ToRank = _decode(body, TO_RANK)
    return message


def _decode(body: bytes, kinds: Mapping[str, type]) -> Any:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise MessageError(f"something that is not JSON: {body[:60]!r}") from None
    kind = fields.pop("kind", None) if isinstance(fields, dict) else None
    if not isinstance(kind, str):
        raise MessageError(f"JSON that is not a message: {body[:60]!r}")
    message_type = kinds.get(kind)
    if message_type is None:
        raise MessageError(f"a message of unknown kind {kind!r}")
    try:
        for name, read in READERS.get(message_type, {}).items():
            fields[name] = read(fields[name])
        message = message_type(**fields)
    except (TypeError, ValueError, KeyError) as error:
        raise MessageError(f"a malformed message {kind!r}: {error}") from None
    for name, allowed in FIELD_TYPES[message_type].items():
        if not isinstance(value := getattr(message, name), allowed):
            raise MessageError(f"a malformed message {kind!r}: {name} is {value!r:.60}")
    return message


def _as_json(value: Any) -> Any:
    """A part of a message as JSON holds it. There is an output for every token: its fields come without names."""
    return list(vars(value).values()) if isinstance(value, Output) else vars(value)


def _read_request(fields: Mapping[str, Any]) -> Request:
    return Request(**{**fields, "sampling": Sampling(**fields["sampling"])})


def _read_outputs(rows: Sequence[Sequence[Any]]) -> list[Output]:
    return [_read_output(*row) for row in rows]


def _read_output(
    request_id: str,
    token_ids: list[int],
    finish_reason: str | None,
    error: str | None,
    scores: Sequence[Any],
    prompt_scores: Sequence[Any] | None,
    queued_s: float | None,
) -> Output:
    prompt = None if prompt_scores is None else [Score(*score) for score in prompt_scores]
    return Output(request_id, token_ids, finish_reason, error, [Score(*score) for score in scores], prompt, queued_s)


# How the fields are read that are not plain JSON values
READERS: Mapping[type, Mapping[str, Callable[[Any], Any]]] = {
    Outputs: {"outputs": _read_outputs},
    RankStats: {"progress": lambda fields: Progress(**fields), "mover": lambda fields: MoverProgress(**fields)},
    AddRequest: {"request": _read_request},
}


def _classes_of(hint: Any) -> tuple[type, ...]:
    """The classes whose instances a field of this type may hold."""
    if isinstance(hint, UnionType):
        return tuple(class_ for part in get_args(hint) for class_ in _classes_of(part))
    if hint is float:
        return (float, int)
    if hint is LoadSums:
        return (dict,)
    return (get_origin(hint) or hint or NoneType,)


FIELD_TYPES = {
    message_type: {name: _classes_of(hint) for name, hint in get_type_hints(message_type).items()}
    for message_type in KINDS
}
