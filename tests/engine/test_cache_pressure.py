"""A KV cache too small for its requests."""

from pathlib import Path

import pytest

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, dense_answers, start
from tests.model.families import FAMILIES, random_model, save


@pytest.mark.slow
def test_a_request_put_off_goes_on_when_the_one_that_took_its_place_is_cancelled(
    gloo_of_one: TorchGroup, tmp_path: Path
) -> None:
    path = save(random_model(FAMILIES["mixtral"]), tmp_path)
    first, second = (Request(name, [number + 3] * 20, 40, ignore_eos=True) for number, name in enumerate("ab"))
    answers = Answers(1)
    engine = start(path, "standard", gloo_of_one, answers, config=EngineConfig(4, 64, kv_cache_tokens=64))
    engine.submit(first)
    engine.submit(second)
    scheduler = engine._manager.processor.scheduler
    while not (scheduler.block_new_requests and list(scheduler.active_requests) == ["a"]):
        assert not answers.reasons
    engine.cancel("a")
    assert answers.all.wait(TIMEOUT_S / 10), "the request that was put off waits for ever"
    engine.stop()
    assert answers.tokens["b"] == dense_answers(path, {"b": second})["b"]
