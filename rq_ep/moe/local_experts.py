"""All ranks of a layer in one process: for evaluation, and to time the work of each rank on one machine."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.strategy import Planner
from rq_ep.formats import ExpertBuffers
from rq_ep.moe.borrowing import BorrowBuffers
from rq_ep.moe.expert_bank import ExpertBank
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.layer import EPExperts
from rq_ep.moe.telemetry import CallRecorder
from rq_ep.parallel import Exchange, ExchangeSettings, LocalWorld


class LocalExperts(nn.Module):
    """The experts of one layer on `num_ranks` ranks of this process. Each rank gets an equal run of the rows."""

    def __init__(
        self,
        family: ExpertFamily,
        placement: LayerPlacement,
        planner: Planner,
        num_ranks: int,
        *,
        device: torch.device | str = "cpu",
        exchange_settings: ExchangeSettings | None = None,
        telemetry: CallRecorder | None = None,
        borrow_buffers: Sequence[BorrowBuffers] | None = None,
        expert_buffers: ExpertBuffers | None = None,
    ) -> None:
        """Allocate all ranks' replicas; fill `banks` before the first call. Arguments as of `EPExperts`.

        Args:
            family: layout and activation of the experts.
            placement: where the layer's replicas are.
            planner: the strategy's decision for each step.
            num_ranks: R.
            device: where all ranks compute.
            exchange_settings: how rows travel; default: as suits the device.
            telemetry: records every rank's calls.
            borrow_buffers: of each rank, which layers may share.
            expert_buffers: for replicas that come and go, which layers may share; default: they lie together.
        """
        super().__init__()
        self.post_expert_norm = family.post_norm
        self.world = LocalWorld(num_ranks, device)
        self.ranks = tuple(
            EPExperts(
                family,
                placement,
                planner,
                group,
                exchange=Exchange(group, exchange_settings),
                telemetry=telemetry,
                borrow_buffers=None if borrow_buffers is None else borrow_buffers[group.rank],
                expert_buffers=expert_buffers,
            )
            for group in self.world.groups
        )

    @property
    def placement(self) -> LayerPlacement:
        """Where the layer's replicas are."""
        return self.ranks[0].placement

    @property
    def banks(self) -> tuple[ExpertBank, ...]:
        """Each rank's experts."""
        return tuple(rank.bank for rank in self.ranks)

    def replace_placement(self, placement: LayerPlacement, planner: Planner) -> None:
        """Serve another placement from the next call on, as `EPExperts`; if a rank lacks a replica, none changes."""
        for bank in self.banks:
            bank.check_commit(placement.replicas)
        for rank in self.ranks:
            rank.replace_placement(placement, planner)

    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """out_TD [T, D], as `EPExperts` on processes would compute it from the same runs of rows."""
        runs = [tensor.tensor_split(len(self.ranks)) for tensor in (hidden_TD, topk_ids_TK, topk_weights_TK)]
        parts = self.world.run(lambda group: self.ranks[group.rank](*(run[group.rank] for run in runs)))
        return torch.cat(parts)
