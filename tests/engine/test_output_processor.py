"""Outputs of requests: new tokens, their scores, and logits that are no numbers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rq_ep.engine.lockstep import Sampler
from rq_ep.engine.nonfinite import NonFiniteTokens
from rq_ep.engine.output_processor import OutputProcessor, RequestState
from rq_ep.engine.requests import LOWEST_LOGPROB, Output, Request, Sampling, Score
from rq_ep.engine.scoring import score_tokens


def test_scores_are_log_probabilities_and_name_the_likeliest() -> None:
    logits_NV = torch.tensor([[0.0, 2.0, 1.0], [5.0, float("-inf"), 5.0]])
    first, second = score_tokens(logits_NV, torch.tensor([0, 1]), 2)
    assert first.logprob == pytest.approx(float(logits_NV[0].log_softmax(-1)[0]))
    assert first.top_ids == [1, 2]
    assert second.logprob == LOWEST_LOGPROB, "JSON has no infinity"
    assert score_tokens(logits_NV, torch.tensor([0, 2]), 9)[0].top_ids == [1, 2, 0]


class Step:
    """One step over given requests, whose logits are rows of a table."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = {request.id: RequestState(request, frozenset({0})) for request in requests}
        states = [SimpleNamespace(request_id=request.id, position_offset=3) for request in requests]
        ios: Any = SimpleNamespace(
            requests_in_batch=[SimpleNamespace(state=state, has_new_token=True) for state in states]
        )
        self.sampler = Sampler(ios, self.requests, NonFiniteTokens())
        self.outputs: list[Output] = []
        self.broken: list[str] = []
        self.processor = OutputProcessor(self.requests, self.outputs.extend, self.broken.append)

    def run(self, logits_NV: torch.Tensor) -> list[Output]:
        output_ids = torch.zeros(1, 8, dtype=torch.int64)
        self.sampler(logits_NV[None], output_ids)
        new: list[Any] = [
            SimpleNamespace(
                request_id=name,
                generated_tokens=[int(token)],
                is_finished=lambda: False,
                created_time=1.0,
                lifespan=(1.5, -1),
            )
            for name, token in zip(list(self.requests), output_ids[0].tolist(), strict=False)
        ]
        self.processor.deliver_batch(new)
        return self.outputs


def test_raw_scores_go_with_their_tokens() -> None:
    plain, scored = Request("plain", [1], 5), Request("scored", [1], 5, Sampling(2.0, 0.5, 1), num_logprobs=1)
    logits_NV = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    outputs = Step([plain, scored]).run(logits_NV)
    raw = logits_NV[1].log_softmax(-1).tolist()
    assert outputs[0] == Output("plain", [1], queued_s=0.5)
    assert outputs[1].scores == [Score(raw[outputs[1].token_ids[0]], [1], [raw[1]])]


def test_logits_that_are_no_numbers_end_their_own_request_only() -> None:
    step = Step([Request("well", [1], 5), Request("ill", [1], 5)])
    logits_NV = torch.tensor([[0.0, 3.0, 1.0], [0.0, float("nan"), 1.0]])
    well, ill = step.run(logits_NV)
    assert (well.token_ids, well.finish_reason) == ([1], None)
    assert (ill.finish_reason, ill.error) == ("error", "the model's logits are not finite")
    assert (step.broken, list(step.requests)) == (["ill"], ["well"])


def test_a_cancelled_request_has_no_outputs() -> None:
    step = Step([Request("gone", [1], 5)])
    step.requests.clear()
    assert step.run(torch.zeros(1, 3)) == []
    step.processor.prompt_scored(Request("gone", [1], 0, scores_prompt=True), [], True)
    assert step.outputs == []
