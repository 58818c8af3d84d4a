"""Tokens that are not finite numbers: they must not reach the other requests of a batch, and end their own request.

All requests of a batch lie in one attention call, kept apart by a mask alone, and a masked NaN is still one: 0 * NaN.

Axes: H heads, T tokens of a step, D width of a head, N rows with logits, V vocabulary.
"""

from typing import Any

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

NOT_FINITE = "the model's logits are not finite"


def is_finite(logits_NV: torch.Tensor) -> torch.Tensor:
    """[N] bool: no logit of the row is NaN, and the largest one is a number; others may be minus infinity."""
    return logits_NV.amax(dim=-1).isfinite()


class NonFiniteTokens:
    """The tokens of a step whose keys or values are not finite in some layer. The cache takes zeros in their place."""

    def __init__(self) -> None:
        self._is_finite_T: torch.Tensor | None = None

    def watch(self, cache: PagedAttentionCache) -> None:
        """Look at all that a cache is given from now on."""
        update = cache.update

        def finite_update(
            key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = self._finite(key_states, value_states)
            updated: tuple[torch.Tensor, torch.Tensor] = update(keys, values, layer_idx, kwargs)
            return updated

        cache.update = finite_update

    def take(self) -> torch.Tensor | None:
        """[T] bool, which tokens of the step were finite, or None if all were; the next step begins."""
        is_finite_T, self._is_finite_T = self._is_finite_T, None
        return None if is_finite_T is None or bool(is_finite_T.all()) else is_finite_T

    def _finite(self, keys_1HTD: torch.Tensor, values_1HTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sums_T = keys_1HTD.sum((0, 1, 3), dtype=torch.float32) + values_1HTD.sum((0, 1, 3), dtype=torch.float32)
        is_finite_T = sums_T.isfinite()  # a sum is as finite as its terms, and takes one pass over them
        if not is_finite_T.is_cuda and bool(is_finite_T.all()):  # a GPU would have to be waited for
            return keys_1HTD, values_1HTD
        self._is_finite_T = is_finite_T if self._is_finite_T is None else self._is_finite_T & is_finite_T
        is_finite_T1 = is_finite_T[:, None]
        return torch.where(is_finite_T1, keys_1HTD, 0), torch.where(is_finite_T1, values_1HTD, 0)
