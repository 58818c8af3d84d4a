"""Incremental detokenization: whole characters only, and never beyond a stop string."""

from codecs import utf_8_decode
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

from rq_ep.serve.http.openai.token_bytes import NO_TEXT, TokenTable, TokenText

INCOMPLETE = "\ufffd"  # what decoders put where the bytes of a character are not complete
MAX_CHARACTER = 4  # bytes in UTF-8


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text; text that it has returned never changes afterwards.

    A special token adds no text. A character that is spread over several tokens is the text of the last of them.
    """

    def skip(self, prompt_ids: Sequence[int]) -> None:
        """Start behind a prompt that is not shown; a character that it begins is shown when it is complete."""

    def push(self, token_id: int) -> TokenText:
        """Add a token; return what becomes certain by it."""

    def flush(self) -> TokenText:
        """The rest, complete or not: no more tokens will come."""

    def peek(self, token_id: int) -> TokenText:
        """What a token would add here; a special one reads as its name."""


def detokenizers(tokenizer: Any, marks: Collection[str] = ()) -> Callable[[], Detokenizer]:
    """What makes a detokenizer for each answer.

    Args:
        tokenizer: of transformers, or an object with `decode(token_ids, skip_special_tokens=...)`.
        marks: names of special tokens that are text all the same.
    """
    table = TokenTable.of(tokenizer, marks)
    return partial(PrefixDetokenizer, tokenizer, marks) if table is None else partial(ByteDetokenizer, table)


class ByteDetokenizer:
    """Decodes UTF-8 from the bytes of the tokens; what is no UTF-8 becomes U+FFFD, as with `errors="replace"`."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._is_start = True
        self._pending = b""  # of a character that is not complete

    def skip(self, prompt_ids: Sequence[int]) -> None:
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._table[token_id].later + tail
            if len(tail) >= MAX_CHARACTER:
                break
        self._is_start = not tail
        self._pending = self._read(tail)[1]

    def push(self, token_id: int) -> TokenText:
        entry = self._table[token_id]
        if entry.whole is not None and not (self._pending or self._is_start):
            return entry.whole
        bytes_ = entry.first if self._is_start else entry.later
        text, self._pending = self._read(bytes_)
        self._is_start = self._is_start and not entry.later
        return TokenText(text, bytes_)

    def flush(self) -> TokenText:
        rest, self._pending = self._pending, b""
        return TokenText(rest.decode(errors="replace"), b"")

    def peek(self, token_id: int) -> TokenText:
        entry = self._table[token_id]
        if entry.name:
            return TokenText(entry.name, b"")
        if entry.whole is not None and not (self._pending or self._is_start):
            return entry.whole
        bytes_ = entry.first if self._is_start else entry.later
        return TokenText(self._read(bytes_)[0], bytes_)

    def _read(self, bytes_: bytes) -> tuple[str, bytes]:
        """The whole characters that more bytes complete, and the bytes that are left."""
        pending = self._pending + bytes_
        text, num_decoded = utf_8_decode(pending, "replace", False)
        return text, pending[num_decoded:]


class PrefixDetokenizer:
    """Decodes a window of tokens again with each new one: for tokenizers whose decoder is not known.

    An incomplete character cannot be told from a U+FFFD that the model has written, so either waits for what follows.
    The bytes of a token are those of its text.
    """

    MAX_WINDOW = 16  # tokens

    def __init__(self, tokenizer: Any, marks: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(getattr(tokenizer, "all_special_ids", ()))
        vocabulary = tokenizer.get_vocab() if marks else {}
        self._marks = {token_id: mark for mark in marks if (token_id := vocabulary.get(mark)) is not None}
        self._window: list[int] = []
        self._num_given = 0  # characters of the window's text

    def skip(self, prompt_ids: Sequence[int]) -> None:
        size = self.MAX_WINDOW // 2
        while size < len(prompt_ids) and not self._decode(prompt_ids[-size:]):
            size *= 2
        self._window = list(prompt_ids[-size:])
        text = self._decode(self._window)
        self._num_given = len(text) - _num_uncertain(text)

    def push(self, token_id: int) -> TokenText:
        if (mark := self._marks.get(token_id)) is not None:
            text = self.flush().text + mark
            return TokenText(text, text.encode())
        if token_id in self._special_ids:
            return NO_TEXT
        added = self._added(token_id)
        self._window.append(token_id)
        self._num_given += len(added)
        if len(self._window) > self.MAX_WINDOW:
            self.skip(self._window)
        return TokenText(added, added.encode())

    def flush(self) -> TokenText:
        rest = self._decode(self._window)[self._num_given :]
        self._num_given += len(rest)
        return TokenText(rest, rest.encode())

    def peek(self, token_id: int) -> TokenText:
        if token_id in self._special_ids:
            return TokenText(self._tokenizer.decode([token_id], skip_special_tokens=False), b"")
        added = self._added(token_id)
        return TokenText(added, added.encode())

    def _added(self, token_id: int) -> str:
        text = self._decode([*self._window, token_id])
        return text[self._num_given : len(text) - _num_uncertain(text)]

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _num_uncertain(text: str) -> int:
    """How many characters at the end may be bytes of one that is not complete."""
    return min(len(text) - len(text.rstrip(INCOMPLETE)), MAX_CHARACTER - 1)


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first; holds back what may begin one.

    Of several that end with the same character the longest counts. So the division of the text does not matter.

    Args:
        stops: the stop strings.
        shows: whether the one that has ended the text is shown.
    """

    def __init__(self, stops: Sequence[str], shows: bool = False) -> None:
        self._stops = tuple(stops)
        self._shows = shows
        self._held = ""
        self.found: str | None = None  # the one that has ended the text

    def push(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """Add text; return what may be shown, and whether a stop string has ended it. One may begin before it may end.

        Args:
            text: the new text.
            may_stop: whether a stop string that is complete in it ends it.
        """
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches and may_stop:
            self._held = ""
            end, at = min(matches)
            self.found = text[at:end]
            return text[: end if self._shows else at], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back: the text has ended, no stop string will come of it."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
