"""Log-probabilities of tokens in the two shapes of OpenAI's API."""

from collections.abc import Callable, Sequence
from typing import Any

from rq_ep.serve.http.openai.chunks import ScoredToken

TokenText = Callable[[int], str]


def completion_logprobs(tokens: Sequence[ScoredToken], token_text: TokenText) -> dict[str, Any]:
    """Log-probabilities of a completion: lists side by side. The token itself is always among its alternatives."""
    return {
        "tokens": [token_text(token.id) for token in tokens],
        "token_logprobs": [None if token.score is None else token.score.logprob for token in tokens],
        "top_logprobs": [_alternatives(token, token_text) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], token_text: TokenText) -> dict[str, Any]:
    """Log-probabilities of a chat completion: one entry a token."""
    content = []
    for token in tokens:
        assert token.score is not None, "a chat does not show its prompt"
        top = zip(token.score.top_ids, token.score.top_logprobs, strict=True)
        alternatives = [_entry(token_text(top_id), logprob) for top_id, logprob in top]
        content.append({**_entry(token_text(token.id), token.score.logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _alternatives(token: ScoredToken, token_text: TokenText) -> dict[str, float] | None:
    if token.score is None:
        return None
    alternatives: dict[str, float] = {}
    for token_id, logprob in zip(token.score.top_ids, token.score.top_logprobs, strict=True):
        alternatives.setdefault(token_text(token_id), logprob)  # different bytes may read alike: the likeliest stands
    alternatives.setdefault(token_text(token.id), token.score.logprob)
    return alternatives


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
