"""Chunks of an answer: text cut at stop strings, and the tokens behind it with their scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from rq_ep.engine.requests import Output, Score
from rq_ep.serve.http.openai.detokenizer import Decoder, Detokenizer, StopStrings


@dataclass(frozen=True)
class ScoredToken:
    """A token, where its text begins in what is shown, and its score, which the first of a prompt does not have."""

    id: int
    offset: int
    score: Score | None


@dataclass(frozen=True)
class Chunk:
    """A part of an answer; the last one has the reason of the end. `tokens` are given if scores were asked for."""

    text: str
    num_tokens: int  # generated
    finish_reason: str | None
    tokens: tuple[ScoredToken, ...] = ()


class TextChunker:
    """Turns the tokens of one answer into chunks, the prompt before them if it is to be shown too."""

    def __init__(self, tokenizer: Decoder, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(stops)
        self._num_read = 0  # characters the tokens so far have come to,
        self._num_shown = 0  # of which these were handed out
        self._waiting: list[ScoredToken] = []

    def echo(self, prompt_ids: Sequence[int], scores: Sequence[Score] | None, finish_reason: str | None) -> Chunk:
        """The prompt, which no stop string cuts. Takes time for a long one.

        Args:
            scores: one for each token but the first; None: they were not asked for.
        """
        text, tokens = "", []
        later: Sequence[Score | None] = [None] * (len(prompt_ids) - 1) if scores is None else scores
        for token_id, score in zip(prompt_ids, (None, *later), strict=True):
            tokens.append(ScoredToken(token_id, self._num_read, score))
            text += self._read(token_id)
        self._num_shown += len(text)
        return Chunk(text, 0, finish_reason, () if scores is None else tuple(tokens))

    def chunk(self, output: Output) -> Chunk:
        """The text that new tokens of the request let be shown."""
        text = ""
        last = len(output.token_ids) - 1
        for at, token_id in enumerate(output.token_ids):
            if output.scores:
                self._waiting.append(ScoredToken(token_id, self._num_read, output.scores[at]))
            if not (at == last and output.finish_reason == "stop"):  # an end token has no text
                text += self._read(token_id)
        shown, is_stopped = self._stop_strings.push(text)
        if output.finish_reason is not None and not is_stopped:
            rest, is_stopped = self._stop_strings.push(self._detokenizer.flush())
            shown += rest if is_stopped else rest + self._stop_strings.flush()
        self._num_shown += len(shown)
        reason = "stop" if is_stopped else output.finish_reason
        return Chunk(shown, last + 1, reason, self._tokens(is_all=reason is not None and not is_stopped))

    def _tokens(self, is_all: bool) -> tuple[ScoredToken, ...]:
        """The tokens whose text has begun to be shown; those beyond a stop string never come."""
        begun = [token for token in self._waiting if is_all or token.offset < self._num_shown]
        self._waiting = self._waiting[len(begun) :]
        return tuple(begun)

    def _read(self, token_id: int) -> str:
        text = self._detokenizer.push([token_id])
        self._num_read += len(text)
        return text
