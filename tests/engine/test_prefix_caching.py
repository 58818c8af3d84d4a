"""Prompts that begin alike: pages that an earlier one has filled are not computed again, and answers stay the same."""

import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, dense_answers, start
from tests.model.families import FAMILIES, random_model, save

PREFIX = [(7 * at) % 90 + 1 for at in range(70)]  # two pages of 32 tokens, and some more
REQUESTS = [
    Request("first", [*PREFIX, 5], 6, ignore_eos=True),
    Request("same", [*PREFIX, 5], 6, ignore_eos=True),
    Request("other end", [*PREFIX, 9, 8], 6, ignore_eos=True),
    Request("other begin", [3, *PREFIX], 6, ignore_eos=True),
]
PAGES = 64  # tokens of the prefix in whole pages


@pytest.mark.parametrize(
    ("family", "shares", "is_shared"),
    [("mixtral", True, True), ("mixtral", False, False), ("deepseek_v3", True, True), ("gpt_oss", True, False)],
)
def test_whole_pages_of_a_prefix_are_computed_once(
    family: str, shares: bool, is_shared: bool, gloo_of_one: TorchGroup, tmp_path: Path
) -> None:
    path = save(random_model(FAMILIES[family]), tmp_path)
    num_tokens: list[int] = []

    def count(model: PreTrainedModel) -> None:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs.get("input_ids")
            num_tokens.append(0 if ids is None else ids.numel())

        model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)

    config = EngineConfig(4, 128, 1024, prefix_caching=shares)
    answers = Ended(len(REQUESTS))
    engine = start(path, "standard", gloo_of_one, answers, prepare=count, config=config)
    computed = {}
    for request in REQUESTS:
        num_tokens.clear()
        ask(engine, answers, request)
        computed[request.id] = sum(num_tokens)
    engine.stop()
    assert answers.tokens == dense_answers(path, {request.id: request for request in REQUESTS})
    saved = PAGES if is_shared else 0
    assert computed["first"] - computed["same"] == saved
    assert computed["other begin"] == computed["first"]
    assert computed["first"] + 1 - computed["other end"] == saved


class Ended(Answers):
    """Answers, of which each can be waited for."""

    def __init__(self, num_expected: int) -> None:
        super().__init__(num_expected)
        self.has_changed = threading.Condition()

    def add(self, outputs: Any) -> None:
        super().add(outputs)
        with self.has_changed:
            self.has_changed.notify_all()


def ask(engine: Engine, answers: Ended, request: Request) -> None:
    engine.submit(request)
    with answers.has_changed:
        assert answers.has_changed.wait_for(lambda: request.id in answers.reasons, TIMEOUT_S)
