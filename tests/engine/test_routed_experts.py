"""The experts that requests are told of are those of one forward pass over the whole sequence."""

import base64
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rq_ep.engine import routed_experts
from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Output, Request, RoutedExperts
from rq_ep.engine.routed_experts import SequenceRouting
from rq_ep.model.load.load_model import load
from rq_ep.moe import RoutingRecorder
from rq_ep.parallel import TorchGroup
from tests.engine.cases import CONFIGS
from tests.engine.test_prefix_caching import PAGES, PREFIX, Ended, ask
from tests.engine.worker import start
from tests.model.families import random_model, save

REQUESTS = [
    Request("unasked", [*PREFIX, 5], 6, ignore_eos=True),
    Request("first", [*PREFIX, 5], 40, ignore_eos=True, routed_from=0),  # none of the cached pages is known
    Request("same", [*PREFIX, 5], 6, ignore_eos=True, routed_from=0, routed_every=32),
    Request("moved", [*PREFIX, 5, 6, 7], 4, ignore_eos=True, routed_from=72, num_answered=2),
]


class Told(Ended):
    """Answers with the experts of their tokens."""

    def __init__(self, num_expected: int) -> None:
        super().__init__(num_expected)
        self.routed: dict[str, list[np.ndarray]] = {}

    def add(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.routed is not None:
                self.routed.setdefault(output.request_id, []).append(decoded(output.routed))
        super().add(outputs)


def decoded(routed: RoutedExperts) -> Any:
    return np.frombuffer(base64.b64decode(routed.data), routed.dtype).reshape(routed.shape)


@pytest.mark.parametrize(("family", "num_shared"), [("mixtral", PAGES), ("qwen3_next", 0)])  # paged, padded
def test_the_experts_of_a_request_are_those_of_its_tokens(
    family: str, num_shared: int, gloo_of_one: TorchGroup, tmp_path: Path
) -> None:
    path = save(random_model(CONFIGS[family]), tmp_path)
    told = Told(len(REQUESTS))
    computed: list[int] = []

    def count(model: PreTrainedModel) -> None:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            computed.append(kwargs["input_ids"].numel())

        model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)

    config = EngineConfig(4, 48, 1024, prefix_caching=True)
    engine = start(path, "standard", gloo_of_one, told, prepare=count, config=config)
    assert engine.routes_evenly
    with patch.object(routed_experts, "PART_BYTES", 200):
        for request in REQUESTS:
            computed.clear()
            ask(engine, told, request)
            # Pages are taken from a request that has asked too, and from no other one.
            num_taken = num_shared if request.id in ("same", "moved") else 0
            assert sum(computed) == request.num_tokens - 1 - num_taken, request.id
    engine.stop()
    assert "unasked" not in told.routed
    model = load(path, strategy="standard", group=gloo_of_one)
    for request in REQUESTS[1:]:
        tokens = [*request.prompt_ids, *told.tokens[request.id]]
        with RoutingRecorder(model) as recorder, torch.no_grad():
            model(input_ids=torch.tensor([tokens[:-1]]))
        assert request.routed_from is not None
        expected = recorder.trace().ids_NLK[request.routed_from :]
        np.testing.assert_array_equal(np.concatenate(told.routed[request.id]), expected, request.id)


def test_a_step_that_is_made_again_changes_nothing() -> None:
    routing = SequenceRouting(8, 0)
    ids_TLK = np.arange(12, dtype=np.uint8).reshape(6, 1, 2)
    routing.add(0, ids_TLK[:4])
    assert [part.shape for part in routing.take()] == [[4, 1, 2]]
    routing.add(0, np.zeros_like(ids_TLK[:3]))
    assert routing.take() == []
    routing.add(2, np.concatenate([np.zeros_like(ids_TLK[:2]), ids_TLK[4:]]))
    (part,) = routing.take()
    np.testing.assert_array_equal(decoded(part), ids_TLK[4:])


def test_experts_are_given_away_when_there_are_as_many_as_are_wanted_at_a_time() -> None:
    routing = SequenceRouting(8, 1, every=3)
    for at, shapes in ((0, []), (1, []), (2, []), (3, [[3, 1, 2]]), (4, [])):
        routing.add(at, np.zeros((1, 1, 2), np.uint8))
        assert [part.shape for part in routing.take()] == shapes
    assert [part.shape for part in routing.take(is_last=True)] == [[1, 1, 2]]
