"""Calls written as JSON: `{"name": ..., "arguments": {...}}`, where the arguments may be called `parameters`."""

import json
import re
from typing import Any

from rq_ep.serve.http.openai.tool_parsers.answer_text import (
    AnswerText,
    Arguments,
    CallStart,
    Content,
    MalformedCall,
    Parsing,
)

# A call as most models write it, up to its arguments: they can be given while they come.
STRING = r'"(?:[^"\\]|\\.)*"'
HEAD = re.compile(
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*({STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*\{{'
)


class JsonDepth:
    """How many brackets of a JSON text are open."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, char: str) -> None:
        if self._in_string:
            is_quote = char == '"' and not self._is_escaped
            self._is_escaped = char == "\\" and not self._is_escaped
            self._in_string = not is_quote
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1


def parse_object(text: str) -> dict[str, Any] | None:
    """The object whose JSON a text is; None: it is not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_call(text: AnswerText, opening: str, closing: str = "") -> Parsing[bool]:
    """One call; return whether it was one.

    Args:
        text: begins with its JSON.
        opening: what came before it, which is shown if it is no call.
        closing: the mark behind it, which then ends it even within a string; it is read. Empty: its own bracket does.
    """
    raw, depth, is_named, in_arguments = "", JsonDepth(), False, False
    while char := (yield from text.char(closing)):
        raw += char
        depth.push(char)
        if in_arguments:
            yield Arguments(char)
        elif not is_named and depth.depth == 2 and char == "{" and (name := _name(HEAD.fullmatch(raw))):
            is_named = True
            yield CallStart(name)
            yield Arguments(char)
        in_arguments = is_named and depth.depth >= 2
        if depth.depth <= 0 and char.strip():
            break
    rest = ""
    if closing:
        while char := (yield from text.char(closing)):
            rest += char
        closing = yield from text.skip(closing)
    call = parse_object(raw)
    if is_named and call is None:
        yield MalformedCall(opening + raw + rest + closing)
        return False
    if not is_named:
        if call is None or (made := _call(call)) is None:
            yield Content(opening + raw + rest + closing)
            return False
        yield CallStart(made[0])
        yield Arguments(made[1])
    if rest.strip():
        yield Content(rest)
    return True


def json_calls(text: AnswerText, opening: str) -> Parsing[None]:
    """A list of calls, behind its bracket, which `opening` ends with."""
    while (yield from json_call(text, opening)):
        if (opening := (yield from text.skip(",", "]"))).endswith("]") or not opening:
            return


def named_call(text: AnswerText, opening: str, head: re.Pattern[str], closing: str = "") -> Parsing[bool]:
    """One call as its name and then the JSON of its arguments; return whether it was one.

    Args:
        text: begins with the name.
        opening: as `json_call`'s.
        head: what comes before the arguments; its first group is the name.
        closing: as `json_call`'s; what comes before it is not shown.
    """
    raw, arguments, depth, is_named = "", "", JsonDepth(), False
    while char := (yield from text.char(closing)):
        raw += char
        if not is_named and char == "{":
            if (found := head.fullmatch(raw)) is None:
                break
            is_named = True
            yield CallStart(found[1])
        if is_named:
            arguments += char
            depth.push(char)
            yield Arguments(char)
            if depth.depth <= 0:
                break
    if closing:
        rest, closing = yield from text.before(closing)
        raw += rest + closing
    is_call = is_named and parse_object(arguments) is not None
    if not is_call:
        yield MalformedCall(opening + raw) if is_named else Content(opening + raw)
    return is_call


def _name(head: re.Match[str] | None) -> str | None:
    if head is None:
        return None
    try:
        return str(json.loads(head[1]))
    except ValueError:
        return None


def _call(value: dict[str, Any]) -> tuple[str, str] | None:
    """Name and arguments of a call whose keys stand in another order, or that has no arguments."""
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if not (isinstance(name, str) and name):
        return None
    if isinstance(arguments, str) and parse_object(arguments) is not None:
        return name, arguments
    return (name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
