"""The override of transformers' private loop: that it is where we think it is, and what a step does."""

import inspect
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from packaging.requirements import Requirement
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner

from rq_ep.engine.lockstep import LockstepManager, PeerLost, agreement, is_consequence
from rq_ep.engine.progress_tracker import Position
from rq_ep.engine.requests import Batch
from rq_ep.parallel.ep_group import RankFailure

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_the_overridden_methods_are_those_of_the_pinned_transformers() -> None:
    requirements = map(Requirement, tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])
    pinned = next(requirement for requirement in requirements if requirement.name == "transformers")
    assert transformers.__version__ in pinned.specifier, "the engine was tested with another transformers"
    assert {spec.operator for spec in pinned.specifier} >= {"<"}, "a private method is overridden: pin the range"

    for manager in (ContinuousBatchingManager, LockstepManager):
        body = inspect.signature(manager._generation_loop_body)
        assert list(body.parameters) == ["self", "batch_processor", "bootstrapping"]
    loop = inspect.getsource(ContinuousBatchingManager._run_generation_loop)
    assert "self._generation_loop_body(batch_processor, bootstrapping=False)" in loop
    assert "self._create_batch_processor()" in loop
    assert list(inspect.signature(ModelRunner._sample).parameters) == ["self", "scores", "output_ids"]
    assert "self._sample(scores, output_ids)" in inspect.getsource(ModelRunner._forward_process_and_sample)
    assert "self._wake_up_loop.set()" in inspect.getsource(ContinuousBatchingManager.add_request)


class Bench:
    """A manager without a model, one of two ranks; `other` are the flags of the other one."""

    def __init__(self, ready: bool, pending: bool, other: tuple[int, ...], status: int, prompts: int = 0) -> None:
        self.did: list[str] = []
        manager: Any = LockstepManager.__new__(LockstepManager)
        manager._wake_up_loop = threading.Event()
        manager._num_announced = 3
        manager._heartbeat_s = 0.01
        manager._mark = manager._marked = 0
        manager._position = Position([], [], lambda: None)
        manager._on_mark = lambda number: self.did.append(f"mark {number}")
        manager.num_steps, manager.steps_s = 0, 0.0
        manager._running = {"wanted": None}
        manager._scores = False
        self.prompts = prompts
        self.batches: list[Batch] = []  # as they are in each step
        scored = [("a prompt", 5)]
        manager._scorer = SimpleNamespace(has_work=lambda: self.prompts > 0, step=self.score, under_way=scored)
        manager._agree = lambda flags: [max(pair) for pair in zip(flags, other, strict=True)]
        manager._empty_step = lambda: self.do("empty step")
        manager._generation_step = lambda: self.do("step")
        futures = [
            SimpleNamespace(state=SimpleNamespace(request_id=name, generated_tokens=tokens), query_length=length)
            for name, tokens, length in (("old", [1], 1), ("new", [], 3))
        ]
        manager.batch_processor = SimpleNamespace(inputs_and_outputs=SimpleNamespace(requests_in_batch=futures))
        manager.current_batch = 0
        manager.background_thread_status = BackgroundThreadStatus()
        manager.background_thread_status._local_status = status
        self.manager = manager
        self.processor: Any = SimpleNamespace(
            prepare_next_batch=lambda: ready,
            has_pending_requests=lambda: pending,
            update_batch=lambda: self.did.append("update"),
        )

    def do(self, what: str) -> None:
        self.did.append(what)
        self.batches.append(self.manager.batch)

    def score(self, is_wanted: Callable[[str], bool]) -> bool:
        self.prompts -= 1
        self.do("score")
        return is_wanted("wanted")

    def step(self) -> bool:
        return self.manager._step(self.processor)


GOING, DRAINING, STOPPING = BackgroundThreadStatus.DONT_STOP, BackgroundThreadStatus.FLUSH_AND_STOP, 2
# ready, keep running, hard stop, pending, announced, -announced, mark
IDLE, BUSY, LEAVING = (0, 1, 0, 0, 3, -3, 0), (1, 1, 0, 1, 3, -3, 0), (0, 0, 0, 0, 3, -3, 0)


@pytest.mark.parametrize(
    ("ready", "pending", "other", "status", "did", "goes_on"),
    [
        (True, True, IDLE, GOING, ["step", "update"], True),
        (True, True, BUSY, GOING, ["step", "update"], True),
        (False, False, BUSY, GOING, ["empty step"], True),
        (False, False, IDLE, GOING, [], True),
        (False, False, BUSY, DRAINING, ["empty step"], True),
        (True, True, LEAVING, DRAINING, ["step", "update"], True),
        (False, True, LEAVING, DRAINING, [], True),
        (False, False, IDLE, DRAINING, [], True),
        (False, False, LEAVING, GOING, [], True),
        (False, False, LEAVING, DRAINING, [], False),
        (True, True, BUSY, STOPPING, [], False),
        (True, True, (0, 0, 1, 0, 3, -3, 0), GOING, [], False),
    ],
)
def test_a_step_does_what_the_group_agreed(
    ready: bool, pending: bool, other: tuple[int, ...], status: int, did: list[str], goes_on: bool
) -> None:
    bench = Bench(ready, pending, other, status)
    assert (bench.step(), bench.did) == (goes_on, did)


def test_a_mark_comes_before_the_step_and_once() -> None:
    bench = Bench(True, True, (0, 1, 0, 0, 3, -3, 1), GOING)
    assert bench.step()
    assert bench.step()
    assert bench.did == ["mark 1", "step", "update", "step", "update"]


def test_scoring_takes_turns_with_batches() -> None:
    bench = Bench(True, True, IDLE, GOING, prompts=2)
    for _ in range(4):
        assert bench.step()
    assert bench.did == ["score", "step", "update", "score", "step", "update"]
    assert bench.batches == [Batch([("a prompt", 5)], True), Batch([("old", 1), ("new", 3)], True)] * 2


def test_a_batch_of_answers_alone_is_no_prefill_and_an_empty_step_is_of_nothing() -> None:
    bench = Bench(True, True, BUSY, GOING)
    bench.manager.batch_processor.inputs_and_outputs.requests_in_batch.pop()
    assert bench.step()
    assert bench.batches == [Batch([("old", 1)], False)]
    idle = Bench(False, False, BUSY, GOING)
    assert idle.step()
    assert idle.batches == [Batch([], False)]


def test_a_prompt_nobody_waits_for_is_an_empty_step() -> None:
    bench = Bench(False, False, IDLE, GOING, prompts=1)
    bench.manager._running.clear()
    assert bench.step()
    assert bench.did == ["score", "empty step"], "the other ranks have entered the step already"


def time_of_an_idle_step(other: tuple[int, ...], heartbeat_s: float, wake_after_s: float | None = None) -> float:
    bench = Bench(False, False, other, GOING)
    bench.manager._heartbeat_s = heartbeat_s
    if wake_after_s is not None:
        threading.Timer(wake_after_s, bench.manager.wake, (4,)).start()
    start_s = time.perf_counter()
    assert bench.step()
    return time.perf_counter() - start_s


def test_an_idle_group_sleeps_until_it_is_woken() -> None:
    assert time_of_an_idle_step(IDLE, heartbeat_s=0.2) > 0.15
    assert time_of_an_idle_step(IDLE, heartbeat_s=60, wake_after_s=0.02) < 30


def test_no_rank_sleeps_while_another_has_not_heard_of_a_request() -> None:
    assert time_of_an_idle_step((0, 1, 0, 0, 4, -4, 0), heartbeat_s=60) < 30


def test_errors_that_follow_from_another_are_told_apart() -> None:
    def layer_error(cause: Exception) -> RankFailure:
        try:
            raise RankFailure("MoE layer 3 on rank 1: it broke") from cause
        except RankFailure as error:
            return error

    assert is_consequence(PeerLost("gone"))
    assert is_consequence(layer_error(RankFailure("rank 1: all-to-all failed")))
    assert not is_consequence(layer_error(KeyError(3)))
    assert not is_consequence(RuntimeError("out of memory"))


def test_one_rank_agrees_with_itself() -> None:
    assert agreement(None)((1, 0, -3)) == [1, 0, -3]
