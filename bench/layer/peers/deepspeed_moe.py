"""DeepSpeed's `MoE`, dropless: every expert is padded to the rows of the hottest one on any rank.

It is "capacity-padded EP", not the standard EP that balancing is compared with: under skew it moves and computes many
times the real rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bench.layer.case import Case
from bench.layer.peers.deepspeed_start import start_deepspeed
from rq_ep.core.errors import UserError
from rq_ep.parallel import EPGroup

NEVER = -1e4  # a logit whose softmax is 0


class Expert(nn.Module):
    """One gated expert."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        for name, shape in case.family.layout.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=case.dtype, device=device)))
        self.apply_gate = case.family.apply_gate

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.apply_gate(x_ND @ self.gate_up_proj.T) @ self.down_proj.T


class GivenRoutes(nn.Module):
    """Hands DeepSpeed's gate the router's own logits instead of the rows; its matrix is the identity then."""

    def __init__(self, gate: Any, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.gate = gate
        gate.wg.weight = nn.Parameter(torch.eye(num_experts, device=device))
        self.logits_TE = torch.empty(0)

    def forward(self, hidden_TD: Tensor, *how: Any) -> Any:
        return self.gate(self.logits_TE, *how)


class DeepSpeedLayer(nn.Module):
    """The layer under a router of our own."""

    def __init__(self, moe: Any, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.moe: Any = moe
        self.num_experts = num_experts
        self.routes = moe.deepspeed_moe.gate = GivenRoutes(moe.deepspeed_moe.gate, num_experts, device)

    @property
    def resident_bytes(self) -> int:
        """Of the experts on this rank."""
        return sum(parameter.nbytes for parameter in self.moe.deepspeed_moe.experts.parameters())

    @torch.no_grad()
    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        logits_TE = torch.full((len(hidden_TD), self.num_experts), NEVER, device=hidden_TD.device)
        self.routes.logits_TE = logits_TE.scatter_(1, topk_ids_TK, topk_weights_TK.float().log())
        out_TD: Tensor = self.moe(hidden_TD)[0]
        return out_TD


def deepspeed_moe(case: Case, group: EPGroup) -> nn.Module:
    """Build it on the processes of `group`, with the experts of the case in contiguous blocks.

    Raises:
        UserError: DeepSpeed is not installed, or cannot run this case.
    """
    if case.workload.repeats_experts:
        raise UserError(
            "--peers deepspeed: its gate names an expert once in a token; use a scenario that does, such as balanced"
        )
    deepspeed = start_deepspeed("deepspeed", case, group)
    experts, top_k = case.shape.num_experts, case.shape.top_k
    moe = deepspeed.moe.layer.MoE(
        case.shape.hidden_size,
        Expert(case, group.device),
        experts,
        ep_size=group.size,
        k=top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    moe.set_deepspeed_parallelism()
    local = moe.deepspeed_moe.experts.deepspeed_experts
    for at, expert in enumerate(local):
        weights = case.expert(group.rank * len(local) + at, group.device)
        for name, parameter in expert.named_parameters():
            parameter.data.copy_(weights[name])
    return DeepSpeedLayer(moe.eval(), experts, group.device)
