"""What a model's answers lose with one expert: dropped, or in another format. A pass over the text for each expert."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rq_ep.core.arrays import FloatArray
from rq_ep.formats import ExpertLayout, WeightFormat
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.text.teacher_forcing import taught
from rq_ep.model.text.windows import Batch

DROPPED = "KL divergence of the next token, in nats, when the expert's output is left out"


class Divergence:
    """The model's own next-token distributions on some text, and how far it strays from them when it is changed."""

    def __init__(self, network: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Run the text once; the log-probabilities are kept, in doubles.

        Args:
            network: the model, unchanged.
            batches: a little text: every expert that is asked about costs a pass over it.
        """
        self._network = network
        self._arguments = [
            taught(network.config, batch.tokens_BT.to(network.device), reads_last=False)[0] for batch in batches
        ]
        self._expected = [self._logprobs(arguments) for arguments in self._arguments]

    @torch.no_grad()
    def _logprobs(self, arguments: dict[str, Tensor]) -> Tensor:
        logits_BTV: Tensor = self._network(**arguments, use_cache=False).logits
        return logits_BTV.double().log_softmax(-1)  # one expert in 8 bits changes the eighth digit

    def now(self) -> float:
        """KL(unchanged || as the model is now), nats per token; rounding below zero is cut off."""
        total, num_tokens = 0.0, 0
        for arguments, expected_BTV in zip(self._arguments, self._expected, strict=True):
            found_BTV = self._logprobs(arguments)
            total += float((expected_BTV.exp() * (expected_BTV - found_BTV)).sum())
            num_tokens += expected_BTV[..., 0].numel()
        return max(total / num_tokens, 0.0)


def dropped_LE(
    divergence: Divergence, experts: Sequence[ExpertsModule], on_expert: Callable[[], None] = lambda: None
) -> FloatArray:
    """[L, E] divergence when an expert's output is left out, all others as they are.

    Args:
        divergence: of the unchanged model.
        experts: its MoE layers.
        on_expert: called after each expert.
    """
    result_LE = np.zeros((len(experts), experts[0].num_experts))
    for at, found in enumerate(experts):
        for expert in range(found.num_experts):
            with _without(found.module, expert):
                result_LE[at, expert] = divergence.now()
            on_expert()
    return result_LE


@torch.no_grad()
def quantized_LEQ(
    divergence: Divergence,
    experts: Sequence[ExpertsModule],
    layout: ExpertLayout,
    formats: Sequence[WeightFormat],
    on_expert: Callable[[], None] = lambda: None,
) -> FloatArray:
    """[L, E, Q] divergence when one expert is stored in a format, all others as they are.

    Args:
        divergence: of the unchanged model.
        experts: its MoE layers.
        layout: of one expert.
        formats: the Q formats.
        on_expert: called after each expert and format.
    """
    result_LEQ = np.zeros((len(experts), experts[0].num_experts, len(formats)))
    for at, found in enumerate(experts):
        for expert in range(found.num_experts):
            weights = found.weights(expert)
            kept = {name: weight.clone() for name, weight in weights.items()}
            for q, format_ in enumerate(formats):
                views = format_.views(format_.pack(kept, layout), layout)
                for name, weight in weights.items():
                    weight.copy_(format_.dequantize(views, name, layout, weight.dtype))
                result_LEQ[at, expert, q] = divergence.now()
                on_expert()
            for name, weight in weights.items():
                weight.copy_(kept[name])
    return result_LEQ


@contextmanager
def _without(module: nn.Module, expert: int) -> Iterator[None]:
    """While open, an experts module gives nothing for one of its experts."""

    def silence(module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TD, topk_ids_TK, topk_weights_TK = arguments
        return hidden_TD, topk_ids_TK, topk_weights_TK.masked_fill(topk_ids_TK == expert, 0)

    hook = module.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()
