"""Adapter of Switch Transformers (arXiv 2101.03961): its MoE layers, rebuilt in the form of `expert_modules`.

In transformers each expert is a module, which gets all tokens and a one-hot mask. A token beyond the capacity of its
expert, counted in each sequence, has an empty mask and skips the layer. Here the experts are stacked, and called only
with the tokens that they compute.

Axes: B sequences, S tokens of a sequence, N tokens that an expert, or the layer, computes.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP


class SwitchExperts(nn.Module):
    """The experts of a layer, stacked, with the attributes that `use_experts_implementation` gives to others."""

    has_gate = False
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True

    def __init__(self, experts: nn.ModuleDict, layer_index: int) -> None:
        super().__init__()
        modules: list[Any] = list(experts.values())
        self.layer_index = layer_index
        self.up_proj = nn.Parameter(torch.stack([module.wi.weight.detach() for module in modules]))  # [E, F, D]
        self.down_proj = nn.Parameter(torch.stack([module.wo.weight.detach() for module in modules]))  # [E, D, F]
        self.act_fn = modules[0].act

    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """out_TD [T, D]: for each row the weighted sum of its experts' outputs."""
        out_TD = torch.zeros_like(hidden_TD)
        for expert in topk_ids_TK.unique().tolist():
            rows_N, choice_N = torch.where(topk_ids_TK == expert)
            up_NF = self.act_fn(F.linear(hidden_TD[rows_N], self.up_proj[expert]))
            out_ND = F.linear(up_NF, self.down_proj[expert]) * topk_weights_TK[rows_N, choice_N, None]
            out_TD.index_add_(0, rows_N, out_ND.to(out_TD.dtype))
        return out_TD


class SwitchLayer(nn.Module):
    """A router and its experts, which `rq_ep.load` replaces by an expert-parallel layer with the same call."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """The experts' outputs; zero for tokens beyond their expert's capacity."""
        mask_BSE, weights_BSK, _ = self.router(hidden_BSD)  # capacity counts in each sequence: not flattened before
        hidden_TD, mask_TE, weights_TK = (tensor.flatten(0, 1) for tensor in (hidden_BSD, mask_BSE, weights_BSK))
        kept_N = mask_TE.any(dim=1).nonzero().squeeze(1)
        topk_ids_NK = mask_TE[kept_N].argmax(dim=1, keepdim=True)
        out_TD = torch.zeros_like(hidden_TD)
        out_TD[kept_N] = self.experts(hidden_TD[kept_N], topk_ids_NK, weights_TK[kept_N])
        return out_TD.view_as(hidden_BSD)


def adapt(model: PreTrainedModel) -> None:
    """Rebuild the MoE layers of a model in place, with their weights; its outputs do not change.

    The decoder's layers are numbered after the encoder's.
    """
    for number, feed_forward in enumerate(_feed_forwards(model)):
        if isinstance(feed_forward.mlp, SwitchTransformersSparseMLP):
            feed_forward.mlp = SwitchLayer(feed_forward.mlp.router, SwitchExperts(feed_forward.mlp.experts, number))


def _feed_forwards(model: Any) -> Iterator[Any]:
    return (block.layer[-1] for block in chain(model.encoder.block, model.decoder.block))


def converters() -> list[WeightConverter]:
    """Conversions of a checkpoint's tensors, one for each expert, to those of `SwitchExperts`."""
    return [
        WeightConverter(f"mlp.experts.expert_*.{stored}.weight", f"mlp.experts.{name}", [MergeModulelist(dim=0)])
        for stored, name in (("wi", "up_proj"), ("wo", "down_proj"))
    ]
