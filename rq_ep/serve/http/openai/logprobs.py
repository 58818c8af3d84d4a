"""Log-probabilities of tokens in the two shapes of OpenAI's API."""

from collections.abc import Callable, Sequence
from typing import Any

from rq_ep.serve.http.openai.chunks import ScoredToken

TokenText = Callable[[int], str]


def completion_logprobs(tokens: Sequence[ScoredToken], token_text: TokenText) -> dict[str, Any]:
    """As completions have them: lists side by side. The token itself is always among its alternatives."""
    return {
        "tokens": [token_text(token.id) for token in tokens],
        "token_logprobs": [None if token.score is None else token.score.logprob for token in tokens],
        "top_logprobs": [_alternatives(token, token_text) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], token_text: TokenText) -> dict[str, Any]:
    """As chat completions have them: one entry a token."""
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
    found: dict[str, float] = {}
    for token_id, logprob in zip(token.score.top_ids, token.score.top_logprobs, strict=True):
        found.setdefault(token_text(token_id), logprob)  # different bytes may read alike: the likeliest stands
    found.setdefault(token_text(token.id), token.score.logprob)
    return found


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
