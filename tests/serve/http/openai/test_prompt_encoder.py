"""Prompts on threads: who waits for whom, and what is refused or never begun."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from rq_ep.serve.http.openai import prompt_encoder
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.prompt_encoder import SHORT_CHARS, PromptEncoder

LONG = "x" * (SHORT_CHARS + 1)


class SlowTokenizer:
    """Takes until `go` is set for a long text, and no time for a short one."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun: list[str] = []

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "abcd": 1}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.begun.append(text)
        if len(text) > SHORT_CHARS:
            assert self.go.wait(60)
        return [len(text)]


def play(scene: Callable[[SlowTokenizer, PromptEncoder], Coroutine[Any, Any, None]], max_tokens: int = 1 << 20) -> None:
    async def run() -> None:
        tokenizer = SlowTokenizer()
        try:
            await asyncio.wait_for(scene(tokenizer, PromptEncoder(tokenizer, max_tokens)), 60)
        finally:
            tokenizer.go.set()

    asyncio.run(run())


def encode(encoder: PromptEncoder, text: str) -> asyncio.Task[list[int]]:
    return asyncio.ensure_future(encoder.encode(text, "prompt", add_special_tokens=True))


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    async def scene(tokenizer: SlowTokenizer, encoder: PromptEncoder) -> None:
        long = [encode(encoder, LONG) for _ in range(8)]
        assert await encode(encoder, "abc") == [3]
        assert not any(task.done() for task in long)
        tokenizer.go.set()
        assert await asyncio.gather(*long) == [[len(LONG)]] * 8

    play(scene)


def test_a_prompt_whose_client_has_left_is_never_begun() -> None:
    async def scene(tokenizer: SlowTokenizer, encoder: PromptEncoder) -> None:
        long = [encode(encoder, LONG) for _ in range(8)]
        await asyncio.sleep(0.05)
        num_begun = len(tokenizer.begun)
        for task in long:
            task.cancel()
        await asyncio.wait(long)
        tokenizer.go.set()
        assert await encode(encoder, LONG + "y") == [len(LONG) + 1]
        assert tokenizer.begun == [LONG] * num_begun + [LONG + "y"]

    play(scene)


def test_a_text_that_cannot_fit_is_refused_unread() -> None:
    async def scene(tokenizer: SlowTokenizer, encoder: PromptEncoder) -> None:
        assert await encode(encoder, "x" * 400) == [400]
        with pytest.raises(ApiError, match=r"401 characters, .* at most 400 characters") as caught:
            await encode(encoder, "x" * 401)
        assert (caught.value.status, caught.value.param) == (400, "prompt")
        assert len(tokenizer.begun) == 1

    play(scene, max_tokens=100)


def test_only_so_many_long_prompts_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_encoder, "MAX_WAITING", 3)

    async def scene(tokenizer: SlowTokenizer, encoder: PromptEncoder) -> None:
        long = [encode(encoder, LONG) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="3 long prompts wait"):
            await encode(encoder, LONG)
        tokenizer.go.set()
        await asyncio.gather(*long)

    play(scene)
