"""The paged KV cache of families whose layers, or keys and values, have unequal heads."""

import time
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from rq_ep.core.errors import UserError
from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.kv_cache import KVShape, has_uniform_heads, kv_bytes_per_token, kv_shapes
from rq_ep.engine.requests import Request
from rq_ep.engine.servable import set_attention
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, dense_answers, start
from tests.model.families import FAMILIES, random_model, save
from tests.model.family_table import tiny_config

SLIDING, GLOBAL = KVShape(2, 8, 8), KVShape(2, 16, 16)
UNEQUAL = {
    "gemma4": [SLIDING, SLIDING, GLOBAL],  # wider global layers
    "mimo_v2_flash": [KVShape(2, 8, 12), KVShape(4, 8, 12), KVShape(4, 8, 12)],  # values wider than keys, more heads
}


def config_of(family: str) -> PretrainedConfig:
    return tiny_config(family).get_text_config()


@pytest.mark.parametrize("family", UNEQUAL)
def test_the_shapes_of_layers_are_those_of_their_keys_and_values(family: str) -> None:
    assert kv_shapes(config_of(family)) == UNEQUAL[family]
    assert not has_uniform_heads(config_of(family))


def test_flash_attention_is_refused_for_unequal_heads() -> None:
    model = random_model(config_of("gemma4"))
    with pytest.raises(UserError, match="'gemma4_text' has keys and values, or layers, of unequal heads"):
        set_attention(model, "flash_attention_2")
    assert has_uniform_heads(FAMILIES["mixtral"])


@pytest.mark.slow
@pytest.mark.parametrize("family", UNEQUAL)
def test_unequal_heads_are_served_as_the_dense_model_generates_and_take_the_bytes_that_were_said(
    family: str, gloo_of_one: TorchGroup, tmp_path: Path
) -> None:
    path = save(random_model(config_of(family)), tmp_path)
    requests = [
        Request(f"{number}", [(7 * number + 3 * at) % 96 + 1 for at in range(2 + 5 * number)], 8, ignore_eos=True)
        for number in range(9)
    ]
    answers = Answers(len(requests))
    engine = start(path, "standard", gloo_of_one, answers, config=EngineConfig(8, 24, kv_cache_tokens=1024))
    alone, *others = requests
    engine.submit(alone)
    assert answers.some.wait(TIMEOUT_S)
    while alone.id not in answers.reasons:
        time.sleep(0.01)
    for request in others:
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.tokens
    cache = engine._manager.processor.cache
    engine.stop()
    assert answers.tokens == dense_answers(path, {request.id: request for request in requests})
    said = 1024 * kv_bytes_per_token(config_of(family), torch.float32)
    assert 0 <= cache.num_sectors * cache.bytes_per_sector - said < cache.bytes_per_sector
