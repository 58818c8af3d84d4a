"""Rotary embeddings whose frequencies follow the length of a sequence (LongRoPE, dynamic NTK), for a step of several.

transformers takes the longest sequence of a batch for all of it. Here each token gets what `generate` gives it for its
sequence alone: the length when the token was run, which for a prompt's tokens is the prompt's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rq_ep.core.arrays import IntArray

# Their `generate` computes all keys anew, with the long factors, when a sequence outgrows the short ones.
RECOMPUTING_MODEL_TYPES = ("phimoe",)


class SequenceRotary:
    """The rotary embeddings of a model that follow the length of a sequence; for most models there are none.

    Args:
        model: its rotary modules are changed where they follow the length.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._lengths_T: IntArray | None = None
        modules = [module for module in model.modules() if _follows_length(module)]
        for module in modules:
            module.forward = partial(self._forward, module, module.forward)
        self.follows_length = bool(modules)
        recomputes = self.follows_length and model.config.model_type in RECOMPUTING_MODEL_TYPES
        # Tokens after which all keys of a sequence are to be computed anew; None: they are kept.
        self.recompute_after = _limit(modules[0], None) if recomputes else None

    @contextmanager
    def lengths(self, lengths_T: IntArray) -> Iterator[None]:
        """Inside, a forward pass has tokens of sequences of these lengths."""
        self._lengths_T = lengths_T
        try:
            yield
        finally:
            self._lengths_T = None

    def batch_lengths(self, futures: Sequence[Any]) -> IntArray:
        """[T] lengths of the sequences of a batch, from transformers' records of it."""
        return np.concatenate([self._lengths_of(future.state, future.query_length) for future in futures])

    def _lengths_of(self, state: Any, num_tokens: int) -> IntArray:
        """Lengths at the last tokens of a request, whose answer is part of its prompt once it had to be recomputed."""
        prompt = len(state.initial_tokens)
        if self.recompute_after is None:
            prompt = state._true_initial_tokens or prompt
        end = state.position_offset
        return np.maximum(np.arange(end - num_tokens + 1, end + 1), prompt)

    def _forward(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        x: torch.Tensor,
        position_ids: torch.Tensor,
        layer_type: str | None = None,
    ) -> Any:
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        if self._lengths_T is None or not _is_length_type(_rope_type(module, layer_type)):
            return forward(x, position_ids, **kwargs)
        limit, is_dynamic = _limit(module, layer_type), _rope_type(module, layer_type) != "longrope"
        longest_T = self._lengths_T if is_dynamic else self._lengths_T.max()
        key_T = np.where(self._lengths_T > limit, longest_T, limit)  # tokens of one key have the same frequencies
        parts, places = [], []
        for key in np.unique(key_T):
            places.append(np.flatnonzero(key_T == key))
            if is_dynamic:
                _forget_longest(module, layer_type)
            # The last position is no token's: the module takes it for the end of the longest sequence.
            last = position_ids.new_full((1, 1), key - 1)
            positions = torch.cat([position_ids[:, torch.from_numpy(places[-1])], last], dim=1)
            parts.append(forward(x, positions, **kwargs))
        order = torch.from_numpy(np.argsort(np.concatenate(places)))
        if isinstance(parts[0], torch.Tensor):
            return _joined(parts, order)
        return tuple(_joined(tensors, order) for tensors in zip(*parts, strict=True))


def _joined(parts_1TD: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    return torch.cat([part[:, :-1] for part in parts_1TD], dim=1)[:, order.to(parts_1TD[0].device)]


def _follows_length(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    return any(_is_length_type(each) for each in (types.values() if isinstance(types, dict) else [types]))


def _is_length_type(rope_type: str | None) -> bool:
    return rope_type is not None and (rope_type == "longrope" or "dynamic" in rope_type)


def _rope_type(module: Any, layer_type: str | None) -> str:
    rope_type: str = module.rope_type if layer_type is None else module.rope_type[layer_type]
    return rope_type


def _limit(module: Any, layer_type: str | None) -> int:
    """The longest sequence with the frequencies of short ones."""
    if _rope_type(module, layer_type) != "longrope":
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    return int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])


def _forget_longest(module: Any, layer_type: str | None) -> None:
    """Bring a module into its first state: with dynamic NTK it keeps the frequencies of the longest sequence so far."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
