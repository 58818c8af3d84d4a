"""The paged KV cache: its size, what a token takes of it, and how layers of unequal heads share its rows.

Keys and values may differ in width (MLA, MiMo), and layers in the number of their heads and in their width (Gemma,
MiMo). The cache has one shape for all: a token's keys, or its values, fill a row of it from the left, and zeros follow.

Axes: T tokens of a step, N tokens read, H heads, D width of a head; their product is the row.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import PretrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION, SLIDING_ATTENTION
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

PAGE_SIZE = 32  # tokens
CPU_TOKENS = 16384
# Families whose layers with a sliding window have so many times the heads that the configuration names.
SLIDING_HEADS = {"mimo_v2_flash": 2}


class KVShape(NamedTuple):
    """What a layer hands to the cache of each token: its heads, and the widths of their keys and of their values."""

    num_heads: int
    key_width: int
    value_width: int

    @property
    def row(self) -> int:
        return self.num_heads * max(self.key_width, self.value_width)


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


def kv_shapes(config: PretrainedConfig) -> list[KVShape]:
    """What each layer hands to the cache; multi-head latent attention (MLA) hands over expanded keys and values."""
    text = config.get_text_config()
    shapes = []
    for at in range(text.num_hidden_layers):
        layer = text.per_layer_config[at]
        num_heads, width = find_num_key_value_heads(layer), find_head_dim(layer)
        if getattr(layer, "kv_lora_rank", None) is not None:
            width = layer.qk_nope_head_dim + layer.qk_rope_head_dim  # DeepSeek's `head_dim` is the rotary part's
        if (layer_types := getattr(text, "layer_types", None)) and layer_types[at] == SLIDING_ATTENTION:
            num_heads *= SLIDING_HEADS.get(text.model_type, 1)
        shapes.append(KVShape(num_heads, width, getattr(layer, "v_head_dim", None) or width))
    return shapes


def has_uniform_heads(config: PretrainedConfig) -> bool:
    """Whether all layers hand over the same number of heads, with keys and values of one width."""
    shapes = kv_shapes(config)
    return len(set(shapes)) == 1 and shapes[0].key_width == shapes[0].value_width


def cache_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a model's configuration of text, whose heads are those of the cache: as wide as the widest of a layer,
    and so many that the longest row fits."""
    shapes = kv_shapes(config)
    width = max(max(shape.key_width, shape.value_width) for shape in shapes)
    text = copy(config.get_text_config())
    text.per_layer_config = None
    text.head_dim = width
    text.num_key_value_heads = -(-max(shape.row for shape in shapes) // width)
    return text


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values over all layers, as the paged cache holds them: windows save nothing."""
    text = cache_config(config)
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize)


def pad_cache(cache: PagedAttentionCache, config: PretrainedConfig) -> None:
    """Let a cache made by `cache_config` take keys and values of other heads than its own, filled up with zeros."""
    if not has_uniform_heads(config):
        cache.update = _padded(cache.update, cache.config.num_key_value_heads, cache.config.head_dim)


def _padded(update: Callable[..., Any], num_heads: int, width: int) -> Callable[..., Any]:
    def padded_update(
        key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (_as_rows(states, num_heads, width) for states in (key_states, value_states))
        keys, values = update(*rows, layer_idx, kwargs)
        return _as_heads(keys, key_states), _as_heads(values, value_states)

    return padded_update


def _as_rows(states_1HTD: torch.Tensor, num_heads: int, width: int) -> torch.Tensor:
    """[1, H', T, D'] the heads of each token, laid end to end in the row of the cache."""
    _, own_heads, num_tokens, own_width = states_1HTD.shape
    if (own_heads, own_width) == (num_heads, width):
        return states_1HTD  # padding by nothing would copy
    rows_T = states_1HTD[0].transpose(0, 1).reshape(num_tokens, own_heads * own_width)
    rows_T = pad(rows_T, (0, num_heads * width - own_heads * own_width))
    return rows_T.view(1, num_tokens, num_heads, width).transpose(1, 2)


def _as_heads(rows_1HND: torch.Tensor, states_1HTD: torch.Tensor) -> torch.Tensor:
    """[1, H, N, D] the heads that lie in the rows that were read, for states of this shape."""
    _, num_heads, _, width = states_1HTD.shape
    if rows_1HND.shape[1] == num_heads and rows_1HND.shape[3] == width:
        return rows_1HND
    rows_N = rows_1HND[0].transpose(0, 1).flatten(1)[:, : num_heads * width]
    return rows_N.view(-1, num_heads, width).transpose(0, 1).unsqueeze(0)
