"""The paged KV cache: its size, what a token takes of it, and how keys and values of unequal widths (MLA) lie in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PretrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

PAGE_SIZE = 32  # tokens
CPU_TOKENS = 16384


def cache_size(num_tokens: int | None, device_type: str) -> int | None:
    """Tokens of a rank's cache, whole pages; None: what a GPU has left.

    Args:
        num_tokens: as asked for; None: by default.
        device_type: cpu or cuda.
    """
    if num_tokens is None and device_type != "cpu":
        return None
    return -(-(num_tokens or CPU_TOKENS) // PAGE_SIZE) * PAGE_SIZE


def has_full_attention(config: PretrainedConfig) -> bool:
    """Whether every layer keeps all tokens, so that no request can have more of them than the cache."""
    return list(group_layers_by_attn_type(config.get_text_config())) == [FULL_ATTENTION]


def latent_widths(config: PretrainedConfig) -> tuple[int, int] | None:
    """Widths of a head's keys and of its values, as attention sees them; None for other kinds of attention."""
    if getattr(config, "kv_lora_rank", None) is None:
        return None
    return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim


@contextmanager
def cache_head_size(config: PretrainedConfig) -> Iterator[None]:
    """Inside, the config names the width that a cache head needs.

    DeepSeek's `head_dim` is that of its rotary part, and rotary embeddings go on reading it: it is put back.
    """
    if (widths := latent_widths(config)) is None:
        yield
        return
    own = config.head_dim
    config.head_dim = max(widths)
    try:
        yield
    finally:
        config.head_dim = own


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values over all layers, as the paged cache holds them: windows save nothing."""
    text = config.get_text_config()
    with cache_head_size(text):
        width = find_head_dim(text)
    return 2 * int(text.num_hidden_layers) * find_num_key_value_heads(text) * width * dtype.itemsize


def pad_cache(cache: PagedAttentionCache, config: PretrainedConfig) -> None:
    """Let a cache made under `cache_head_size` take keys and values of unequal widths, filled up with zeros."""
    if (widths := latent_widths(config)) is not None:
        cache.update = _padded(cache.update, *widths)


def _padded(update: Callable[..., Any], key_width: int, value_width: int) -> Callable[..., Any]:
    width = max(key_width, value_width)

    def padded_update(
        key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(_widened(key_states, width), _widened(value_states, width), layer_idx, kwargs)
        return keys[..., :key_width], values[..., :value_width]

    return padded_update


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - states.shape[-1]
    return pad(states, (0, missing)) if missing else states  # padding by nothing would copy
