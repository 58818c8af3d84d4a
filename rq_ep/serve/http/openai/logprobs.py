"""Log-probabilities of tokens in the two shapes of OpenAI's API."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from rq_ep.engine.requests import LOWEST_LOGPROB
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.chunks import ScoredToken
from rq_ep.serve.http.openai.token_bytes import TokenText


def completion_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """Log-probabilities of a completion: lists side by side. The token itself is always among its alternatives."""
    return {
        "tokens": [token.added.text for token in tokens],
        "token_logprobs": [None if token.score is None else _finite(token.score.logprob) for token in tokens],
        "top_logprobs": [_alternatives(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """Log-probabilities of a chat completion: one entry a token."""
    content = []
    for token in tokens:
        assert token.score is not None, "a chat does not show its prompt"
        alternatives = [_entry(added, logprob) for _, added, logprob in _top(token)]
        content.append({**_entry(token.added, token.score.logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _alternatives(token: ScoredToken) -> dict[str, float] | None:
    """Text -> log-probability. Of tokens that read alike, one keeps its text: the chosen token, else the likeliest.

    The others are called `token_id:ID`, as vLLM calls tokens by their ids.
    """
    if token.score is None:
        return None
    alternatives: dict[str, float] = {}
    for token_id, added, logprob in _top(token):
        is_taken = added.text in alternatives or (added.text == token.added.text and token_id != token.id)
        alternatives[f"token_id:{token_id}" if is_taken else added.text] = _finite(logprob)
    alternatives.setdefault(token.added.text, _finite(token.score.logprob))
    return alternatives


def _top(token: ScoredToken) -> Iterator[tuple[int, TokenText, float]]:
    """Id, text and log-probability of the likeliest tokens; the one that was chosen reads as it does in the text."""
    if token.score is not None:
        for token_id, added, logprob in zip(token.score.top_ids, token.top, token.score.top_logprobs, strict=True):
            yield token_id, token.added if token_id == token.id else added, logprob


def _entry(added: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": added.text, "logprob": _finite(logprob), "bytes": list(added.bytes_)}


def _finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    if not logprob < inf:
        raise ApiError(500, f"the model's log-probabilities are not finite ({logprob})")
    return max(logprob, LOWEST_LOGPROB)
