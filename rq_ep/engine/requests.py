"""The requests that go into an engine, and the outputs that come out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LOWEST_LOGPROB = -9999.0  # of a token whose probability is zero: JSON has no infinity; vLLM's stand-in


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen, in vLLM's terms. Temperature 0 takes the likeliest one.

    Penalties of presence and frequency go by the tokens of the answer, that of repetition by those of the prompt too.
    `logit_bias` has pairs of a token and what is added to its logit. Until there are `min_tokens` no token that ends
    the answer is chosen; `stop_token_ids` are such tokens of this request alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0  # 0: any number
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Sequence[tuple[int, float]] = ()
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()

    @property
    def processes_logits(self) -> bool:
        """Whether the logits are changed before the temperature."""
        is_penalized = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(is_penalized or self.logit_bias or self.min_tokens)


class ReasoningTokens(NamedTuple):
    """The tokens of reasoning before an answer of a given form.

    `opening` begins it, as the first token of the answer; None: the answer begins within. The last of `closing` ends
    it, where the others begin the header that it ends: Harmony's header of the final channel may have more between.
    """

    opening: int | None
    closing: list[int]


@dataclass(frozen=True)
class Request:
    """A prompt to be continued by at most `max_tokens` tokens.

    The last `num_answered` tokens of the prompt are of the answer already: another rank has given them.
    `num_logprobs` asks for the log-probability of every token, and of so many of the likeliest at its place;
    `scores_prompt` asks for them of the prompt's tokens too, and then `max_tokens` may be 0. `images` has what the
    model's processor made of images: arrays, by the names under which its forward takes them (padded cache only).
    `grammar`, as llguidance writes it, is what the answer follows, behind the `reasoning` that may precede it.
    `routed_from` asks for the experts of its tokens from that one on; all but the last have some. They come when those
    of `routed_every` tokens are there, and with the last token: a message for each would cost more than the rest of it.
    """

    id: str
    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    num_logprobs: int | None = None
    scores_prompt: bool = False
    images: Mapping[str, Any] = field(default_factory=dict)
    num_answered: int = 0
    grammar: str | None = None
    reasoning: ReasoningTokens | None = None
    routed_from: int | None = None
    routed_every: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens it may come to: what it can take of a rank's KV cache."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def num_prompt_logprobs(self) -> int:
        """Log-probabilities that are wanted of its prompt."""
        return len(self.prompt_ids) * (1 + (self.num_logprobs or 0)) if self.scores_prompt else 0


class Batch(NamedTuple):
    """The content of a rank's step: each request and how many of its tokens, in their order in the step."""

    parts: list[tuple[str, int]]
    is_prefill: bool  # some of the tokens are of prompts
    has_images: bool = False  # whose tokens some families keep from the routed experts
    starts: Sequence[int] = ()  # of each part, the place of its first token in its sequence


class Score(NamedTuple):
    """Log-probabilities at a token's place, by the model's own distribution, before temperature and top-p."""

    logprob: float
    top_ids: list[int]  # the likeliest tokens, likeliest first
    top_logprobs: list[float]


class RoutedExperts(NamedTuple):
    """The experts of consecutive tokens: logical ids, by token, MoE layer, and place among the router's choices."""

    shape: list[int]  # [T, L, K]
    dtype: str  # NumPy's
    data: str  # base64


@dataclass(frozen=True)
class Output:
    """New tokens of a request since its last output, and whether it ended.

    `finish_reason` is `stop` (the model's end token, which is the last of `token_ids`), `length`, or `error`.
    `scores` has one entry for each of `token_ids` where the request asks for them. `prompt_scores` has one for each
    token of the prompt but its first, and comes in parts, in outputs of their own before the first tokens. `queued_s`,
    with the first tokens, is the time from its arrival on the rank to its first step. `routed`, where the request asks
    for it and they are as many as it wants at a time, has the experts of the tokens before the last of `token_ids` that
    have not come yet; many of them come in outputs of their own before.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None
    scores: list[Score] = field(default_factory=list)
    prompt_scores: list[Score] | None = None
    queued_s: float | None = None
    routed: RoutedExperts | None = None
