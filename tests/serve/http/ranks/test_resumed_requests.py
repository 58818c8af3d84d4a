"""Requests whose rank dies or leaves: their clients notice a pause and nothing else."""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rq_ep.engine.requests import Output, Request, Sampling, Score
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks import routed_requests
from rq_ep.serve.http.ranks.group_life import GroupState
from rq_ep.serve.messages import DrainRequest, request_parts
from tests.serve.http.ranks.fake_group import FakeGroup, answer, run_at_random

TIMEOUT_S = 60


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, TIMEOUT_S))


def ask(group: FakeGroup, request: Request) -> asyncio.Task[list[Output]]:
    async def outputs() -> list[Output]:
        return [output async for output in group.router.generate(request)]

    return asyncio.ensure_future(outputs())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def scores(outputs: list[Output]) -> list[Score]:
    return [score for output in outputs for score in output.scores]


def prompt_scores(outputs: list[Output]) -> list[Score]:
    return [score for output in outputs for score in output.prompt_scores or []]


REQUEST = Request("a", [97, 98, 99], 20, Sampling(seed=3), ignore_eos=True)


def test_the_rest_of_an_answer_comes_from_another_rank() -> None:
    async def scene() -> None:
        group = FakeGroup(3)
        request = replace(REQUEST, routed_from=0)
        task = ask(group, request)
        await settle()
        for _ in range(5):
            group.step(0)
        group.kill(0)
        await settle()
        expected = tokens(list(answer(request)))
        prompt_ids = [97, 98, 99, *expected[:5]]
        rest = replace(request, id="a-1", prompt_ids=prompt_ids, max_tokens=15, num_answered=5, routed_from=7)
        assert group.process(1).taken == [rest]
        group.deliver(2)
        for _ in range(15):
            group.step(1)
        outputs = await task
        assert tokens(outputs) == expected
        routed = [token for output in outputs if output.routed for token in bytes.fromhex(output.routed.data)]
        assert routed == [97, 98, 99, *expected[:-1]]
        assert [output.finish_reason for output in outputs] == [None] * 19 + ["length"]
        assert group.num_resumptions == 1
        assert [set(seconds) for seconds in group.recoveries] == [
            {"detect", "re-form", "re-home", "total"}, {"re-prefill"},
        ]  # fmt: skip

    play(scene())


def test_what_a_rank_that_is_lost_still_sends_is_ignored() -> None:
    async def scene() -> None:
        group = FakeGroup(2)
        task = ask(group, REQUEST)
        await settle()
        late = group.process(0)
        late.step()
        group.kill(0, loses_messages=True)
        await settle()
        for message in late.sent:
            group.router.on_message(0, message)
        for _ in range(20):
            group.step(1)
        assert tokens(await task) == tokens(list(answer(REQUEST)))

    play(scene())


@pytest.mark.parametrize("num_parts", [0, 1, 2, 3])
@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("num_prompt", [1, 7])
def test_scores_of_a_prompt_come_once(num_parts: int, max_tokens: int, num_prompt: int) -> None:
    request = Request("a", [100] * num_prompt, max_tokens, num_logprobs=2, scores_prompt=True, ignore_eos=True)
    expected = list(answer(request))

    async def scene() -> None:
        group = FakeGroup(2)
        task = ask(group, request)
        await settle()
        for _ in range(num_parts):
            group.step(0)
        if not task.done():
            group.kill(0)
        await settle()
        for _ in range(20):
            group.step(1)
        outputs = await task
        assert prompt_scores(outputs) == prompt_scores(expected)
        assert any(output.prompt_scores is not None for output in outputs)
        assert tokens(outputs) == tokens(expected)
        assert scores(outputs) == scores(expected)
        assert outputs[-1].finish_reason == "length"

    play(scene())


def test_a_prompt_that_is_scored_is_not_scored_again() -> None:
    async def scene() -> None:
        group = FakeGroup(2)
        request = Request("a", [100] * 4, 4, num_logprobs=2, scores_prompt=True, ignore_eos=True)
        task = ask(group, request)
        await settle()
        group.step(0)
        group.kill(0)
        await settle()
        (rest,) = group.process(1).taken
        assert (rest.scores_prompt, rest.prompt_ids, rest.max_tokens) == (False, [100] * 4, 4)
        task.cancel()

    play(scene())


def test_images_and_long_prompts_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parts, "PROMPT_PART_TOKENS", 4)
    image = np.arange(6, dtype=np.float32).reshape(2, 3)

    async def scene() -> None:
        group = FakeGroup(2)
        request = replace(REQUEST, prompt_ids=list(range(97, 108)), images={"pixel_values": image})
        task = ask(group, request)
        await settle()
        group.step(0)
        group.kill(0)
        await settle()
        (rest,) = group.process(1).taken
        np.testing.assert_array_equal(rest.images["pixel_values"], image)
        assert rest.prompt_ids == [*range(97, 108), *tokens(list(answer(request)))[:1]]
        task.cancel()

    play(scene())


def test_a_rank_that_dies_while_a_prompt_is_being_sent_gets_no_more_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parts, "PROMPT_PART_TOKENS", 1)

    async def scene() -> None:
        group = FakeGroup(2)
        task = ask(group, REQUEST)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not group.process(0).taken
        group.kill(0)
        await settle()
        assert [request.id for request in group.process(1).taken] == ["a-1"]
        for _ in range(20):
            group.step(1)
        assert tokens(await task) == tokens(list(answer(REQUEST)))

    play(scene())


def test_a_client_that_leaves_while_its_request_is_between_two_ranks_ends_it() -> None:
    async def scene() -> None:
        group = FakeGroup(2)
        task = ask(group, REQUEST)
        await settle()
        group.step(0)
        group.kill(0)
        task.cancel()
        await settle()
        assert not group.process(1).running
        assert group.router.num_unfinished == 0

    play(scene())


def test_a_drain_waits_for_a_request_between_two_ranks() -> None:
    async def scene() -> None:
        group = FakeGroup(2)
        task = ask(group, REQUEST)
        await settle()
        group.step(0)
        group.router.on_message(1, DrainRequest(TIMEOUT_S))
        group.kill(0)
        await settle()
        assert group.router.state is GroupState.DRAINING
        for _ in range(20):
            group.step(1)
        assert tokens(await task) == tokens(list(answer(REQUEST)))
        while group.router.state is not GroupState.STOPPING:
            await asyncio.sleep(0.01)
        group.router.tasks.cancel()

    play(scene())


def test_requests_that_come_during_a_recovery_go_to_those_who_are_left() -> None:
    async def scene() -> None:
        group = FakeGroup(3)
        group.kill(0)
        assert group.router.membership.is_changing
        tasks = [ask(group, replace(REQUEST, id=str(number))) for number in range(4)]
        await settle()
        assert [len(group.process(rank).taken) for rank in (1, 2)] == [2, 2]
        for _ in range(20):
            group.step(1)
            group.step(2)
        for task in tasks:
            assert tokens(await task) == tokens(list(answer(REQUEST)))

    play(scene())


@pytest.mark.parametrize(("num_tokens", "is_poison"), [(0, True), (7, True), (8, False)])
def test_a_request_that_ends_two_ranks_is_not_tried_on_a_third(num_tokens: int, is_poison: bool) -> None:
    async def scene() -> None:
        group = FakeGroup(3)
        task = ask(group, REQUEST)
        await settle()
        group.kill(0)
        await settle()
        group.deliver(1)
        group.deliver(2)
        for _ in range(num_tokens):
            group.step(1)
        group.kill(1)
        await settle()
        if is_poison:
            with pytest.raises(
                ApiError, match="on rank 0 and on rank 1 when they died: it is not tried again"
            ) as error:
                await task
            assert error.value.status == 500
            assert not group.process(2).taken
        else:
            for _ in range(20):
                group.step(2)
            assert tokens(await task) == tokens(list(answer(REQUEST)))
        assert group.router.why_unavailable() is None

    play(scene())


def test_ranks_that_die_at_once_make_no_poison() -> None:
    async def scene() -> None:
        group = FakeGroup(3)
        task = ask(group, REQUEST)
        await settle()
        group.kill(0)
        group.kill(1, loses_messages=True)
        await settle()
        for _ in range(20):
            group.step(2)
        assert tokens(await task) == tokens(list(answer(REQUEST)))

    play(scene())


def test_a_rank_that_leaves_hands_its_requests_over_if_asked_to() -> None:
    async def scene() -> None:
        group = FakeGroup(3)
        task, other = ask(group, REQUEST), ask(group, replace(REQUEST, id="b"))
        await settle()
        group.step(0)
        leaver = group.process(0)
        await group.router.remove_ranks([0], moves=True)
        await settle()
        assert leaver.cancelled == ["a"]
        assert group.router.membership.members == (1, 2)
        assert group.processes[0] is None
        for _ in range(20):
            group.step(1)
            group.step(2)
        assert tokens(await task) == tokens(await other) == tokens(list(answer(REQUEST)))
        assert group.num_losses == 0

    play(scene())


def test_a_rank_that_leaves_finishes_its_requests_first() -> None:
    async def scene() -> None:
        group = FakeGroup(2)
        task = ask(group, REQUEST)
        await settle()
        await group.router.remove_ranks([0], moves=False)
        watching = asyncio.ensure_future(group.router.watch())
        later = ask(group, replace(REQUEST, id="b"))
        for _ in range(20):
            await settle()
            assert group.router.membership.members == (0, 1)
            group.step(0)
        assert tokens(await task) == tokens(list(answer(REQUEST)))
        while group.processes[0] is not None:
            await asyncio.sleep(0.05)
        for _ in range(20):
            group.step(1)
        assert tokens(await later) == tokens(list(answer(REQUEST)))
        assert group.num_resumptions == 0
        watching.cancel()

    play(scene())


def test_the_last_rank_to_die_ends_the_group_with_the_names_of_all() -> None:
    async def scene() -> None:
        group = FakeGroup(2)
        task = ask(group, REQUEST)
        await settle()
        group.kill(0)
        group.kill(1, loses_messages=True)
        with pytest.raises(ApiError, match=r"no rank is left that holds the model: rank 0 .*; rank 1 died"):
            await task
        assert group.router.state is GroupState.FAILED

    play(scene())


@pytest.mark.parametrize("seeds", [range(start, start + 20) for start in range(0, 60, 20)])
def test_whoever_dies_or_leaves_whenever_every_token_and_score_comes_once(
    seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routed_requests, "MIN_PROGRESS", 0)  # else a request may be unlucky
    for seed in seeds:
        play(play_at_random(seed))


async def play_at_random(seed: int) -> None:
    chance = random.Random(seed)
    group = FakeGroup(4)
    requests = [
        Request(
            str(number),
            [chance.randrange(97, 123) for _ in range(chance.randrange(1, 9))],
            chance.randrange(1, 40),
            Sampling(seed=chance.randrange(100)),
            ignore_eos=chance.random() < 0.7,
            num_logprobs=chance.choice([None, 2]),
        )
        for number in range(12)
    ]
    for at in range(0, 12, 3):
        requests[at] = replace(requests[at], num_logprobs=1, scores_prompt=True, max_tokens=chance.choice([0, 9]))
    tasks = [ask(group, request) for request in requests]
    await run_at_random(group, chance, tasks)
    for request, task in zip(requests, tasks, strict=True):
        outputs, expected = task.result(), list(answer(request))
        assert tokens(outputs) == tokens(expected)
        assert scores(outputs) == scores(expected)
        assert prompt_scores(outputs) == prompt_scores(expected)
        reasons = [output.finish_reason for output in outputs]
        assert reasons == [None] * (len(reasons) - 1) + [expected[-1].finish_reason]
    assert group.num_losses > 0
    assert group.router.num_unfinished == 0
    group.router.tasks.cancel()
