"""The text of an answer, read as it comes.

A parser is a generator that yields parts, and None where it must wait for more text. It sees the text only through
`AnswerText`, so that the division of the text into pieces changes nothing.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from rq_ep.serve.http.openai.detokenizer import overlap


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    """The name of a function, whose arguments follow."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the arguments of the call that has started last."""

    text: str


@dataclass(frozen=True)
class MalformedCall:
    """The call that has started last is none after all: this is all of it, as the model wrote it."""

    text: str


Part = Content | Reasoning | CallStart | Arguments | MalformedCall
Result = TypeVar("Result")
Parsing = Generator[Part | None, None, Result]


class AnswerText:
    """What is there of an answer and not yet read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what comes before is read
        self._has_ended = False

    def push(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._has_ended = True

    def until(self, kind: Callable[[str], Part], *marks: str) -> Parsing[str]:
        """Read on behind the first of some marks, and return it; an empty one: the answer ends without.

        Args:
            kind: what the text before it is.
            marks: that end the text.
        """
        while True:
            end, mark = self._find(marks)
            if not mark and not self._has_ended:
                end -= max((overlap(self._text[self._at :], mark) for mark in marks), default=0)
            piece = self._text[self._at : end]
            self._at = end + len(mark)
            if piece:
                yield kind(piece)
            if mark or self._has_ended:
                return mark
            yield None

    def before(self, *marks: str) -> Parsing[tuple[str, str]]:
        """Read on behind the first of some marks; return the text before it, and the mark as `until` does."""
        while True:
            end, mark = self._find(marks)
            if mark or self._has_ended:
                piece = self._text[self._at : end]
                self._at = end + len(mark)
                return piece, mark
            yield None

    def char(self, closing: str = "") -> Parsing[str]:
        """Read one character; an empty one: here the answer ends, or a closing mark follows, which stays."""
        while not self._has_ended and self._may_begin(closing, self._at):
            yield None
        if self._at == len(self._text) or (closing and self._text.startswith(closing, self._at)):
            return ""
        self._at += 1
        return self._text[self._at - 1]

    def skip(self, *marks: str) -> Parsing[str]:
        """Read on behind one of some marks, with space before it, and return both; empty: none of them follows."""
        while True:
            start = self._after_space()
            if mark := next((mark for mark in marks if self._text.startswith(mark, start)), ""):
                read = self._text[self._at : start + len(mark)]
                self._at = start + len(mark)
                return read
            if self._has_ended or not any(self._may_begin(mark, start) for mark in marks):
                return ""
            yield None

    def follows(self, mark: str) -> Parsing[bool]:
        """Whether a mark follows, with or without space before it."""
        while not self._has_ended and self._may_begin(mark, self._after_space()):
            yield None
        return self._text.startswith(mark, self._after_space())

    def _find(self, marks: tuple[str, ...]) -> tuple[int, str]:
        """Where the first of some marks stands, and which: the longest; the end of the text and an empty one: none."""
        found = [(at, -len(mark), mark) for mark in marks if (at := self._text.find(mark, self._at)) >= 0]
        return (min(found)[0], min(found)[2]) if found else (len(self._text), "")

    def _after_space(self) -> int:
        return len(self._text) - len(self._text[self._at :].lstrip())

    def _may_begin(self, mark: str, at: int) -> bool:
        """Whether the text from a place on is the beginning of a mark, or empty."""
        rest = self._text[at : at + len(mark)]
        return at == len(self._text) or (len(rest) < len(mark) and mark.startswith(rest))
