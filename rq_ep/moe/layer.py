"""The expert-parallel MoE layer: what stands in a model where its experts were."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.strategy import Planner
from rq_ep.formats import get_format
from rq_ep.moe.expert_bank import ExpertBank, SpareRoom
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.telemetry import Telemetry
from rq_ep.parallel import EPGroup, Exchange, Homes, RankFailure


class EPExperts(nn.Module):
    """This rank's part of a layer's experts. Every rank of the group calls it for every step, with zero rows too.

    A small step takes three collectives - counts, rows, sums - and a larger one four, as pairs' notes go ahead of the
    rows. The host waits for a GPU once, for the counts; once more in a step so uneven that rows come in parts, for the
    pairs in each. Checksums of borrowed experts have been computed when the next layer has its counts; the last layer
    of a step waits for its own. To wait for none, the planner would have to run on the GPU and tell the kernels their
    sizes there; every message already has the size of a bound that the plan gives.
    """

    def __init__(
        self,
        family: ExpertFamily,
        layer: LayerPlacement,
        planner: Planner,
        group: EPGroup,
        *,
        telemetry: Telemetry | None = None,
        spare: SpareRoom | None = None,
        max_dispatch_bytes: int | None = None,
        verifies_later: bool = False,
    ) -> None:
        """Reserve room for this rank's replicas; fill `bank` before the first call.

        Args:
            family: layout and activation of the experts.
            layer: where the layer's replicas are.
            planner: the strategy's decision for each step, the same on every rank.
            group: the ranks that share the experts.
            telemetry: told about every call; default: nobody is.
            spare: room for borrowed experts, which layers may share; default: a room of this layer's own.
            max_dispatch_bytes: rows of other ranks that a rank holds at once, the same on every rank; more come in
                parts. Default: a tenth more than in a balanced step of as many tokens.
            verifies_later: what this layer borrows is known to be intact only when the next layer that shares `spare`
                has been entered; every step must end with a layer that does not do so.
        """
        super().__init__()
        self.family = family
        self.layer = layer
        self.planner = planner
        self.group = group
        self.homes = Homes.of(layer.replicas, layer.num_experts, group.size, group.device)
        self.exchange = Exchange(group, max_dispatch_bytes=max_dispatch_bytes)
        self.bank = ExpertBank(family.layout, layer.replicas, group.rank, group.device, spare, layer.index)
        self.verifies_later = verifies_later
        self.telemetry = Telemetry(max_records=0) if telemetry is None else telemetry

    @torch.no_grad()
    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """out_TD [T, D]: for each row the weighted sum of its experts' outputs, in the row's dtype.

        Args:
            hidden_TD: [T, D] rows of this rank.
            topk_ids_TK: [T, K] integers, the experts the router chose.
            topk_weights_TK: [T, K] routing weights.

        Raises:
            RankFailure: this rank or another cannot go on; the message names rank and layer.
        """
        try:
            return self._forward(hidden_TD, topk_ids_TK, topk_weights_TK)
        except UserError:
            raise
        except Exception as error:
            raise RankFailure(f"MoE layer {self.layer.index} on rank {self.group.rank}: {error}") from error

    def _forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        laps = self.telemetry.laps(self.group)
        census = self.homes.census(topk_ids_TK, self.group)
        self.bank.spare.settle()  # no other rank gets beyond its counts before this one joins the next collective
        laps.mark("gather")
        plan = self.planner(census.counts_RE)
        laps.mark("plan")
        self.bank.borrow(plan.transfers, self.group)
        trip = self.exchange.dispatch(hidden_TD, topk_ids_TK, topk_weights_TK, plan, census)
        for received in trip:
            laps.mark("dispatch")
            partial_MD = self.bank.compute(received, self.family)
            if not self.verifies_later:
                self.bank.spare.settle()
            laps.mark("compute")
            trip.send_back(partial_MD)
            laps.mark("combine")
        out_TD = trip.combine()
        laps.mark("combine")
        laps.received_bytes = trip.received_bytes
        of_transfers = partial(transfer_bytes, plan, self.family)
        self.telemetry.record(self.layer.index, self.group.rank, census.counts_RE, plan, laps, of_transfers)
        return out_TD

    def extra_repr(self) -> str:
        held = len(self.bank.experts)
        return f"{held} of {self.layer.num_experts} experts, rank {self.group.rank} of {self.group.size}"


def transfer_bytes(plan: DispatchPlan, family: ExpertFamily) -> IntArray:
    """[R] bytes of borrowed experts that each rank receives."""
    bytes_R = np.zeros(len(plan.pairs_RP), np.int64)
    for transfer in plan.transfers:
        bytes_R[transfer.dst] += get_format(transfer.format).nbytes(family.layout)
    return bytes_R
