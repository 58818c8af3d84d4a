"""Every family with a paged cache answers text as the dense model's `generate` does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.engine.servable import PAGED, choose_cache
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, start
from tests.model.families import prompt, random_model, save
from tests.model.family_table import REFUSED, TABLE, WRAPPERS, tiny_config


def paged_families() -> list[str]:
    names = [name for name in (*TABLE, *WRAPPERS) if name not in REFUSED]
    return [name for name in names if choose_cache(tiny_config(name)) == PAGED]


@pytest.mark.slow
@pytest.mark.parametrize("family", paged_families())
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
    engine = start(tmp_path, "standard", gloo_of_one, answers, config=EngineConfig(4, 12, 256))
    for request in requests:
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.reasons
    engine.stop()
    assert answers.tokens == expected
