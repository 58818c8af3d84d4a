"""Multimodal checkpoints of every family answer text as the dense model's `generate` does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.engine.servable import choose_cache
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, start
from tests.model.families import prompt, random_model, save
from tests.model.family_table import REFUSED, TABLE, tiny_config

TEXT_ONLY = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"gemma4"}  # test_padded_families and test_engine have them
MULTIMODAL = [name for name in TABLE if name not in REFUSED and tiny_config(name).model_type not in TEXT_ONLY]


@pytest.mark.slow
@pytest.mark.parametrize("family", MULTIMODAL)
def test_text_is_answered_as_by_the_dense_model(gloo_of_one: TorchGroup, tmp_path: Path, family: str) -> None:
    dense: Any = random_model(tiny_config(family))
    save(dense, tmp_path)
    dense = getattr(dense, "thinker", dense)
    expected = {}
    requests = [
        Request(f"{length}", (prompt(1, length)[0] % 90 + 5).tolist(), 6, ignore_eos=True) for length in (3, 17)
    ]
    for request in requests:
        tokens = torch.tensor([request.prompt_ids])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        answer = dense.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        expected[request.id] = answer[0, tokens.shape[1] :].tolist()
    answers = Answers(len(requests))
    cache = choose_cache(read_config(tmp_path))
    engine = start(tmp_path, "standard", gloo_of_one, answers, config=EngineConfig(4, 12, 256, cache=cache))
    for request in requests:
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.reasons
    engine.stop()
    assert answers.tokens == expected
