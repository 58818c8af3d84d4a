"""How far a model's answers are from those of the dense model: logits, routers' choices, greedy continuations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import exp, sqrt

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
        """e to the mean, the error carried along: a perplexity from nats per token."""
        return Estimate(exp(self.mean), exp(self.mean) * self.error)


@dataclass
class Quality:
    """Window by window, how far logits are from the dense model's."""

    nll: list[float] = field(default_factory=list)  # nats per token of the text itself
    kl: list[float] = field(default_factory=list)  # nats per token, dense || this
    agreement: list[float] = field(default_factory=list)  # share of tokens with the dense model's most likely next one

    def add(self, dense_BTV: Tensor, logits_BTV: Tensor, tokens_BT: Tensor) -> None:
        """Take in a batch of windows; the logits at one position are about the token at the next."""
        self.nll += nll(logits_BTV, tokens_BT)
        for dense_TV, logits_TV in zip(dense_BTV, logits_BTV, strict=True):
            # In doubles: the figure can be a billionth, and one window at a time bounds the memory.
            expected_TV, found_TV = (logits[:-1].double().log_softmax(-1) for logits in (dense_TV, logits_TV))
            kl_T = (expected_TV.exp() * (expected_TV - found_TV)).sum(-1)
            self.kl.append(kl_T.mean().item())
            self.agreement.append((expected_TV.argmax(-1) == found_TV.argmax(-1)).double().mean().item())


def nll(logits_BTV: Tensor, tokens_BT: Tensor) -> list[float]:
    """Nats per token of each window."""
    losses: list[float] = [
        F.cross_entropy(logits_TV[:-1].float(), tokens_T[1:]).item()
        for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True)
    ]
    return losses


Choices = list[Tensor]  # [L] topk_ids_TK of each layer's last call


@contextmanager
def watching_choices(experts: Sequence[nn.Module]) -> Iterator[Choices]:
    """While open, what the routers chose in the last forward pass: the ids that each experts module was called with."""
    choices: Choices = [torch.empty(0, 0)] * len(experts)

    def keep(at: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        choices[at] = arguments[1]

    hooks = [module.register_forward_pre_hook(partial(keep, at)) for at, module in enumerate(experts)]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


def routing_shift(dense: Choices, found: Choices, num_windows: int) -> list[list[float]]:
    """[L][windows] share of the dense model's choices of an expert that are not made here.

    A layer's own experts cannot shift its choices, only those of later layers.
    """
    return [
        [(~(ids_TK[:, :, None] == other_TK[:, None, :]).any(-1)).double().mean().item() for ids_TK, other_TK in windows]
        for ids_NK, other_NK in zip(dense, found, strict=True)
        for windows in [zip(ids_NK.tensor_split(num_windows), other_NK.tensor_split(num_windows), strict=True)]
    ]


def continuations(model: PreTrainedModel, prompts_BT: Tensor, num_tokens: int) -> Tensor:
    """[B, num_tokens] greedy continuations of prompts of equal length; the end of a text does not end them."""
    written_BW = model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    assert isinstance(written_BW, Tensor)
    return written_BW[:, -num_tokens:]
