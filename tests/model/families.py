"""Tiny random models of every family that the seam is tested on, and one checkpoint of each."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

from rq_ep.model.text.teacher_forcing import teacher_forcing_inputs

VOCAB_SIZE = 97

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}

# Odd numbers of experts, dense first layers, shared experts, expert groups, sparse steps: everything that varies.
FAMILIES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(
        **_SHAPE, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=48,
        num_local_experts=5, num_experts_per_tok=2,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_SHAPE, num_hidden_layers=3, num_key_value_heads=2, head_dim=16, intermediate_size=80,
        moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, decoder_sparse_step=2, norm_topk_prob=True,
    ),
    "olmoe": OlmoeConfig(
        **_SHAPE, num_hidden_layers=2, num_key_value_heads=4, intermediate_size=32,
        num_experts=8, num_experts_per_tok=2,
    ),
    "deepseek_v2": DeepseekV2Config(
        **_SHAPE, **_LATENT_ATTENTION, num_hidden_layers=3, intermediate_size=80, moe_intermediate_size=32,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1,
        topk_method="group_limited_greedy", n_group=2, topk_group=1,
    ),
    "deepseek_v3": DeepseekV3Config(
        **_SHAPE, **_LATENT_ATTENTION, num_hidden_layers=3, intermediate_size=80, moe_intermediate_size=32,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1,
        n_group=2, topk_group=1,
    ),
    "gpt_oss": GptOssConfig(
        **{**_SHAPE, "max_position_embeddings": 131072}, num_hidden_layers=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=48, num_local_experts=5, num_experts_per_tok=2, sliding_window=8,
    ),
}  # fmt: skip

_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 5.0, "original_max_position_embeddings": 24,
    "short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [1.0 + 4.0 * n for n in range(8)],
}  # fmt: skip
_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

# Frequencies that follow the length of a sequence, beyond 24 tokens; phimoe computes all keys anew there.
LENGTH_ROPES: dict[str, PretrainedConfig] = {
    "phimoe": PhimoeConfig(
        **_SHAPE, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=48, num_local_experts=5,
        attention_bias=True, lm_head_bias=True,
        rope_parameters={**_LONGROPE, "short_mscale": 1.0, "long_mscale": 1.9},
    ),
    "longrope": MixtralConfig(
        **_SHAPE, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=48, num_local_experts=5, head_dim=16,
        rope_parameters=_LONGROPE,
    ),
    "dynamic": MixtralConfig(
        **{**_SHAPE, "max_position_embeddings": 24}, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=48,
        num_local_experts=5, head_dim=16, rope_parameters=_DYNAMIC_ROPE,
    ),
}  # fmt: skip

# Encoder-decoder; capacity 2 drops tokens of all but the shortest sequences, odd numbers of experts and sparse layers.
SWITCH = SwitchTransformersConfig(
    vocab_size=VOCAB_SIZE, d_model=64, d_kv=16, d_ff=48, num_heads=4, num_layers=3, num_decoder_layers=3,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=3, num_experts=5, expert_capacity=2,
    bos_token_id=None, eos_token_id=None, pad_token_id=0, decoder_start_token_id=0,
)  # fmt: skip


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A dense model with weights, biases, sinks and router corrections large enough for errors to show."""
    generator = torch.Generator().manual_seed(seed)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        auto_class = AutoModelForMultimodalLM
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)  # for what stays as it is made: axk2 has random weights in its norms
        model = auto_class.from_config(deepcopy(config), dtype=torch.float32, attn_implementation="eager")
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):  # the experts of a token by its id, in deepseek_v4
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) % config.n_routed_experts)
            elif "norm" not in name and tensor.is_floating_point():
                tensor.copy_(torch.empty_like(tensor).normal_(0, 0.15, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Logits of one pass over known text; an encoder-decoder reads its first half and writes the second."""
    return model(**teacher_forcing_inputs(model.config, tokens_BT)[0], use_cache=False).logits


def save(model: PreTrainedModel, path: Path, **options: object) -> Path:
    """Write an ordinary checkpoint, without transformers' progress bar."""
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path, **options)
    finally:
        logging.enable_progress_bar()
    return path


def prompt(num_sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """[num_sequences, length] random token ids."""
    return torch.randint(1, VOCAB_SIZE, (num_sequences, length), generator=torch.Generator().manual_seed(seed))
