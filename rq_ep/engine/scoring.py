"""Log-probabilities of given tokens, and the forward passes that score a prompt."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from rq_ep.engine.nonfinite import is_finite
from rq_ep.engine.requests import LOWEST_LOGPROB, Request, Score
from rq_ep.engine.rotary import SequenceRotary


def score_tokens(logits_NV: torch.Tensor, tokens_N: torch.Tensor, num_top: int) -> list[Score]:
    """Log-probabilities of tokens, and of the likeliest ones at their places.

    Args:
        logits_NV: [N, V] logits of any floating dtype.
        tokens_N: [N] int64 token ids.
        num_top: how many of the likeliest tokens to name; at most V of them are.
    """
    logprobs_NV = logits_NV.float().log_softmax(dim=-1).clamp(min=LOWEST_LOGPROB)
    top = logprobs_NV.topk(min(num_top, logprobs_NV.shape[1]), dim=-1)
    chosen_N = logprobs_NV.gather(1, tokens_N[:, None]).squeeze(1)
    rows = zip(chosen_N.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [Score(*row) for row in rows]


@dataclass
class _Job:
    request: Request
    cache: Cache | None
    num_done: int = 0  # tokens that have been run
    num_scored: int = 0  # and those whose scores were delivered: more, where a prompt has started again


class PromptScorer:
    """Scores prompts one after another, a chunk of one prompt a step.

    A chunk is a forward pass of its own, outside the batches, and a step of the group like any other. A prompt's keys
    and values are held beside the paged cache until it is scored.

    Args:
        model: a causal language model.
        rotary: its rotary embeddings.
        attn_implementation: attention for a plain forward pass; continuous batching may have set one of its own.
        new_cache: makes an empty cache; None: the model makes one in its first forward pass.
        chunk_size: tokens of one step, which bounds the logits held at once; None: a prompt is run as a whole.
        on_scored: called after each chunk of a prompt, with the scores of the tokens that follow the chunk's, and
            whether they are the last ones. The scores of a long prompt are many, and nothing keeps them here.
        on_broken: called with a prompt for which the model's logits are not finite, instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotary: SequenceRotary,
        attn_implementation: str,
        new_cache: Callable[[], Cache | None],
        chunk_size: int | None,
        on_scored: Callable[[Request, list[Score], bool], None],
        on_broken: Callable[[Request], None],
    ) -> None:
        self._model = model
        self._rotary = rotary
        self._attn_implementation = attn_implementation
        self._new_cache = new_cache
        self._chunk_size = chunk_size
        self._on_scored = on_scored
        self._on_broken = on_broken
        self._arrived: deque[Request] = deque()
        self._job: _Job | None = None
        self.under_way: list[tuple[str, int]] = []  # the request of this step, and how many of its tokens

    def add(self, request: Request) -> None:
        """Queue a prompt; any thread may."""
        self._arrived.append(request)

    def has_work(self) -> bool:
        return self._job is not None or bool(self._arrived)

    def restart(self) -> None:
        """Start the prompt under way again, as a step of it was cut off; no score is delivered twice."""
        if self._job is not None:
            self._job = _Job(self._job.request, self._new_cache(), num_scored=self._job.num_scored)

    @torch.no_grad()
    def step(self, is_wanted: Callable[[str], bool]) -> bool:
        """Score the next chunk, if there is one that is still wanted; whether the model was run.

        Args:
            is_wanted: whether anybody still waits for the request of this id.
        """
        self.under_way = []
        if self._job is not None and not is_wanted(self._job.request.id):
            self._job = None
        while self._job is None:
            if not self._arrived:
                return False
            request = self._arrived.popleft()
            if is_wanted(request.id):
                self._job = _Job(request, self._new_cache())
        self._advance(self._job)
        return True

    def _advance(self, job: _Job) -> None:
        prompt_ids, start = job.request.prompt_ids, job.num_done
        chunk = prompt_ids[start:][: self._chunk_size]
        job.num_done += len(chunk)
        self.under_way = [(job.request.id, len(chunk))]
        with self._rotary.lengths(np.full(len(chunk), len(prompt_ids))):
            logits_TV = self._logits(chunk, job)
        if not bool(is_finite(logits_TV).all()):
            self._job = None
            self._on_broken(job.request)
            return
        following = prompt_ids[start + 1 : start + 1 + len(chunk)]
        targets_N = torch.tensor(following, dtype=torch.int64, device=logits_TV.device)
        scores = score_tokens(logits_TV[: len(following)], targets_N, job.request.num_logprobs or 0)
        is_last = job.num_done >= len(prompt_ids) - 1  # nothing follows the last token
        if is_last:
            self._job = None
        if job.num_done > job.num_scored:
            job.num_scored = job.num_done
            self._on_scored(job.request, scores, is_last)

    def _logits(self, token_ids: Sequence[int], job: _Job) -> torch.Tensor:
        batching_attention = self._model.config._attn_implementation
        input_ids = torch.tensor([token_ids], device=self._model.device)
        try:
            if batching_attention != self._attn_implementation:
                self._model.set_attn_implementation(self._attn_implementation)
            output = self._model(input_ids=input_ids, past_key_values=job.cache, use_cache=True)
        finally:
            if batching_attention != self._attn_implementation:
                self._model.set_attn_implementation(batching_attention)
        job.cache = output.past_key_values
        logits_1TV: torch.Tensor = output.logits
        return logits_1TV[0]
