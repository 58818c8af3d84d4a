"""One row for every family of transformers that decorates its experts: how its tiny model is made.

`SMALL` holds what families share: of a configuration, every key with one of these names gets the small value. A row
names what the family needs besides, by the keys of its `config.json`. Where a family mixes kinds of layers, its tiny
model has each of them.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

SMALL: dict[str, Any] = {
    "vocab_size": 97, "vocab_size_per_layer_input": 97, "unpadded_vocab_size": 97, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "dense_intermediate_size": 48,
    "hidden_size_per_layer_input": 8, "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "hc_lowrank": 8,
    # Experts and routers
    "num_experts": 6, "n_routed_experts": 6, "num_local_experts": 6, "moe_num_experts": 6,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 24, "moe_hidden_size": 16, "router_hidden_size": 16,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    # Attention: full, sliding, latent, indexed
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
    "sliding_window": 8, "sliding_window_size": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 32,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    # With few heads the scores of an indexer are often 0, and which of equal ones it takes depends on their number.
    "index_head_dim": 8, "index_n_heads": 16, "index_topk": 8, "o_lora_rank": 8, "o_groups": 2,
    # Linear attention and state space models
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "use_mamba_kernels": False, "mamba_n_heads": 4, "mamba_d_state": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2,
    # Encoders of images and sounds
    "depth": 1, "num_heads": 2, "patch_size": 4, "image_size": 16, "num_position_embeddings": 16,
    "position_embedding_size": 16, "pos_emb_height": 4, "pos_emb_width": 4, "out_hidden_size": 32,
    "text_hidden_size": 32, "adapter_in_dim": 32, "adapter_out_dim": 32, "adapter_input_size": 32, "output_dim": 32,
    "projection_hidden_dim": 16, "projection_intermediate_size": 16, "projector_hidden_size": 16,
    "output_proj_dims": 16, "output_channels": 16, "downsample_channels": [16, 32], "mlp_dim": 32,
    "deepstack_visual_indexes": [0], "global_attn_indexes": [1], "subsampling_conv_channels": [8, 8],
    "downsample_hidden_size": 8, "feature_size": 16, "mel_vocab_size": 8, "n_mel_bins": 4, "num_mel_bins": 16,
    "encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    # Speech
    "decoder_dim": 16, "thinker_hidden_size": 32, "num_quantizers": 2, "num_code_groups": 2, "codebook_size": 16,
    "accept_hidden_layer": 1,
}  # fmt: skip

ONE_LAYER = {"num_hidden_layers": 1}
LATENT = {"num_key_value_heads": 4}  # the keys of all heads come from one latent vector
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}


def _layers(*types: str) -> dict[str, Any]:
    return {"layer_types": list(types), "num_hidden_layers": len(types)}


def _rope(**keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {**ROPE, **keys}}


_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_LINEAR = _layers("linear_attention", "full_attention", "linear_attention")
_SLIDING = _layers("sliding_attention", "sliding_attention", "full_attention")

# Family -> what its tiny model needs besides `SMALL`; a family is named as its folder in transformers.
TABLE: dict[str, dict[str, Any]] = {
    "afmoe": {"global_attn_every_n_layers": 2},
    "aria": {"vision_config": {"model_type": "idefics3_vision"}},
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT, **_LINEAR},
    "beam": {**_SLIDING, **_DENSE_FIRST},
    "cohere2_moe": {"sliding_window_pattern": 2},
    "deepseek_ocr2": {"text_config": _DENSE_FIRST, "vision_config": {"encoder_config": ONE_LAYER}},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy", "n_group": 2},
    "deepseek_v3": {**LATENT, "n_group": 2},
    "deepseek_v32": LATENT,
    "deepseek_v4": {
        **_layers("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,
    },
    "diffusion_gemma": {
        "text_config": {**_SLIDING, "global_head_dim": 16},
        "vision_config": {"model_type": "gemma4_vision", **ONE_LAYER},
    },
    "dots1": {},
    "dots3_note": {
        "text_config": {
            **LATENT,
            **_layers("indexed_attention", "indexed_attention", "sliding_attention"),
            "head_dim": 16,
            **{"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
            **{"swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        },
        "vision_config": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
        "audio_config": ONE_LAYER,
    },
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [24, 16], **_rope(mrope_section=[1, 1, 2])}},
    "exaone_moe": {"sliding_window_pattern": 2},
    "flex_olmo": {},
    "flint": {**_layers("full_attention", "sliding_attention", "full_attention"), "mlp_only_layers": [0]},
    "gemma4": {
        "text_config": {**_SLIDING, "enable_moe_block": True, "global_head_dim": 16},
        "vision_config": ONE_LAYER,
        "audio_config": ONE_LAYER,
    },
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm4v_moe": {"text_config": _rope(mrope_section=[1, 1, 2], partial_rotary_factor=1.0)},
    "glm5_next": {
        "text_config": {
            **LATENT,
            **_layers("linear_attention", "linear_attention", "indexed_attention"),
            **_DENSE_FIRST,
            **{"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2},
        }
    },
    "glm_moe_dsa": LATENT,
    "gpt_oss": _rope(),
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": _LINEAR,
    "granitemoeshared": {},
    "hunyuan_v1_moe": {"moe_topk": [2, 1, 3]},
    "hy_v3": {},
    "hy_v4": {},
    "inkling": {"text_config": _layers("hybrid_sliding", "hybrid", "hybrid_sliding"), "vision_config": ONE_LAYER},
    "inkling2": {"text_config": _layers("hybrid_sliding", "hybrid", "hybrid_sliding"), "vision_config": ONE_LAYER},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "kimi_linear": {**LATENT, **_LINEAR},
    "kolibri1": _SLIDING,
    "laguna": _layers("full_attention", "sliding_attention", "full_attention"),
    "lfm2_moe": _layers("conv", "full_attention", "conv"),
    "mellum": _SLIDING,
    "mimo_v2_flash": {},
    "minimax": _LINEAR,
    "minimax_m2": {},
    "minimax_m3_vl": {
        "text_config": {
            **_layers("full_attention", "minimax_m3_sparse", "minimax_m3_sparse"),
            **_DENSE_FIRST,
            **{"rotary_dim": 8, "index_block_size": 4, "index_topk_blocks": 2, "index_n_heads": 2},
        },
        "vision_config": ONE_LAYER,
    },
    "mistral4": {**LATENT, "max_position_embeddings": 1048576},
    "mistral_large4": {
        "text_config": {**LATENT, **_rope()},
        "vision_config": {"model_type": "pixtral", **ONE_LAYER},
    },
    "mixtral": {},
    "muse_spark": {
        "vision_config": ONE_LAYER,
        "audio_config": {**ONE_LAYER, "patch_sizes": [4], "hidden_sizes": [8], "depths": [1]},
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]},
    "olmoe": {},
    "openai_privacy_filter": _rope(),
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": {
        "text_config": {**_LINEAR, **_rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5)},
    },
    "qwen3_moe": {},
    "qwen3_next": _LINEAR,
    "qwen3_omni_moe": {
        "thinker_config": {
            "text_config": {"sliding_window": None},  # its cache would have one, and its attention has none
            **{"vision_start_token_id": 1, "vision_end_token_id": 2},
        },
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 16}, "spatial_merge_size": 2},
    },
    "qwen3_vl_moe": {"text_config": _rope(mrope_section=[2, 1, 1])},
    "qwen4_exp": {
        "text_config": {
            **_layers("linear_attention", "indexed_attention", "linear_attention"),
            **_rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5),
            **{"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8},
            **{"indexer_budget": 8, "indexer_compress_ratio": 2},
        }
    },
    "solar_open": {},
    "unlimited_ocr": {"text_config": LATENT},
    "zaya": {"num_experts_per_tok": 1},
}

# Multimodal models whose text part is of one of these families
WRAPPERS: dict[str, dict[str, Any]] = {
    "internvl": {"text_config": {"model_type": "qwen3_moe"}, "vision_config": ONE_LAYER},
    "kimi_k25": {"text_config": {"model_type": "deepseek_v3", **TABLE["deepseek_v3"]}, "vision_config": ONE_LAYER},
    "mistral3": {
        "text_config": {"model_type": "mistral4", **TABLE["mistral4"]},
        "vision_config": {"model_type": "pixtral", **ONE_LAYER},
    },
}

# Families that are refused by name, and what is said of them
REFUSED = {
    "diffusion_gemma": "writes by diffusion, not token by token",
    "openai_privacy_filter": "is not a language model",
}

# Families whose folder is not named as the `model_type` of their checkpoints.
MODEL_TYPES = {"inkling": "inkling_mm_model"}


@cache
def decorated_families() -> frozenset[str]:
    """The families of the installed transformers whose experts class is decorated with `use_experts_implementation`."""
    folder = Path(transformers.__file__).parent / "models"
    return frozenset(
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", file.read_text(), re.MULTILINE)
    )


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a family's tiny model, as that of a whole checkpoint, encoders of images included."""
    return _small(CONFIG_MAPPING[MODEL_TYPES.get(family, family)], {**TABLE, **WRAPPERS}[family])


def _small(config_class: type[PretrainedConfig], row: Mapping[str, Any]) -> PretrainedConfig:
    names = {field.name for field in dataclasses.fields(config_class)}
    keys = {**{key: value for key, value in SMALL.items() if key in names}, **row}
    for name, part in (config_class.sub_configs or {}).items():
        own = dict(row.get(name, {}))
        part_class = CONFIG_MAPPING[own.pop("model_type")] if part is AutoConfig else part
        keys[name] = _small(part_class, own).to_dict()
    return config_class(**keys)
