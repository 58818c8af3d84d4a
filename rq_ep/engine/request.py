"""What goes into an engine and what comes out of it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen. Temperature 0 takes the likeliest one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt to be continued by at most `max_tokens` tokens."""

    id: str
    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens it may come to: what it can take of a rank's KV cache."""
        return len(self.prompt_ids) + self.max_tokens


@dataclass(frozen=True)
class Output:
    """News of a request: tokens since the last news, and whether it ended.

    `finish_reason` is `stop` (the model's end token, which is the last of `token_ids`), `length`, or `error`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None
