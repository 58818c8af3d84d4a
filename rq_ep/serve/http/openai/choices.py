"""The answers to one body, which has a prompt or several and may ask for several answers to each."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress

from rq_ep.serve.http.openai.chunks import Chunk


async def merged(answers: Sequence[AsyncIterator[Chunk]]) -> AsyncIterator[tuple[int, Chunk]]:
    """The chunks of several answers as they come, each with the number of its answer; leaving early closes them all.

    An error of one ends all. A reader that is slow is waited for.
    """
    if len(answers) == 1:
        async with aclosing(answers[0]) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(len(answers))

    async def read(number: int, answer: AsyncIterator[Chunk]) -> None:
        try:
            async with aclosing(answer) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    await queue.put((number, chunk))
        except Exception as error:
            await queue.put((number, error))
        else:
            await queue.put((number, None))

    readers = [asyncio.ensure_future(read(number, answer)) for number, answer in enumerate(answers)]
    try:
        num_left = len(readers)
        while num_left:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield number, item
    finally:
        for reader in readers:
            reader.cancel()
        for reader in readers:
            with suppress(asyncio.CancelledError):
                await reader


async def setting(event: asyncio.Event, answer: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """An answer that sets an event when its first chunk has come, or it has ended."""
    try:
        async with aclosing(answer) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                event.set()
                yield chunk
    finally:
        event.set()


async def after(event: asyncio.Event, answer: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """An answer that begins when an event is set."""
    await event.wait()
    async with aclosing(answer) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            yield chunk


def best(answers: Sequence[Sequence[Chunk]], num: int) -> list[int]:
    """The numbers of the answers with the highest log-probability per token, the best one first.

    Args:
        answers: chunks of each, with the scores of their tokens.
        num: how many.
    """

    def mean_logprob(chunks: Sequence[Chunk]) -> float:
        logprobs = [
            token.score.logprob for chunk in chunks if chunk.num_tokens for token in chunk.tokens if token.score
        ]
        return sum(logprobs) / max(len(logprobs), 1)

    return sorted(range(len(answers)), key=lambda number: -mean_logprob(answers[number]))[:num]
