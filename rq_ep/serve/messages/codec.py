"""Messages on the wire: each is a JSON object in a frame.

The object has the fields of a dataclass, and its `kind` as the table of its direction names it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from rq_ep.engine.progress import MoverProgress, Progress
from rq_ep.engine.requests import Output, ReasoningTokens, Request, RoutedExperts, Sampling, Score
from rq_ep.serve.messages.from_rank import FROM_RANK, FromRank, Loaded, LoadSums, Outputs, RankStats
from rq_ep.serve.messages.supervisor_messages import FROM_SUPERVISOR, TO_SUPERVISOR, FromSupervisor, ToSupervisor
from rq_ep.serve.messages.to_rank import TO_RANK, AddRequest, Regroup, ToRank

MAX_MESSAGE_BYTES = 16 << 20  # the longest in practice is `Ready`, with the placement of a large model

Message: TypeAlias = FromRank | ToRank | FromSupervisor | ToSupervisor
TABLES = (FROM_RANK, TO_RANK, FROM_SUPERVISOR, TO_SUPERVISOR)
KINDS = {message_type: kind for table in TABLES for kind, message_type in table.items()}


class MessageError(ValueError):
    """Something that is no message of its direction, or whose fields are not those of its kind."""


class MessageTooLong(MessageError):
    """A message of more than `MAX_MESSAGE_BYTES`."""


def encode(message: Message) -> bytes:
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


def decode_from_rank(body: bytes) -> FromRank:
    """The message that a rank sent.

    Raises:
        MessageError: it is none.
    """
    message: FromRank = decode(body, FROM_RANK)
    return message


def decode_to_rank(body: bytes) -> ToRank:
    """The message that the HTTP process sent to a rank.

    Raises:
        MessageError: it is none.
    """
    message: ToRank = decode(body, TO_RANK)
    return message


def decode(body: bytes, kinds: Mapping[str, type]) -> Any:
    """The message of a direction, whose kinds these are.

    Raises:
        MessageError: it is none.
    """
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
    sampling = dict(fields["sampling"])
    sampling["logit_bias"] = tuple((token_id, bias) for token_id, bias in sampling["logit_bias"])
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    reasoning = None if (tokens := fields["reasoning"]) is None else ReasoningTokens(*tokens)
    return Request(**{**fields, "sampling": Sampling(**sampling), "reasoning": reasoning})


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
    routed: Sequence[Any] | None,
) -> Output:
    return Output(
        request_id,
        token_ids,
        finish_reason,
        error,
        [Score(*score) for score in scores],
        None if prompt_scores is None else [Score(*score) for score in prompt_scores],
        queued_s,
        None if routed is None else RoutedExperts(*routed),
    )


def _read_address(value: Any) -> tuple[str, int]:
    host, port = value
    if not isinstance(host, str) or type(port) is not int:
        raise ValueError(f"{value!r:.60} is no host and port")
    return host, port


# How the fields are read that are not plain JSON values
READERS: Mapping[type, Mapping[str, Callable[[Any], Any]]] = {
    Loaded: {"store": _read_address},
    Regroup: {"store": _read_address},
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
