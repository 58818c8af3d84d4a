"""Incremental detokenization: whole characters only, and never beyond a stop string."""

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"  # what decoders put where the bytes of a character are not complete


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Turns a growing list of token ids into text; text that it has returned never changes afterwards.

    A token's text may depend on the token before it (spaces), and a character may be spread over several tokens. So a
    window of tokens is decoded with and without the new ones, and a character that is not complete waits for the rest.
    """

    MAX_WAITING = 8  # no character takes more tokens: beyond it the bytes are no text at all

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._start = 0  # the window starts here,
        self._known = 0  # and its text is known up to here

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that has become certain."""
        parts = []
        for token_id in token_ids:
            self._token_ids.append(token_id)
            parts.append(self._advance(len(self._token_ids) - self._known >= self.MAX_WAITING))
        return "".join(parts)

    def flush(self) -> str:
        """The rest, complete or not: no more tokens will come."""
        return self._advance(is_final=True)

    def _advance(self, is_final: bool) -> str:
        known = self._decode(self._token_ids[self._start : self._known])
        text = self._decode(self._token_ids[self._start :])
        if len(text) <= len(known) or (text.endswith(INCOMPLETE) and not is_final):
            return ""
        self._start, self._known = self._known, len(self._token_ids)
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


class StopStrings:
    """Cuts a stream of text before the first stop string; holds back what may turn out to begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return what may be shown, and whether a stop string has ended it."""
        text = self._held + text
        matches = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back: the text has ended, no stop string will come of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
