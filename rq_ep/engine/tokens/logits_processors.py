"""What a request's settings do to the logits of its next token, before temperature: bans, biases and penalties.

The order is vLLM's: tokens that must not come yet, biases, penalties. A row is a function of its request alone: of its
settings, its prompt and its answer so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rq_ep.engine.requests import Sampling


@dataclass(frozen=True)
class TokenHistory:
    """What a row has so far: the tokens of its prompt, those of its answer, and the ones that would end it."""

    prompt_ids: Sequence[int] = ()
    answer_ids: Sequence[int] = ()
    end_token_ids: frozenset[int] = frozenset()


def processed_logits(
    logits_NV: torch.Tensor, samplings: Sequence[Sampling], histories: Sequence[TokenHistory]
) -> torch.Tensor:
    """The logits from which each row's token is to be chosen: the same tensor where no row asks for anything.

    Args:
        logits_NV: [N, V] float32, which is left as it is.
        samplings: N, the settings of the rows.
        histories: N, their tokens so far.

    Returns:
        [N, V] float32.
    """
    rows = [row for row, sampling in enumerate(samplings) if sampling.processes_logits]
    if not rows:
        return logits_NV
    result_NV = logits_NV.clone()
    for row in rows:
        _process(result_NV[row], samplings[row], histories[row])
    return result_NV


def _process(logits_V: torch.Tensor, sampling: Sampling, history: TokenHistory) -> None:
    def indices(token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=logits_V.device)

    if len(history.answer_ids) < sampling.min_tokens and history.end_token_ids:
        logits_V[indices(sorted(history.end_token_ids))] = float("-inf")
    if sampling.logit_bias:
        token_ids, biases = zip(*sampling.logit_bias, strict=True)
        logits_V[indices(token_ids)] += torch.tensor(biases, dtype=logits_V.dtype, device=logits_V.device)
    if sampling.repetition_penalty != 1:
        seen = indices(sorted({*history.prompt_ids, *history.answer_ids}))
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.frequency_penalty or sampling.presence_penalty) and history.answer_ids:
        said, counts = indices(history.answer_ids).unique(return_counts=True)
        logits_V[said] -= sampling.frequency_penalty * counts + sampling.presence_penalty
