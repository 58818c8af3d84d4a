from typing import Any

import pytest

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.config_limits import check_sizes

DEEPSEEK = {"num_hidden_layers": 61, "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}


@pytest.mark.parametrize(
    "config",
    [
        DEEPSEEK,
        {**DEEPSEEK, "n_group": None, "topk_group": None, "q_lora_rank": None, "pad_token_id": -1},
        {
            "time_step_limit": [0.0, float("inf")],
            "use_shared_experts": True,
            "mlp_only_layers": [],
            "sliding_window": -1,
        },
        {**DEEPSEEK, "rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"max_position_embeddings": 10_485_760, "vocab_size": 290_943, "ngram_vocab_size_base": 20_000_000},
    ],
)
def test_what_models_have_is_accepted(config: dict[str, Any]) -> None:
    check_sizes(config, "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**DEEPSEEK, "n_group": 3}, "n_group 3: does not divide the 256 experts"),
        ({**DEEPSEEK, "topk_group": 9}, "topk_group 9: there are 8 groups"),
        ({**DEEPSEEK, "num_experts_per_tok": None}, "'num_experts_per_tok' is null"),
        (
            {"text_config": {"num_hidden_layers": 10**9}},
            "'text_config': 'num_hidden_layers' 1000000000: must be at most",
        ),
        ({"num_nextn_predict_layers": -1}, "'num_nextn_predict_layers' -1: must be at least 0"),
        ({"a": {"b": {"c": float("nan")}}}, "'a': 'b': 'c' is nan"),
        ({"q_lora_rank": 1.5}, "'q_lora_rank' 1.5: must be a whole number"),
    ],
)
def test_what_no_model_has_is_refused_by_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"config.json: {message}"):
        check_sizes(config, "config.json")


def test_objects_in_objects_are_bounded() -> None:
    config: dict[str, Any] = {}
    for _ in range(900):
        config = {"a": config}
    with pytest.raises(UserError, match="nested too deeply"):
        check_sizes(config, "config.json")
