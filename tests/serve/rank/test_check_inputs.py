"""What is refused before anything is loaded: lengths of requests, and models that cannot be served."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, Qwen3NextConfig

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.engine import servable
from rq_ep.engine.servable import choose_cache
from rq_ep.serve.rank.check_inputs import check_inputs, choose_max_model_len

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def folder(source: Path, path: Path, **changes: Any) -> str:
    """A model's folder without its weights, and with another configuration."""
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors", "text"))
    for index in source.glob("*.safetensors"):
        (path / index.name).symlink_to(index)
    config = json.loads((path / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling"):
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps(config | changes))
    return str(path)


def test_a_length_beyond_the_model_is_refused_from_its_configuration(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = folder(tiny_checkpoint, tmp_path / "yarn", rope_scaling=YARN)
    check_inputs(ServeConfig(model=model, max_model_len=2048), "cpu")
    with pytest.raises(UserError, match=r"--max-model-len 2049: the model was made for 2048 tokens, by max_position"):
        check_inputs(ServeConfig(model=model, max_model_len=2049), "cpu")


def test_a_length_beyond_the_cache_is_refused_from_the_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = folder(tiny_checkpoint, tmp_path / "long", max_position_embeddings=100000)
    for device_type, settings, limit in (
        ("cpu", {}, 16384),
        ("cpu", {"kv_cache_tokens": 100}, 128),
        ("cuda", {"kv_cache_tokens": 1000}, 1024),
    ):
        check_inputs(ServeConfig(model=model, max_model_len=limit, **settings), device_type)
        with pytest.raises(UserError, match=f"the KV cache holds {limit} tokens of one request; lower it, or raise"):
            check_inputs(ServeConfig(model=model, max_model_len=limit + 1, **settings), device_type)
    check_inputs(ServeConfig(model=model, max_model_len=90000), "cuda")  # what is left is known later


def test_the_default_length_is_what_model_and_cache_allow(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = ServeConfig(model=folder(tiny_checkpoint, tmp_path / "yarn", rope_scaling=YARN))
    model_config = check_inputs(config, "cpu").model_config
    assert choose_max_model_len(config, model_config, 16384) == 2048
    assert choose_max_model_len(config, model_config, 1024) == 1024


def test_the_cache_is_paged_where_the_layers_allow_it_or_as_asked_for() -> None:
    assert [choose_cache(MixtralConfig(), wanted) for wanted in (None, "paged", "padded")] == [
        "paged",
        "paged",
        "padded",
    ]
    assert [choose_cache(Qwen3NextConfig(), wanted) for wanted in (None, "padded")] == ["padded", "padded"]
    with pytest.raises(
        UserError, match=r"--cache paged: model type 'qwen3_next' has layers of full_attention, linear_"
    ):
        choose_cache(Qwen3NextConfig(), "paged")


def test_images_are_not_promised_where_none_can_be_taken(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_checkpoint)
    with pytest.raises(UserError, match=r"--allow-remote-images: model type '\w+' takes no images here"):
        check_inputs(ServeConfig(model=model, allow_remote_images=True), "cpu")
    model_type = json.loads((tiny_checkpoint / "config.json").read_text())["model_type"]
    monkeypatch.setattr(servable, "IMAGE_MODEL_TYPES", (model_type,))
    with pytest.raises(UserError, match="--allow-remote-images: images need the padded cache"):
        check_inputs(ServeConfig(model=model, allow_remote_images=True), "cpu")
    with pytest.raises(UserError, match=r"--allow-remote-images: .*: no preprocessor_config.json"):
        check_inputs(ServeConfig(model=model, allow_remote_images=True, cache="padded"), "cpu")
