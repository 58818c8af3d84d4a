"""Prompts to token ids, on threads: short prompts never wait for long ones, and none holds up the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rq_ep.serve.http.openai.api_errors import ApiError

T = TypeVar("T")

SHORT_CHARS = 64 << 10  # encoded within tenths of a second, whatever they are
MAX_WAITING = 64  # long prompts


class PromptEncoder:
    """Encodes prompts. What a client that has left still waits for is not begun.

    Args:
        tokenizer: of transformers. Threads share it: encoding changes nothing in it, and lets go of the interpreter.
        max_tokens: tokens of the longest prompt. A text of more characters than they can stand for is refused unread;
            a tokenizer that drops characters, such as repeated spaces, would have made fewer of it.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._max_chars = max_tokens * max(map(len, tokenizer.get_vocab()))
        self._short = ThreadPoolExecutor(4, "rq_ep short prompts")
        self._long = ThreadPoolExecutor(2, "rq_ep long prompts")
        self._num_long = 0

    async def encode(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text.

        Raises:
            ApiError: it is too long, or too many long ones wait.
        """
        if len(text) > self._max_chars:
            raise ApiError(
                400,
                f"the prompt has {len(text)} characters, but this server takes at most {self._max_tokens} tokens, "
                f"which are at most {self._max_chars} characters: shorten it",
                param,
            )

        def encode() -> list[int]:
            token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return token_ids

        return await self.run(len(text), encode)

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """Do work for a prompt of so many characters on a thread."""
        loop = asyncio.get_running_loop()
        if num_chars <= SHORT_CHARS:
            return await loop.run_in_executor(self._short, work)
        if self._num_long >= MAX_WAITING:
            raise ApiError(429, f"{self._num_long} long prompts wait to be tokenized: try later")
        self._num_long += 1
        try:
            return await loop.run_in_executor(self._long, work)
        finally:
            self._num_long -= 1
