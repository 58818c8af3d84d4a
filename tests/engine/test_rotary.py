"""Rotary embeddings that follow the length of a sequence: a request answers as it does alone, whoever is beside it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.engine.scoring import score_tokens
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, dense_answers, start
from tests.model.families import LENGTH_ROPES, random_model, save

# Prompts and answers on both sides of the limit of 24 tokens, and across it.
SIZES = [(5, 8), (40, 6), (24, 4), (18, 12), (3, 26)]
ROOMY = EngineConfig(max_num_seqs=8, max_num_batched_tokens=10, kv_cache_tokens=1024)
CRAMPED = EngineConfig(max_num_seqs=3, max_num_batched_tokens=10, kv_cache_tokens=64)  # requests are put off


def token_ids(number: int, size: int) -> list[int]:
    return [(7 * number + 3 * at) % 95 + 1 for at in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"), [("phimoe", ROOMY), ("phimoe", CRAMPED), ("longrope", CRAMPED), ("dynamic", CRAMPED)]
)
def test_a_request_beside_longer_ones_answers_as_it_does_alone(
    gloo_of_one: TorchGroup, tmp_path: Path, kind: str, config: EngineConfig
) -> None:
    path = save(random_model(LENGTH_ROPES[kind]), tmp_path)
    requests = {
        name: Request(name, token_ids(number, size), max_tokens, ignore_eos=True)
        for number, (size, max_tokens) in enumerate(SIZES)
        for name in [f"{size} and {max_tokens}"]
    }
    scored = Request("scored", token_ids(0, 40), 0, num_logprobs=2, scores_prompt=True)
    answers = Answers(len(requests) + 1)
    engine = start(path, "standard", gloo_of_one, answers, config=config)
    for request in (*requests.values(), scored):
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.reasons
    engine.stop()
    for name, request in requests.items():  # each of a model of its own: with dynamic NTK it keeps the longest so far
        assert answers.tokens[name] == dense_answers(path, {name: request})[name], name

    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = dense(input_ids=torch.tensor([scored.prompt_ids])).logits[0]
    expected = score_tokens(logits_TV[:-1], torch.tensor(scored.prompt_ids[1:]), 2)
    served = [score.logprob for score in answers.prompt_scores["scored"]]
    assert served == pytest.approx([score.logprob for score in expected], abs=1e-4)
