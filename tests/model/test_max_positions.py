"""The longest sequence that a model was made for."""

from typing import Any

import pytest
from transformers import PhimoeConfig, PretrainedConfig, Qwen3MoeConfig, SwitchTransformersConfig

from rq_ep.model.max_positions import max_positions
from tests.model.families import LENGTH_ROPES

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("positions", "rope", "expected"),
    [
        (40960, None, 40960),
        (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"rope_type": "yarn", "factor": 2.0}, 65536),
        (4096, {"rope_type": "linear", "factor": 4.0}, 16384),
        (4096, {"rope_type": "dynamic", "factor": 2.5}, 10240),
        (131072, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (8192, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 65536),
    ],
)
def test_rope_scaling_lengthens_what_a_model_was_made_for(
    positions: int, rope: dict[str, Any] | None, expected: int
) -> None:
    assert max_positions(Qwen3MoeConfig(max_position_embeddings=positions, rope_scaling=rope)) == expected


def test_layers_of_several_kinds_are_made_for_what_all_of_them_are() -> None:
    scaled = {"rope_type": "linear", "factor": 8.0}
    config = PretrainedConfig()
    config.max_position_embeddings = 1024
    config.rope_parameters = {"full_attention": scaled, "sliding_attention": {"rope_type": "default"}}
    assert max_positions(config) == 1024
    config.rope_parameters = {"full_attention": scaled, "sliding_attention": scaled}
    assert max_positions(config) == 8192


def test_longrope_names_its_length_itself() -> None:
    assert isinstance(LENGTH_ROPES["phimoe"], PhimoeConfig)
    assert max_positions(LENGTH_ROPES["phimoe"]) == 128


def test_a_model_without_positions_has_no_limit() -> None:
    assert max_positions(SwitchTransformersConfig()) is None
