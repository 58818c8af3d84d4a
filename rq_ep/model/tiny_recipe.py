"""What the tiny model is: its sizes and its training in figures, and its configuration in every family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rq_ep.core.errors import check_choice, check_integer
from rq_ep.model.text.byte_tokenizer import BOS, EOS, PAD, VOCAB_SIZE

MAX_LENGTH = 512


@dataclass(frozen=True)
class TrainingRecipe:
    """The hyperparameters of training and of the model; a checkpoint keeps them, so that it is not trained twice."""

    family: str = "qwen3_moe"
    steps: int = 1000
    seed: int = 0
    num_experts: int = 16
    top_k: int = 2
    num_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 64
    num_heads: int = 4
    batch_size: int = 8
    sequence_length: int = 64
    peak_lr: float = 3e-3
    aux_coefficient: float = 0.01  # of the balance loss; less lets the load skew, more evens it out

    def __post_init__(self) -> None:
        check_choice("--family", self.family, FAMILIES)
        check_integer("--steps", self.steps, 1)
        check_integer("--seed", self.seed)


def transformers_config(recipe: TrainingRecipe) -> Any:
    """The transformers configuration of `recipe`."""
    from transformers import AutoConfig  # whose import takes seconds: a mistake in a recipe shows at once

    return AutoConfig.for_model(
        recipe.family, vocab_size=VOCAB_SIZE, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        **FAMILIES[recipe.family](recipe),
    )  # fmt: skip


def _decoder(recipe: TrainingRecipe) -> dict[str, Any]:
    """Settings that have the same names in all decoder-only families."""
    return {
        "hidden_size": recipe.hidden_size, "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads, "num_key_value_heads": recipe.num_heads,
        "num_experts_per_tok": recipe.top_k, "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.06, "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen3_moe(recipe: TrainingRecipe) -> dict[str, Any]:
    return {
        **_decoder(recipe),
        "num_experts": recipe.num_experts, "moe_intermediate_size": recipe.intermediate_size,
        "head_dim": recipe.hidden_size // recipe.num_heads, "norm_topk_prob": True, "router_aux_loss_coef": 0.0,
    }  # fmt: skip


def _olmoe(recipe: TrainingRecipe) -> dict[str, Any]:
    return {
        **_decoder(recipe),
        "num_experts": recipe.num_experts, "intermediate_size": recipe.intermediate_size, "router_aux_loss_coef": 0.0
    }  # fmt: skip


def _mixtral(recipe: TrainingRecipe) -> dict[str, Any]:
    return {
        **_decoder(recipe),
        "num_local_experts": recipe.num_experts, "intermediate_size": recipe.intermediate_size,
        "head_dim": recipe.hidden_size // recipe.num_heads, "sliding_window": None, "router_aux_loss_coef": 0.0,
    }  # fmt: skip


def _deepseek(recipe: TrainingRecipe) -> dict[str, Any]:
    head_dim = recipe.hidden_size // recipe.num_heads
    return {
        **_decoder(recipe),
        "n_routed_experts": recipe.num_experts, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": recipe.intermediate_size, "intermediate_size": 2 * recipe.intermediate_size,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "q_lora_rank": None, "kv_lora_rank": recipe.hidden_size // 2,
        "qk_nope_head_dim": head_dim // 2, "qk_rope_head_dim": head_dim // 2, "v_head_dim": head_dim,
    }  # fmt: skip


def _deepseek_v2(recipe: TrainingRecipe) -> dict[str, Any]:
    return {**_deepseek(recipe), "topk_method": "group_limited_greedy"}


def _gpt_oss(recipe: TrainingRecipe) -> dict[str, Any]:
    return {
        **_decoder(recipe),
        "num_local_experts": recipe.num_experts, "intermediate_size": recipe.intermediate_size,
        "head_dim": recipe.hidden_size // recipe.num_heads, "sliding_window": 128, "router_aux_loss_coef": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip


def _switch_transformers(recipe: TrainingRecipe) -> dict[str, Any]:
    """Top-1, `top_k` is ignored; as many layers in the encoder as in the decoder, every second one sparse."""
    return {
        "num_experts": recipe.num_experts, "d_model": recipe.hidden_size, "d_ff": recipe.intermediate_size,
        "num_heads": recipe.num_heads, "d_kv": recipe.hidden_size // recipe.num_heads,
        "num_layers": recipe.num_layers, "num_decoder_layers": recipe.num_layers,
        "num_sparse_encoder_layers": recipe.num_layers // 2, "num_sparse_decoder_layers": recipe.num_layers // 2,
        "expert_capacity": recipe.sequence_length, "router_jitter_noise": 0.0, "dropout_rate": 0.0,
        "decoder_start_token_id": PAD,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[TrainingRecipe], dict[str, Any]]] = {
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "switch_transformers": _switch_transformers,
}
