"""Ranks that die, leave and join, as clients see them: the routes in process, over ranks without processes."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from rq_ep.config import ServeConfig
from rq_ep.engine.progress import Progress
from rq_ep.serve.http.app import make_app
from rq_ep.serve.http.http_process import ServingProcess
from rq_ep.serve.http.ranks import routed_requests
from rq_ep.serve.http.served_model import ServedModel
from rq_ep.serve.messages import CheckMembers, RankGivenUp, RankStats, StartRank
from tests.serve.http.ranks.fake_group import TOKEN, FakeGroup, run_at_random
from tests.serve.http.test_app import ByteTokenizer, is_described

NUM_RANKS = 4
MODEL = "tiny"
STATS = RankStats(0, 0, 0.0, Progress(7, 1, None, 0.0), 0, 0.0, free_bytes=5)


class Stage:
    """A server whose ranks are fakes, and its clients."""

    def __init__(self, on_rank_failure: str = "continue") -> None:
        config = ServeConfig(model="/models/tiny", served_model_name=MODEL, on_rank_failure=on_rank_failure)
        self.process = ServingProcess(config, NUM_RANKS, TOKEN)
        self.process.service.take_model(ServedModel(ByteTokenizer()))
        self.group = FakeGroup(NUM_RANKS, self.process.router)
        transport = httpx.ASGITransport(make_app(self.process.service, max_body_bytes=10_000))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60)

    async def get(self, path: str) -> Any:
        return (await self.client.get(path)).json()

    async def change(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/ep/ranks", json=body)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.process.metrics.registry.get_sample_value(f"rq_ep_{name}", {"model_name": MODEL, **labels})

    def settle(self) -> None:
        for rank in range(NUM_RANKS):
            self.group.deliver(rank)


def play(scene: Callable[[Stage], Awaitable[Any]], on_rank_failure: str = "continue") -> Any:
    async def run() -> Any:
        stage = Stage(on_rank_failure)
        try:
            return await asyncio.wait_for(scene(stage), 60)
        finally:
            stage.process.router.tasks.cancel()
            await stage.client.aclose()

    return asyncio.run(run())


def test_health_and_metrics_say_that_a_rank_is_missing_and_that_it_is_back() -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.get("/health") == {"status": "ok"}
        stage.group.kill(2)
        reason = "3 of 4 ranks serve: rank 2 is lost (rank 2 was killed by SIGKILL)"
        assert await stage.get("/health") == {"status": "degraded", "reason": reason}
        assert stage.metric("ranks", state="serving") == 3
        assert stage.metric("ranks", state="lost") == 1
        stage.settle()
        stage.group.start(2, 1)
        assert "rank 2 is joining" in (await stage.get("/health"))["reason"]
        stage.settle()
        assert await stage.get("/health") == {"status": "ok"}
        assert stage.metric("ranks", state="serving") == 4
        assert stage.metric("rank_failures_total") == 1
        assert stage.metric("recovery_seconds_count", part="re-home") == 1

    play(scene)


def test_the_state_of_each_rank_can_be_asked_for() -> None:
    async def scene(stage: Stage) -> None:
        stage.group.kill(2)
        stage.settle()
        view = await stage.get("/v1/ep/ranks")
        assert is_described(view, "Ranks", await stage.get("/openapi.json"))
        assert (view["model"], view["on_rank_failure"], view["generation"]) == (MODEL, "continue", 1)
        assert (view["members"], view["is_changing"]) == ([0, 1, 3], False)
        row = view["ranks"][2]
        assert row["since"] > 1e9
        del row["since"]
        assert row == {
            "rank": 2, "state": "lost", "reason": "rank 2 was killed by SIGKILL", "generation": 0, "num_requests": 0,
            "num_failures": 1, "num_restarts": 0,
        }  # fmt: skip
        assert [event["state"] for event in view["events"] if event["rank"] == 2] == ["serving", "lost"]

    play(scene)


def test_a_rank_is_removed_and_brought_back() -> None:
    async def scene(stage: Stage) -> None:
        answer = await stage.change(remove=[2], requests="move")
        assert (answer.status_code, answer.json()["ranks"][2]["state"]) == (200, "leaving")
        await asyncio.sleep(0.01)
        stage.settle()
        view = await stage.get("/v1/ep/ranks")
        assert (view["members"], view["ranks"][2]["state"]) == ([0, 1, 3], "removed")
        assert (await stage.get("/health"))["reason"] == "3 of 4 ranks serve: rank 2 is removed (by request)"
        answer = await stage.change(add=[2])
        assert answer.status_code == 200
        assert stage.group.commands[-1] == (2, StartRank())
        await asyncio.sleep(0.01)
        stage.settle()
        assert await stage.get("/health") == {"status": "ok"}

    play(scene)


def test_ranks_whose_experts_the_others_cannot_hold_stay() -> None:
    async def scene(stage: Stage) -> None:
        stage.group.num_needed = 3
        answer = await stage.change(remove=[2, 3])
        error = answer.json()["error"]
        assert (answer.status_code, error["message"]) == (409, "remove: 7 bytes are missing")
        assert stage.process.router.membership.open_ranks == [0, 1, 2, 3]

        stage.process.router.on_message(1, STATS)
        assert (await stage.change(remove=[3])).status_code == 200
        question = next(message for _, message in reversed(stage.group.sent) if isinstance(message, CheckMembers))
        assert (question.members, question.free_bytes) == ([0, 1, 2], [7, 5, 7])

        stage.group.kill(2)  # before rank 3 has left
        stage.settle()
        await asyncio.sleep(0.01)
        assert stage.process.router.membership.members == (0, 1, 3)
        assert (await stage.get("/v1/ep/ranks"))["ranks"][3]["reason"] == "it stays: 7 bytes are missing"

    play(scene)


def test_a_question_to_a_rank_that_dies_goes_to_the_next_one() -> None:
    async def scene(stage: Stage) -> None:
        stage.group.answers_checks = False
        asking = asyncio.ensure_future(stage.change(remove=[3]))
        await asyncio.sleep(0.01)
        assert not asking.done()
        stage.group.answers_checks = True
        stage.group.kill(0)
        assert (await asking).status_code == 200

    play(scene)


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        ({}, 400, "give either `remove` or `add`, a list of ranks", "remove"),
        ({"remove": [1], "add": [2]}, 400, "give either `remove` or `add`", "remove"),
        ({"remove": [4]}, 404, "remove: there is no rank 4: the ranks are 0 to 3", "remove"),
        ({"remove": [-1]}, 400, "remove.0: Input should be greater than or equal to 0", "remove"),
        ({"remove": []}, 400, "remove: List should have at least 1 item", "remove"),
        ({"remove": [1], "requests": "drop"}, 400, "requests: Input should be 'finish' or 'move'", "requests"),
        ({"remove": [0, 1, 2, 3]}, 409, "remove: at least one rank has to stay", "remove"),
        ({"add": [1]}, 409, "add: rank 1 is serving: there is nothing to add", "add"),
        ({"add": [3]}, 409, "add: the launcher has no process for rank 3: rank 3: its supervisor has ended", "add"),
        ({"leave": [1]}, 400, "unknown parameter 'leave'", "leave"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_by_name(
    body: dict[str, Any], status: int, message: str, param: str
) -> None:
    async def scene(stage: Stage) -> None:
        if body == {"add": [3]}:
            stage.group.processes[3] = None
            stage.process.router.on_supervisor_loss(3, "the supervisor of rank 3 died")
        members = stage.process.router.membership.members
        answer = await stage.change(**body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param)
        assert message in error["message"]
        assert stage.process.router.membership.members == members

    play(scene)


def test_a_server_that_stops_with_its_ranks_refuses_changes() -> None:
    async def scene(stage: Stage) -> None:
        assert (await stage.get("/v1/ep/ranks"))["on_rank_failure"] == "stop"
        answer = await stage.change(remove=[1])
        assert answer.status_code == 409
        assert "start it with --on-rank-failure continue" in answer.json()["error"]["message"]

    play(scene, "stop")


def test_the_last_rank_ends_the_server_by_name() -> None:
    async def scene(stage: Stage) -> None:
        for rank in range(NUM_RANKS):
            stage.group.kill(rank, loses_messages=True)
        await asyncio.wait_for(stage.process.ended.wait(), 10)
        answer = await stage.client.get("/health")
        assert answer.status_code == 503
        assert "no rank is left that holds the model: rank 0" in answer.json()["error"]["message"]

    play(scene)


def test_a_rank_that_is_given_up_is_named_in_health() -> None:
    async def scene(stage: Stage) -> None:
        stage.group.kill(1)
        stage.group.supervisor(1, RankGivenUp("it ended, and was started again 3 times"))
        assert "rank 1: it ended, and was started again 3 times" in (await stage.get("/health"))["reason"]

    play(scene)


def bodies() -> list[tuple[str, dict[str, Any]]]:
    chance = random.Random(0)

    def letters() -> str:
        return "".join(chance.choices("abcdefghij", k=chance.randrange(1, 8)))

    made: list[tuple[str, dict[str, Any]]] = []
    for seed in range(8):
        common = {"model": MODEL, "seed": seed, "temperature": 1, "max_tokens": 40}
        chat = {**common, "messages": [{"role": "user", "content": letters()}], "logprobs": True, "top_logprobs": 1}
        made.append(("/v1/completions", {**common, "prompt": letters(), "logprobs": 2, "echo": True}))
        made.append(("/v1/completions", {**common, "prompt": letters(), "stop": chance.choice("klmnop")}))
        made.append(
            ("/v1/completions", {**common, "prompt": letters() + "xyz", "logprobs": 1, "echo": True, "max_tokens": 0})
        )
        made.append(("/v1/chat/completions", chat))
        options = {"include_usage": True}
        made.append(("/v1/chat/completions", {**chat, "stream": True, "stream_options": options, "stop": "x"}))
    return made


async def answers(stage: Stage, chance: random.Random | None) -> list[str]:
    """The answers to all bodies, while ranks die and come back at random; None: nothing happens to them."""

    async def ask(path: str, body: dict[str, Any]) -> str:
        return (await stage.client.post(path, json=body)).text

    tasks = [asyncio.ensure_future(ask(path, body)) for path, body in bodies()]
    if chance is not None:
        await run_at_random(stage.group, chance, tasks)
    while not all(task.done() for task in tasks):
        for rank in range(NUM_RANKS):
            stage.group.step(rank)
        await asyncio.sleep(0)
    return [without_names(task.result()) for task in tasks]


def without_names(text: str) -> str:
    """An answer without what differs between two."""
    return re.sub(r'"(id|created)":("[^"]*"|\d+),', "", text)


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_the_same_whoever_dies(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_requests, "MIN_PROGRESS", 0)

    async def disturbed(stage: Stage) -> list[str]:
        texts = await answers(stage, random.Random(seed))
        assert stage.metric("requests_resumed_total"), "some were on a rank that died"
        assert stage.metric("time_to_first_token_seconds_count") == 32, "once for each request that gets tokens"
        return texts

    expected = play(lambda stage: answers(stage, None))
    assert not [text for text in expected if "error" in text]
    assert play(disturbed) == expected
