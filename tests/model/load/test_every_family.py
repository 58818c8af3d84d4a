"""A tiny model of every family that transformers decorates, loaded onto two ranks under one of the strategies."""

from itertools import cycle
from pathlib import Path

import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.load.load_model import load
from rq_ep.model.seam.expert_modules import experts_per_token
from tests.model.families import prompt, random_model, save
from tests.model.family_table import REFUSED, TABLE, WRAPPERS, tiny_config

LOADED = [family for family in (*TABLE, *WRAPPERS) if family not in REFUSED]
STRATEGIES = ("standard", "rq", "eplb", "llep")  # test_load_dist runs each of them on processes


@pytest.mark.slow
@pytest.mark.parametrize(("family", "strategy"), zip(LOADED, cycle(STRATEGIES), strict=False))
@torch.no_grad()
def test_every_family_equals_the_dense_model_on_two_ranks(family: str, strategy: str, tmp_path: Path) -> None:
    dense = random_model(tiny_config(family))
    save(dense, tmp_path)
    model = load(tmp_path, strategy=strategy, num_local_ranks=2, device="cpu", attn_implementation="eager")
    chosen: list[int] = []
    for layer in model.rq_ep.layers:
        layer.register_forward_pre_hook(lambda layer, args: chosen.append(args[1].shape[1]))
    tokens_BT = prompt(2, 9)
    logits_BTV = model(tokens_BT, use_cache=False).logits
    # What answers a text is the thinker, where a model has one.
    expected_BTV = getattr(dense, "thinker", dense)(tokens_BT, use_cache=False).logits
    assert (logits_BTV - expected_BTV).abs().max() < 1e-5 * expected_BTV.abs().max()
    assert len(chosen) == len(model.rq_ep.layers)
    assert max(chosen) == experts_per_token(model.config)
    assert Path(model.name_or_path) == tmp_path  # where its tokenizer is found


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_writes_no_text_is_refused_by_name(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model_type '{family}' {REFUSED[family]}"):
        read_config(tmp_path)
