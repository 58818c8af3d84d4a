"""Every family whose layers have no paged cache answers as the dense model's `generate` does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request, Sampling
from rq_ep.engine.servable import choose_cache
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, generated, start
from tests.model.families import FAMILIES, LENGTH_ROPES, random_model, save
from tests.model.family_table import REFUSED, TABLE, tiny_config

ROOM = 96  # positions: rows give way and come back


def config_of(family: str) -> PretrainedConfig:
    config = tiny_config(family)
    text: Any = config.get_text_config()
    # Scores of an indexer with few heads are often 0, and which of equal ones it takes depends on their number.
    if "indexed_attention" in text.layer_types:
        name = "indexer_n_heads" if hasattr(text, "indexer_n_heads") else "index_n_heads"
        setattr(text, name, 16)
    return config


def padded_families() -> list[str]:
    return [family for family in TABLE if family not in REFUSED and choose_cache(tiny_config(family)) == "padded"]


def check_answers(config: PretrainedConfig, group: TorchGroup, path: Path) -> None:
    """One request alone, then eight at once, of which some wait for room."""
    model = random_model(config)
    save(model, path)
    requests = [
        Request(f"{number}", [(7 * number + 3 * at) % 95 + 1 for at in range(1 + 15 * number % 40)],
                3 + 15 * number % 12, ignore_eos=True)
        for number in range(8)
    ]  # fmt: skip
    dense = {request.id: generated(model, request) for request in requests}
    answers = Answers(9)
    engine = start(path, "standard", group, answers, config=EngineConfig(8, 12, ROOM, cache="padded"))
    engine.submit(Request("alone", requests[2].prompt_ids, requests[2].max_tokens, ignore_eos=True))
    while not answers.reasons:
        assert answers.some.wait(TIMEOUT_S)
        answers.some.clear()
    for request in requests:
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.reasons
    engine.stop()
    assert answers.tokens == dense | {"alone": dense["2"]}
    assert engine.kv_cache_usage == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", padded_families())
def test_greedy_answers_equal_generate_alone_and_at_once(gloo_of_one: TorchGroup, tmp_path: Path, family: str) -> None:
    check_answers(config_of(family), gloo_of_one, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "phimoe", "dynamic"])
def test_a_padded_cache_that_is_asked_for_gives_the_same_answers(
    gloo_of_one: TorchGroup, tmp_path: Path, name: str
) -> None:
    """Sliding windows, and frequencies that follow the length of a sequence."""
    check_answers({**FAMILIES, **LENGTH_ROPES}[name], gloo_of_one, tmp_path)


@pytest.mark.slow
def test_sampled_answers_are_those_of_the_paged_cache(gloo_of_one: TorchGroup, tmp_path: Path) -> None:
    path = save(random_model(FAMILIES["mixtral"]), tmp_path)
    requests = [Request(f"{n}", [n + 1] * (3 + 5 * n), 8, Sampling(1.2, 0.9, seed=n), num_logprobs=2) for n in range(4)]
    found = []
    for cache in ("paged", "padded"):
        answers = Answers(len(requests))
        engine = start(path, "standard", gloo_of_one, answers, config=EngineConfig(4, 12, 512, cache))
        for request in requests:
            engine.submit(request)
        assert answers.all.wait(TIMEOUT_S), answers.reasons
        engine.stop()
        found.append(answers)
    paged, padded = found
    assert (paged.tokens, paged.reasons) == (padded.tokens, padded.reasons)
    for name, scores in paged.scores.items():
        assert [score.top_ids for score in scores] == [score.top_ids for score in padded.scores[name]]
        torch.testing.assert_close(
            torch.tensor([score.logprob for score in scores]),
            torch.tensor([score.logprob for score in padded.scores[name]]),
        )
