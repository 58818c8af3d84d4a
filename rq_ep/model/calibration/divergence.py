"""KL divergence of a model's next-token distribution when one expert is dropped, or stored in another format.

Each expert and format takes a pass over the text. Axes: B sequences, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rq_ep.core.arrays import FloatArray
from rq_ep.formats import ExpertLayout, WeightFormat
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.text.teacher_forcing import teacher_forcing_inputs
from rq_ep.model.text.windows import WindowBatch


class KLDivergence:
    """The next-token distributions of a model on some text, and how far it diverges from them once it is changed."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[WindowBatch]) -> None:
        """Run the text once; the log-probabilities are kept in fp64.

        Args:
            model: unchanged as yet.
            batches: a little text: every measurement takes a pass over it.
        """
        self._model = model
        self._arguments = [
            teacher_forcing_inputs(model.config, batch.tokens_BT.to(model.device), include_last=False)[0]
            for batch in batches
        ]
        self._expected = [self._logprobs_BTV(arguments) for arguments in self._arguments]

    @torch.no_grad()
    def _logprobs_BTV(self, arguments: dict[str, Tensor]) -> Tensor:
        logits_BTV: Tensor = self._model(**arguments, use_cache=False).logits
        return logits_BTV.double().log_softmax(-1)  # one expert in 8 bits changes the eighth digit

    def measure(self) -> float:
        """KL(unchanged || as the model is now), nats per token; a negative rounding error becomes 0."""
        total, num_tokens = 0.0, 0
        for arguments, expected_BTV in zip(self._arguments, self._expected, strict=True):
            changed_BTV = self._logprobs_BTV(arguments)
            total += float((expected_BTV.exp() * (expected_BTV - changed_BTV)).sum())
            num_tokens += expected_BTV[..., 0].numel()
        return max(total / num_tokens, 0.0)


def kl_when_dropped_LE(
    divergence: KLDivergence, layers: Sequence[ExpertsModule], on_expert: Callable[[], None] = lambda: None
) -> FloatArray:
    """[L, E] divergence when the output of one expert is left out.

    Args:
        divergence: from the unchanged model.
        layers: the routed experts of its MoE layers.
        on_expert: called after each expert.
    """
    kl_LE = np.zeros((len(layers), layers[0].num_experts))
    for i, experts in enumerate(layers):
        for expert in range(experts.num_experts):
            with _expert_dropped(experts.module, expert):
                kl_LE[i, expert] = divergence.measure()
            on_expert()
    return kl_LE


@torch.no_grad()
def kl_when_quantized_LEQ(
    divergence: KLDivergence,
    layers: Sequence[ExpertsModule],
    layout: ExpertLayout,
    formats: Sequence[WeightFormat],
    on_expert: Callable[[], None] = lambda: None,
) -> FloatArray:
    """[L, E, Q] divergence when one expert is stored in a format, all others being unchanged.

    Args:
        divergence: from the unchanged model.
        layers: the routed experts of its MoE layers.
        layout: of one expert.
        formats: the Q formats.
        on_expert: called after each expert and format.
    """
    kl_LEQ = np.zeros((len(layers), layers[0].num_experts, len(formats)))
    for i, experts in enumerate(layers):
        for expert in range(experts.num_experts):
            weights = experts.weights(expert)
            original = {name: weight.clone() for name, weight in weights.items()}
            for q, format_ in enumerate(formats):
                views = format_.views(format_.pack(original, layout), layout)
                for name, weight in weights.items():
                    weight.copy_(format_.dequantize(views, name, layout, weight.dtype))
                kl_LEQ[i, expert, q] = divergence.measure()
                on_expert()
            for name, weight in weights.items():
                weight.copy_(original[name])
    return kl_LEQ


@contextmanager
def _expert_dropped(module: nn.Module, expert: int) -> Iterator[None]:
    """While open, an experts module gives zero for one of its experts."""

    def mask_weights(module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TD, topk_ids_TK, topk_weights_TK = arguments
        return hidden_TD, topk_ids_TK, topk_weights_TK.masked_fill(topk_ids_TK == expert, 0)

    hook = module.register_forward_pre_hook(mask_weights)
    try:
        yield
    finally:
        hook.remove()
