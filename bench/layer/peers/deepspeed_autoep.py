"""DeepSpeed's AutoEP layer: standard EP with an all-to-all of every pair's row, in contiguous blocks.

Its public entries fail with transformers 5.23 (they call `get` of transformers' recorder registry with a default, which
it does not take), after the layer is built. So the layer is built as they do, without that last step.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bench.layer.case import Case
from bench.layer.peers.deepspeed_start import start_deepspeed
from rq_ep.core.errors import UserError
from rq_ep.parallel import EPGroup


class GivenRoutes(nn.Module):
    """Stands for its router and says what ours chose."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.ids_TK = self.weights_TK = torch.empty(0)

    def forward(self, hidden_TD: Tensor, expert_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        counts_E = torch.bincount(self.ids_TK.flatten(), minlength=self.num_experts).int()
        return self.weights_TK, self.ids_TK, counts_E


class AutoEPLayer(nn.Module):
    """Its layer under a router of our own."""

    def __init__(self, layer: Any, num_experts: int) -> None:
        super().__init__()
        self.layer: Any = layer
        self.routes = layer.router = GivenRoutes(num_experts)

    @property
    def resident_bytes(self) -> int:
        """Of the experts on this rank."""
        return sum(parameter.nbytes for parameter in self.layer.experts.parameters())

    @torch.no_grad()
    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        self.routes.ids_TK, self.routes.weights_TK = topk_ids_TK, topk_weights_TK
        out_TD: Tensor = self.layer(hidden_TD[None])[0]
        return out_TD


def deepspeed_autoep(case: Case, group: EPGroup) -> nn.Module:
    """Build it on the processes of `group`, out of a Mixtral block with the experts of the case.

    Raises:
        UserError: DeepSpeed is not installed, cannot run this case, or has no such layer.
    """
    start_deepspeed("autoep", case, group)
    try:
        from deepspeed.module_inject.auto_ep import AutoEP
        from deepspeed.module_inject.auto_ep_config import AutoEPConfig

        build = AutoEP._replace_moe_layer_without_retarget
    except (ImportError, AttributeError) as error:
        raise UserError(f"--peers autoep: this DeepSpeed has no layer that we know how to build ({error})") from None
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=8,
        hidden_size=case.shape.hidden_size,
        intermediate_size=case.shape.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=case.shape.num_experts,
        num_experts_per_tok=case.shape.top_k,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    block = model.model.layers[0].mlp.to_empty(device=group.device).to(case.dtype)
    for number in range(case.shape.num_experts):
        for name, weight in case.expert(number, group.device).items():
            getattr(block.experts, name).data[number] = weight
    replacer = AutoEP(model, AutoEPConfig(enabled=True, autoep_size=group.size, preset_model="mixtral"))
    layer, _ = build(replacer, replacer.ep_parser()[0], group.size, group.rank)
    layer.set_deepspeed_parallelism()
    return AutoEPLayer(layer.eval(), case.shape.num_experts)
