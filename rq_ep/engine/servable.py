"""Which models continuous batching can serve, and with which attention."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from rq_ep.config import CACHES
from rq_ep.core.errors import UserError
from rq_ep.engine.kv_cache import has_uniform_heads

PAGED, PADDED = CACHES
# Families whose answers to images are tested: a forward that fails in a step would end the server.
IMAGE_MODEL_TYPES = (
    "aria", "deepseek_ocr2", "ernie4_5_vl_moe", "gemma4", "glm4v_moe", "glm5_next", "inkling2", "inkling_mm_model",
    "internvl", "kimi_k25", "minimax_m3_vl", "mistral3", "mistral_large4", "muse_spark", "qwen3_omni_moe_thinker",
    "qwen3_vl_moe", "unlimited_ocr",
)  # fmt: skip


def choose_cache(config: PretrainedConfig, wanted: str | None = None) -> str:
    """Choose the cache that a model's requests are batched over: paged where its layers allow it, else padded.

    Args:
        config: of the model.
        wanted: PAGED or PADDED, whatever else is possible; None: not said.

    Raises:
        UserError: an encoder-decoder, which continues no prompt, or a paged cache is wanted for layers that have none.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"model type {config.model_type!r} is an encoder-decoder, which cannot be served over HTTP: use "
            "rq_ep.load(...).generate(...), or serve a decoder-only model"
        )
    try:
        group_layers_by_attn_type(config.get_text_config())
    except ValueError:
        if wanted != PAGED:
            return PADDED
        layer_types = ", ".join(sorted(set(config.get_text_config().layer_types)))
        raise UserError(
            f"--cache paged: model type {config.model_type!r} has layers of {layer_types}, and the paged cache knows "
            "only full_attention and sliding_attention: leave it out, or say --cache padded"
        ) from None
    return wanted or PAGED


def why_text_only(config: PretrainedConfig, cache: str) -> str | None:
    """Why a model is served without images; None: it takes them, if its processor works here."""
    if config.model_type not in IMAGE_MODEL_TYPES:
        return f"model type {config.model_type!r} takes no images here (rq_ep/model/FAMILIES.md says which do)"
    return None if cache == PADDED else f"images need the padded cache, and this is the {cache} one: say --cache padded"


def set_attention(model: PreTrainedModel, attn_implementation: str | None) -> str:
    """Choose the attention of a model and return its name; by default sdpa, or eager for families without it.

    Raises:
        UserError: transformers does not know the implementation, or not for this family; flash attention where keys and
            values differ in width (MLA), or layers in their heads.
    """
    chosen = attn_implementation or ("sdpa" if model._supports_sdpa else "eager")
    if "flash" in chosen and not has_uniform_heads(model.config):
        raise UserError(
            f"--attn-implementation {chosen}: model type {model.config.model_type!r} has keys and values, or layers, "
            "of unequal heads, which flash attention does not take here: use sdpa or eager"
        )
    try:
        model.set_attn_implementation({"": chosen, **dict.fromkeys(_text_parts(model.config), chosen)})
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--attn-implementation {chosen}: {reason}") from None
    _fill_sinks(model)
    return chosen


def _text_parts(config: PretrainedConfig) -> list[str]:
    """Where a configuration has that of its text part: encoders keep an attention of their own."""
    text = config.get_text_config()
    return [name for name in config.sub_configs or {} if getattr(config, name, None) is text]


def _fill_sinks(model: PreTrainedModel) -> None:
    """Give layers without attention sinks ones that take nothing, in families where other layers have some.

    transformers' eager attention over the paged cache asks whether a layer has the attribute, not whether it is None.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if getattr(module, "sinks", False) is None:
            module.sinks = module.o_proj.weight.new_full((module.config.num_attention_heads,), -torch.inf)
