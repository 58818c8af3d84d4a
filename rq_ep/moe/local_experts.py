"""All ranks of a layer in one process: for evaluation, and to time each rank's share of work on one machine."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.strategy import Planner
from rq_ep.moe.expert_bank import ExpertBank, SpareRoom
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.layer import EPExperts
from rq_ep.moe.telemetry import Telemetry
from rq_ep.parallel import LocalWorld


class LocalExperts(nn.Module):
    """The experts of one layer on `num_ranks` ranks of this process. Rows are dealt to the ranks in equal runs."""

    def __init__(
        self,
        family: ExpertFamily,
        layer: LayerPlacement,
        planner: Planner,
        num_ranks: int,
        *,
        device: torch.device | str = "cpu",
        telemetry: Telemetry | None = None,
        spares: Sequence[SpareRoom] | None = None,
        max_dispatch_bytes: int | None = None,
        verifies_later: bool = False,
    ) -> None:
        """Reserve room for all ranks' replicas; fill `banks` before the first call. Arguments as of `EPExperts`.

        Args:
            spares: for each rank the room for borrowed experts, which layers may share.
        """
        super().__init__()
        self.world = LocalWorld(num_ranks, device)
        self.ranks = tuple(
            EPExperts(
                family,
                layer,
                planner,
                group,
                telemetry=telemetry,
                spare=None if spares is None else spares[group.rank],
                max_dispatch_bytes=max_dispatch_bytes,
                verifies_later=verifies_later,
            )
            for group in self.world.groups
        )

    @property
    def banks(self) -> tuple[ExpertBank, ...]:
        """Each rank's experts."""
        return tuple(rank.bank for rank in self.ranks)

    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """out_TD [T, D], as `EPExperts` on processes would compute it from the same runs of rows."""
        runs = [tensor.tensor_split(len(self.ranks)) for tensor in (hidden_TD, topk_ids_TK, topk_weights_TK)]
        parts = self.world.run(lambda group: self.ranks[group.rank](*(run[group.rank] for run in runs)))
        return torch.cat(parts)
