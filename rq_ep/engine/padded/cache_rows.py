"""Rows of a dense cache of transformers: how they join, leave, and lose the padding that all of them have.

A dense cache has one row for each sequence. Rows of unequal length end together, with zeros on their left, which the
attention mask hides. Recurrent and convolutional states have no length, so that nothing is padded there.

Axes: B rows, T positions.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

# By exact class: one that is derived from them may keep what is not known here.
_JOINABLE = (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
_STATES = ("conv_states", "recurrent_states")


def new_cache(model: PreTrainedModel) -> Cache | None:
    """An empty cache, as `generate` makes it; None: the model makes its own in the first forward pass."""
    generative: Any = model
    if not generative._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def is_joinable(cache: Cache | None) -> bool:
    """Whether rows of such caches can lie in one."""
    return type(cache) is DynamicCache and all(type(layer) in _JOINABLE for layer in cache.layers)


def join(cache: Cache, other: Cache) -> None:
    """Append the rows of another cache; the shorter ones of both are padded on the left."""
    layers: list[tuple[Any, Any]] = list(zip(cache.layers, other.layers, strict=True))
    for layer, added in layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = _joined(layer.keys, added.keys, -2), _joined(layer.values, added.values, -2)
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = max(layer.cumulative_length, added.cumulative_length)
        if getattr(layer, "indexer_keys", None) is not None:
            layer.indexer_keys = _joined(layer.indexer_keys, added.indexer_keys, 1)
        if getattr(layer, "indexer_position_ids", None) is not None:
            layer.indexer_position_ids = _joined(layer.indexer_position_ids, added.indexer_position_ids, 2, rows=1)
        for states, new in _states(layer, added):
            for index, state in states.items():
                states[index] = None if state is None else torch.cat([state, new[index]])


def keep_rows(cache: Cache, rows_B: torch.LongTensor, num_positions: int, num_cut: int) -> None:
    """Keep some rows, in this order, and cut off positions on the left that are padding of all of them.

    Args:
        cache: it has `num_positions` + `num_cut` positions.
        rows_B: indices of the rows that stay.
        num_positions: how many positions stay.
        num_cut: how many are cut off.
    """
    cache.reorder_cache(rows_B)
    if not num_cut:
        return
    layers: list[Any] = cache.layers
    for layer in layers:
        width = num_positions
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length -= num_cut
            width = min(width, layer.sliding_window - 1)
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
        if getattr(layer, "indexer_keys", None) is not None:
            layer.indexer_keys = layer.indexer_keys[:, -width:]
        if getattr(layer, "indexer_position_ids", None) is not None:
            layer.indexer_position_ids = layer.indexer_position_ids[..., -width:]


def cache_bytes(cache: Cache | None, num_positions: int) -> tuple[int, int]:
    """Bytes of a cache of one row that its length does not change, and bytes of a position."""
    fixed, growing = 0, 0
    for layer in [] if cache is None else cache.layers:
        for name, value in vars(layer).items():
            tensors = value.values() if isinstance(value, dict) else [value]
            size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
            if name in _STATES:
                fixed += size
            else:
                growing += size
    return fixed, growing // num_positions


def _states(layer: Any, added: Any) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    return [(getattr(layer, name), getattr(added, name)) for name in _STATES if hasattr(layer, name)]


def _joined(first: torch.Tensor, second: torch.Tensor, positions: int, rows: int = 0) -> torch.Tensor:
    width = max(first.shape[positions], second.shape[positions])
    return torch.cat([_widened(first, positions, width), _widened(second, positions, width)], dim=rows)


def _widened(tensor: torch.Tensor, positions: int, width: int) -> torch.Tensor:
    missing = width - tensor.shape[positions]
    if not missing:
        return tensor
    num_later = tensor.dim() - 1 - (positions % tensor.dim())
    return pad(tensor, (0, 0) * num_later + (missing, 0))
