"""Requests to a server that speaks OpenAI's completions, when each of their tokens came, and figures of them all.

Names and definitions of the figures are those of `vllm bench serve`.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np

from rq_ep.parallel.host import short_collections

TIMEOUT_S = 300.0
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Job:
    """A request: its prompt, how many tokens it asks for, and after how many its client leaves (None: it stays)."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    leaves_after: int | None = None


@dataclass
class Answer:
    """What became of a job; times on one clock, in seconds."""

    job: Job
    sent_s: float
    token_s: list[float] = field(default_factory=list)  # arrival of each piece of the answer
    end_s: float = 0.0
    num_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    left: bool = False

    @property
    def is_complete(self) -> bool:
        return self.error is None and not self.left and self.finish_reason is not None


async def drive(
    url: str,
    model: str,
    jobs: Sequence[Job],
    *,
    max_concurrency: int,
    rate: float | None = None,
    seed: int = 0,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> list[Answer]:
    """Send all jobs, greedy and without end tokens, and wait for their answers, in the order of the jobs.

    Args:
        url: of the server, without `/v1`.
        model: its name there.
        jobs: the requests.
        max_concurrency: requests under way at once.
        rate: mean requests per second, with exponential gaps; None: as fast as the concurrency allows.
        seed: of the gaps.
        on_answer: called with each answer when it ends.
        more: parameters of all requests, beside ours or in place of them.
    """
    gate = asyncio.Semaphore(max_concurrency)
    gaps = random.Random(seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=max_concurrency)

    async def send(job: Job) -> Answer:
        async with gate:
            answer = await ask(client, model, job, more)
            on_answer(answer)
            return answer

    # A collection that looks at all of torch and transformers would be a pause that no server has made.
    with short_collections():
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
            tasks = []
            for job in jobs:
                tasks.append(asyncio.ensure_future(send(job)))
                if rate is not None:
                    await asyncio.sleep(gaps.expovariate(rate))
            return await asyncio.gather(*tasks)


async def ask(
    client: httpx.AsyncClient, model: str, job: Job, more: Mapping[str, Any] = MappingProxyType({})
) -> Answer:
    """Send one job, greedy and without end tokens unless `more` says otherwise, and wait for its answer."""
    body = {
        "model": model, "prompt": list(job.prompt_ids), "max_tokens": job.max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    answer = Answer(job, time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()}"
            else:
                await _read(response, answer)
    except httpx.HTTPError as error:
        answer.error = repr(error)
    answer.end_s = answer.token_s[-1] if answer.token_s else time.perf_counter()
    return answer


async def _read(response: httpx.Response, answer: Answer) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            answer.error = event["error"]["message"]
            return
        if event.get("usage"):
            answer.num_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            answer.token_s.append(time.perf_counter())
            answer.text += choice["text"]
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        if answer.job.leaves_after is not None and len(answer.token_s) >= answer.job.leaves_after:
            answer.left = True
            return


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of a run, under the names of `vllm bench serve`; latencies in milliseconds."""
    done = [answer for answer in answers if answer.is_complete]
    duration_s = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    total_input = sum(len(answer.job.prompt_ids) for answer in done)
    total_output = sum(answer.num_tokens for answer in done)
    times_ms: dict[str, list[float]] = {
        "ttft": [1e3 * (answer.token_s[0] - answer.sent_s) for answer in done],
        "tpot": [
            1e3 * (answer.end_s - answer.token_s[0]) / (answer.num_tokens - 1)
            for answer in done
            if answer.num_tokens > 1
        ],
        "itl": [1e3 * gap for answer in done for gap in np.diff(answer.token_s)],
        "e2el": [1e3 * (answer.end_s - answer.sent_s) for answer in done],
    }
    results: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": sum(answer.error is not None for answer in answers),
        "total_input": total_input,
        "total_output": total_output,
        "request_throughput": len(done) / duration_s,
        "output_throughput": total_output / duration_s,
        "total_token_throughput": (total_input + total_output) / duration_s,
    }
    for name, values in times_ms.items():
        results |= latencies_ms(name, values)
    return results


def latencies_ms(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, deviation, median and percentiles of latencies of one kind; nothing where there are none."""
    if not values:
        return {}
    shown = {f"mean_{name}_ms": float(np.mean(values)), f"std_{name}_ms": float(np.std(values))}
    shown[f"median_{name}_ms"] = float(np.median(values))
    return shown | {f"p{at}_{name}_ms": float(np.percentile(values, at)) for at in PERCENTILES}


def random_jobs(texts: Sequence[Sequence[int]], num_jobs: int, input_len: int, output_len: int, seed: int) -> list[Job]:
    """Jobs whose prompts are cut out of tokenized texts; lengths lie between half and one and a half of the given.

    Args:
        texts: token ids of texts, some longer than one and a half `input_len`.
        num_jobs: how many.
        input_len: mean tokens of a prompt.
        output_len: mean tokens of an answer.
        seed: the same jobs for the same seed.
    """
    draw = random.Random(seed)
    jobs = []
    for _ in range(num_jobs):
        length = max(draw.randint(input_len // 2, input_len + input_len // 2), 1)
        text = draw.choice([text for text in texts if len(text) >= length])
        start = draw.randint(0, len(text) - length)
        tokens = max(draw.randint(output_len // 2, output_len + output_len // 2), 1)
        jobs.append(Job(tuple(text[start : start + length]), tokens))
    return jobs
