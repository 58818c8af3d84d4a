"""Chunks of an answer: text cut at stop strings, and the tokens behind it with their scores."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from rq_ep.engine.requests import Output, Score
from rq_ep.serve.http.openai.detokenizer import Detokenizer, StopStrings
from rq_ep.serve.http.openai.token_bytes import NO_TEXT, TokenText


@dataclass(frozen=True)
class ScoredToken:
    """A token, what it adds to the text and where, and its score, which the first of a prompt does not have.

    `top` is what the likeliest tokens at its place would have added, in the order of the score.
    """

    id: int
    added: TokenText
    offset: int
    score: Score | None
    top: tuple[TokenText, ...]


@dataclass(frozen=True)
class Chunk:
    """A part of an answer; the last one has the reason of the end. `tokens` are given if scores were asked for."""

    text: str
    num_tokens: int  # generated
    finish_reason: str | None
    stop_reason: str | int | None = None  # the stop string, or id of the stop token, that has ended the answer
    tokens: tuple[ScoredToken, ...] = ()
    routed_experts: str | None = None  # of the whole answer, with the last chunk


class TextChunker:
    """Turns the tokens of one answer into chunks, the prompt before them if it is to be shown too.

    The texts of the tokens of all chunks, put together, are the text of all chunks; where a stop string cuts it, the
    token that is cut is the last and is whole. An incomplete character at the end is U+FFFD, by the last token.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], includes_stop: bool = False, min_tokens: int = 0,
        stop_token_ids: Collection[int] = (),
    ) -> None:  # fmt: skip
        """
        Args:
            detokenizer: of this answer.
            stops: strings that end it.
            includes_stop: whether the one that has ended it is shown.
            min_tokens: of the answer, in which none is looked for.
            stop_token_ids: tokens by which the model ends it, beside those of every answer.
        """
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(stops, includes_stop)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._num_free = min_tokens  # tokens that are still to come before stop strings are looked for
        self._num_read = 0  # characters the tokens so far have come to,
        self._num_shown = 0  # of which these were handed out
        self._waiting: list[ScoredToken] = []

    def skip(self, prompt_ids: Sequence[int]) -> None:
        """Start behind a prompt that is not shown."""
        self._detokenizer.skip(prompt_ids)

    def echo(
        self, prompt_ids: Sequence[int], scores: Sequence[Score | None] | None, finish_reason: str | None
    ) -> Chunk:
        """A part of the prompt, which no stop string cuts. Takes time for a long one.

        Args:
            prompt_ids: of the part.
            scores: one for each token; None: they were not asked for.
            finish_reason: of an answer that ends with it.
        """
        each = [None] * len(prompt_ids) if scores is None else scores
        tokens = [self._read(token_id, score) for token_id, score in zip(prompt_ids, each, strict=True)]
        text = "".join(token.added.text for token in tokens)
        if finish_reason is not None:
            text += self._flush(tokens)
        self._num_shown += len(text)
        return Chunk(text, 0, finish_reason, tokens=() if scores is None else tuple(tokens))

    def chunk(self, output: Output) -> Chunk:
        """The text that new tokens of the request let be shown."""
        tokens = []
        for at, token_id in enumerate(output.token_ids):
            is_end = output.finish_reason == "stop" and at == len(output.token_ids) - 1
            tokens.append(self._read(token_id, output.scores[at] if output.scores else None, is_end))
        texts = [token.added.text for token in tokens]
        num_free = min(self._num_free, len(texts))
        self._num_free -= num_free
        rest = self._flush(tokens) if output.finish_reason is not None else ""
        free, _ = self._stop_strings.push("".join(texts[:num_free]), may_stop=False)
        text, is_stopped = self._stop_strings.push("".join(texts[num_free:]) + rest)
        shown = free + text
        if output.finish_reason is not None and not is_stopped:
            shown += self._stop_strings.flush()
        self._num_shown += len(shown)
        if output.scores:
            self._waiting += tokens
        reason = "stop" if is_stopped else output.finish_reason
        stop_reason: str | int | None = self._stop_strings.found
        if stop_reason is None and reason == "stop":
            stop_reason = next((last for last in output.token_ids[-1:] if last in self._stop_token_ids), None)
        shown_tokens = self._tokens(is_all=reason is not None and not is_stopped)
        return Chunk(shown, len(tokens), reason, stop_reason, shown_tokens)

    def _tokens(self, is_all: bool) -> tuple[ScoredToken, ...]:
        """The tokens whose text has begun to be shown; those beyond a stop string never come."""
        begun = [token for token in self._waiting if is_all or token.offset < self._num_shown]
        self._waiting = self._waiting[len(begun) :]
        return tuple(begun)

    def _read(self, token_id: int, score: Score | None, is_end: bool = False) -> ScoredToken:
        """Read a token; the one by which the model ends an answer is not shown."""
        top = () if score is None else tuple(map(self._detokenizer.peek, score.top_ids))
        added = NO_TEXT if is_end else self._detokenizer.push(token_id)
        token = ScoredToken(token_id, added, self._num_read, score, top)
        self._num_read += len(added.text)
        return token

    def _flush(self, tokens: list[ScoredToken]) -> str:
        """What is left of the text; the last token gets it."""
        rest = self._detokenizer.flush()
        self._num_read += len(rest.text)
        if tokens:
            text, bytes_ = tokens[-1].added
            tokens[-1] = replace(tokens[-1], added=TokenText(text + rest.text, bytes_ + rest.bytes_))
        return rest.text
