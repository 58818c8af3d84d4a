"""What a token takes of the KV cache."""

import torch
from transformers import PretrainedConfig
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from rq_ep.engine.latent_attention import cache_head_size


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values over all layers, as the paged cache holds them: windows save nothing."""
    text = config.get_text_config()
    with cache_head_size(text):
        width = find_head_dim(text)
    return 2 * int(text.num_hidden_layers) * find_num_key_value_heads(text) * width * dtype.itemsize
