"""Quality of a model's outputs against the dense model's: logits, routing, greedy continuations.

Axes: B windows, T tokens of a window, V vocabulary, W tokens of a continuation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import exp, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Estimate:
    """A mean over windows of text and its standard error, which is NaN for a single window."""

    mean: float
    error: float

    @classmethod
    def of(cls, per_window: Sequence[float]) -> "Estimate":
        values = np.array(per_window)
        error = float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else float("nan")
        return cls(float(values.mean()), error)

    def exp(self) -> "Estimate":
        """e to the mean, with the error propagated: a perplexity from nats per token."""
        return Estimate(exp(self.mean), exp(self.mean) * self.error)


@dataclass
class Quality:
    """Window by window, how far logits are from the dense model's."""

    nll: list[float] = field(default_factory=list)  # nats per token of the text itself
    kl: list[float] = field(default_factory=list)  # nats per token, dense || this
    agreement: list[float] = field(default_factory=list)  # share of tokens with the dense model's most likely next one

    def add(self, dense_BTV: Tensor, logits_BTV: Tensor, tokens_BT: Tensor) -> None:
        """Add a batch of windows; the logits at one position predict the token at the next."""
        self.nll += nll(logits_BTV, tokens_BT)
        for dense_TV, logits_TV in zip(dense_BTV, logits_BTV, strict=True):
            # In fp64: the figure can be a billionth. One window at a time bounds the memory.
            expected_TV, actual_TV = (logits[:-1].double().log_softmax(-1) for logits in (dense_TV, logits_TV))
            kl_T = (expected_TV.exp() * (expected_TV - actual_TV)).sum(-1)
            self.kl.append(kl_T.mean().item())
            self.agreement.append((expected_TV.argmax(-1) == actual_TV.argmax(-1)).double().mean().item())


def nll(logits_BTV: Tensor, tokens_BT: Tensor) -> list[float]:
    """Nats per token of each window."""
    losses: list[float] = [
        F.cross_entropy(logits_TV[:-1].float(), tokens_T[1:]).item()
        for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True)
    ]
    return losses


@contextmanager
def recording_topk_ids(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While open, [L] the topk_ids_TK with which each experts module was called in the last forward pass."""
    ids_L = [torch.empty(0, 0)] * len(layers)

    def record(i: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        ids_L[i] = arguments[1]

    hooks = [module.register_forward_pre_hook(partial(record, i)) for i, module in enumerate(layers)]
    try:
        yield ids_L
    finally:
        for hook in hooks:
            hook.remove()


def routing_shift(dense_ids_L: Sequence[Tensor], ids_L: Sequence[Tensor], num_windows: int) -> list[list[float]]:
    """[L][windows] share of the dense model's choices of an expert that are not made here.

    A layer's own experts cannot shift its choices, only those of later layers.
    """
    return [
        [
            (~(dense_TK[:, :, None] == here_TK[:, None, :]).any(-1)).double().mean().item()
            for dense_TK, here_TK in zip(
                dense_ids.tensor_split(num_windows), here_ids.tensor_split(num_windows), strict=True
            )
        ]
        for dense_ids, here_ids in zip(dense_ids_L, ids_L, strict=True)
    ]


def greedy_continuations(model: PreTrainedModel, prompts_BT: Tensor, num_tokens: int) -> Tensor:
    """[B, W] greedy continuations of prompts of equal length, W = `num_tokens`; an end-of-text token does not end them.

    Args:
        model: generates them.
        prompts_BT: [B, T] int64.
        num_tokens: W.
    """
    generating: Any = model
    written_BW: Tensor = generating.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return written_BW[:, -num_tokens:]
