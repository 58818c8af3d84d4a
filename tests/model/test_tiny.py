import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rq_ep.core.errors import UserError
from rq_ep.model import tiny
from rq_ep.model.seam.adapters import adapter_for
from rq_ep.model.text import corpus
from rq_ep.model.tiny_recipe import FAMILIES, TrainingRecipe

pytestmark = pytest.mark.trains

SMALL = TrainingRecipe(steps=6, num_experts=4, num_layers=2, hidden_size=32, intermediate_size=16, num_heads=2)


def held_out_loss(model: torch.nn.Module, domain: str, num_windows: int = 64) -> float:
    """Nats a byte on held-out text of one domain."""
    stream = "".join(corpus.texts("held-out")[domain]).encode()[: num_windows * 128]
    tokens_BS = torch.from_numpy(np.frombuffer(stream, np.uint8).astype(np.int64)).view(-1, 128)
    with torch.no_grad():
        logits_BSV = model(tokens_BS).logits
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).item()


def test_training_learns_every_domain(tiny_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    losses = [held_out_loss(model, domain) for domain in corpus.DOMAINS]
    assert np.mean(losses) <= 2.8, losses


def test_checkpoint_is_an_ordinary_one(tiny_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen3_moe"
    inputs = tokenizer("The value of ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert inputs.input_ids.shape[1] < output.shape[1] <= inputs.input_ids.shape[1] + 8
    assert (tiny_checkpoint / "text" / "held-out" / "prose").is_dir()


def test_same_seed_same_bits_and_another_seed_another_model() -> None:
    first, again, other = (tiny.train(replace(SMALL, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_threads_and_random_state_alone() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    tiny.train(replace(SMALL, steps=1))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_loads_again(family: str, tmp_path) -> None:
    losses: list[float] = []
    recipe = replace(SMALL, family=family, num_experts=8, steps=12)
    assert tiny.tiny_model(tmp_path / "model", recipe, lambda step, steps, loss, tokens: losses.append(loss))
    assert losses[-1] < losses[0] - 0.5
    model = adapter_for(family).auto_class.from_pretrained(tmp_path / "model")
    assert model.config.model_type == family


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed() -> None:
    class Router(torch.nn.Module):
        def forward(self, logits_TE, topk_ids_TK):
            return logits_TE, topk_ids_TK.float(), topk_ids_TK

    router = Router()
    with tiny._balance_losses(router) as losses:
        router(torch.zeros(4, 4), torch.arange(4)[:, None])
        router(torch.tensor([[50.0, 0, 0, 0]]).repeat(4, 1), torch.zeros(4, 1, dtype=torch.long))
    assert torch.stack(losses).tolist() == pytest.approx([1, 4])


class Interrupted(Exception):
    pass


def interrupt(step: int, steps: int, loss: float, tokens: int) -> None:
    raise Interrupted


def test_finished_model_is_reused_and_another_recipe_replaces_it(tmp_path) -> None:
    out = tmp_path / "model"
    assert tiny.tiny_model(out, SMALL)
    weights = (out / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").stat().st_mode & 0o444 == 0o444  # others may read it
    assert not tiny.tiny_model(out, SMALL, interrupt)
    assert (out / "model.safetensors").read_bytes() == weights
    assert tiny.tiny_model(out, replace(SMALL, seed=1))
    assert json.loads((out / tiny.RECIPE_FILE).read_text())["seed"] == 1
    assert (out / "model.safetensors").read_bytes() != weights
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_interrupted_training_leaves_nothing(tmp_path) -> None:
    with pytest.raises(Interrupted):
        tiny.tiny_model(tmp_path / "model", SMALL, interrupt)
    assert not list(tmp_path.iterdir())


def test_failed_saving_keeps_the_model_that_was_there(tmp_path, monkeypatch) -> None:
    out = tmp_path / "model"
    tiny.tiny_model(out, SMALL)
    monkeypatch.setattr(tiny.corpus, "write_corpus", lambda directory: interrupt(0, 0, 0, 0))
    with pytest.raises(Interrupted):
        tiny.tiny_model(out, replace(SMALL, seed=1))
    assert json.loads((out / tiny.RECIPE_FILE).read_text())["seed"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_foreign_directory_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="holds something else"):
        tiny.tiny_model(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "do not touch"


@pytest.mark.parametrize(
    ("field", "message"), [({"family": "qwen3_mo"}, "did you mean 'qwen3_moe'"), ({"steps": 0}, "--steps 0")]
)
def test_impossible_recipe_is_refused(field, message) -> None:
    with pytest.raises(UserError, match=message):
        TrainingRecipe(**field)
