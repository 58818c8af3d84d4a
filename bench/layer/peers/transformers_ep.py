"""Transformers' own expert parallelism: its all-to-all around its grouped experts, in contiguous blocks.

It sends a row once for every pair, and computes with the experts class of its Mixtral.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from bench.layer.case import Case
from rq_ep.core.errors import UserError
from rq_ep.parallel import EPGroup


class TransformersLayer(nn.Module):
    """Its layer under a router of our own."""

    def __init__(self, case: Case, group: EPGroup) -> None:
        from transformers import AutoConfig
        from transformers.distributed.expert_parallel import AllToAllEP
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        num_local = case.shape.num_experts // group.size
        config: Any = AutoConfig.for_model(
            "mixtral",
            hidden_size=case.shape.hidden_size,
            intermediate_size=case.shape.intermediate_size,
            num_local_experts=num_local,
            experts_implementation="grouped_mm",
        )
        self.experts = MixtralExperts(config).to(group.device, case.dtype)
        for at in range(num_local):
            for name, weight in case.expert(group.rank * num_local + at, group.device).items():
                getattr(self.experts, name).data[at] = weight
        mesh = init_device_mesh(group.device.type, (group.size, 1), mesh_dim_names=("ep", "tp"))
        self.exchange = AllToAllEP(self.experts, mesh["ep"], mesh["tp"])

    @property
    def resident_bytes(self) -> int:
        """Of the experts on this rank."""
        return sum(parameter.nbytes for parameter in self.experts.parameters())

    @torch.no_grad()
    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        out_TD: Tensor = self.exchange(hidden_TD, topk_ids_TK, topk_weights_TK)
        return out_TD.to(hidden_TD.dtype)


def transformers_ep(case: Case, group: EPGroup) -> nn.Module:
    """Build it on the processes of `group`.

    Raises:
        UserError: it cannot run this case.
    """
    if group.backend == "local":
        raise UserError("--peers transformers: needs processes; start it with torchrun, without --local-ranks")
    if case.shape.num_experts % group.size:
        raise UserError(f"--peers transformers: {case.shape.num_experts} experts do not divide by {group.size} ranks")
    return TransformersLayer(case, group)
