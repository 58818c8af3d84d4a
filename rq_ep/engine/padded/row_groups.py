"""Rows of requests under way, and the forward passes over those that lie in one cache.

Axes: B rows, N tokens that each row has in a forward pass, T positions in the cache after it, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from rq_ep.core.arrays import IntArray
from rq_ep.engine.padded.cache_rows import cache_bytes, is_joinable, join, keep_rows, new_cache
from rq_ep.engine.requests import Request
from rq_ep.engine.rotary import SequenceRotary

# Recurrent layers of the first two forget the state of the tokens before when they are given more than one token; the
# third takes what comes behind its first forward pass for an answer, of which it attends to the last tokens only.
WHOLE_PROMPT_MODEL_TYPES = ("jamba", "minimax", "unlimited_ocr_text")


@dataclass(eq=False)
class SequenceRow:
    """A request under way: its prompt and answer so far, how many of these tokens its cache holds."""

    request: Request
    token_ids: list[int]
    arrived_s: float
    started_s: float | None = None  # its first step
    num_computed: int = 0
    num_prefill: int = 0  # tokens that were there when it was admitted: the prompt, or more if it had given way
    position_delta: int = 0  # of its tokens behind the prompt, where images have positions of their own (M-RoPE)
    order: int = 0  # among the rows that were admitted: the newest one gives way

    @property
    def answer_ids(self) -> list[int]:
        """Its tokens behind the prompt."""
        return self.token_ids[len(self.request.prompt_ids) :]


class RowGroup:
    """Rows that lie in one cache and make their steps together; rows of unequal length end together.

    Args:
        row: the first one.
        cache: an empty one; None: the model makes one in the first forward pass.
    """

    def __init__(self, row: SequenceRow, cache: Cache | None) -> None:
        self.rows = [row]
        self.cache = cache

    @property
    def width(self) -> int:
        """Positions of the cache."""
        return max(row.num_computed for row in self.rows)

    @property
    def num_positions(self) -> int:
        """Positions that the rows take of the cache's room, those of padding too."""
        return len(self.rows) * self.width

    def cache_bytes(self) -> tuple[int, int]:
        """Bytes that a row takes whatever its length, and bytes that each of its positions takes."""
        return cache_bytes(self.cache, self.num_positions)

    def join(self, other: "RowGroup") -> None:
        """Take the rows of another group; the caches must be joinable."""
        assert self.cache is not None
        assert other.cache is not None
        join(self.cache, other.cache)
        self.rows += other.rows

    def keep(self, rows: Sequence[SequenceRow]) -> None:
        """Keep only these of the rows, at least one; they stay in their order."""
        width = self.width
        indices = [index for index, row in enumerate(self.rows) if row in rows]
        self.rows = [self.rows[index] for index in indices]
        assert self.cache is not None
        keep_rows(self.cache, torch.LongTensor(indices), self.width, width - self.width)


class DenseForward:
    """Forward passes of a model over dense caches, with one row or, where the family allows it, several.

    Args:
        model: a causal language model.
        rotary: its rotary embeddings.
    """

    def __init__(self, model: PreTrainedModel, rotary: SequenceRotary) -> None:
        self._model = model
        self._rotary = rotary
        self.device = model.device
        self.recompute_after = rotary.recompute_after
        text_config = model.config.get_text_config()
        self.takes_chunks = text_config.model_type not in WHOLE_PROMPT_MODEL_TYPES
        # Frequencies that follow the length of a sequence are the longest row's for all.
        self.takes_rows = is_joinable(new_cache(model)) and not rotary.follows_length
        self._parameters = signature(model.forward).parameters  # a processor may make more than the model takes
        generative: Any = model
        self._kwargs = {"logits_to_keep": 1} if generative._supports_logits_to_keep() else {}

    def chunk_size(self, row: SequenceRow, max_tokens: int) -> int:
        """How many tokens of a prompt come next; answers that are computed anew are part of it."""
        if self.takes_chunks and not row.request.images:
            return min(row.num_prefill - row.num_computed, max_tokens)
        return 1 if row.num_computed else len(row.request.prompt_ids)

    def new_cache(self) -> Cache | None:
        return new_cache(self._model)

    def __call__(self, group: RowGroup, num_tokens: int) -> torch.Tensor:
        """Compute the next tokens of every row of a group.

        Args:
            group: its cache grows by them.
            num_tokens: how many of each row.

        Returns:
            [B, V] float32 logits at the last of them.
        """
        width, rows = group.width, group.rows
        begin_B1 = torch.tensor([[row.num_computed] for row in rows], device=self.device)
        delta_B1 = torch.tensor([[row.position_delta] for row in rows], device=self.device)
        position_ids_BN = begin_B1 + delta_B1 + torch.arange(num_tokens, device=self.device)
        mask_BT = torch.arange(width + num_tokens, device=self.device) >= width - begin_B1
        tokens = [row.token_ids[row.num_computed : row.num_computed + num_tokens] for row in rows]
        inputs = {
            "input_ids": torch.tensor(tokens, device=self.device),
            "attention_mask": mask_BT.long(),
            "position_ids": position_ids_BN,
        }
        if rows[0].request.images and not width:  # a prompt is run alone
            inputs |= self._image_inputs(rows[0], inputs)
        with self._rotary.lengths(self._lengths(rows[0], num_tokens)):
            output = self._model(**inputs, past_key_values=group.cache, use_cache=True, **self._kwargs)
        group.cache = output.past_key_values
        for row in rows:
            row.num_computed += num_tokens
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV

    def _image_inputs(self, row: SequenceRow, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The images of a prompt, and where they change them the kinds of its tokens and its positions."""
        images = {
            name: torch.as_tensor(array, device=self.device)
            for name, array in row.request.images.items()
            if name in self._parameters
        }
        for name, tensor in images.items():
            if tensor.is_floating_point():
                images[name] = tensor.to(self._model.dtype)
        if "mm_token_type_ids" in self._parameters:
            images.setdefault("mm_token_type_ids", (inputs["input_ids"] == self._model.config.image_token_id).int())
        if rope_index := getattr(self._model.base_model, "get_rope_index", None):
            named = signature(rope_index).parameters
            own = {name: tensor for name, tensor in {**inputs, **images}.items() if name in named}
            images["position_ids"], delta_11 = rope_index(**own)
            row.position_delta = int(delta_11)
        return images

    def _lengths(self, row: SequenceRow, num_tokens: int) -> IntArray:
        """[N] lengths of a sequence when each of its tokens was run: those of a prompt are run with all of it."""
        prompt = len(row.request.prompt_ids) if self.recompute_after is None else row.num_prefill
        end = row.num_computed + num_tokens
        return np.maximum(np.arange(row.num_computed + 1, end + 1), prompt)
