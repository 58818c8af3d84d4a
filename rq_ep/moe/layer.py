"""The expert-parallel MoE layer, which takes the place of a model's experts module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.strategy import Planner
from rq_ep.formats import ExpertBuffers, get_format
from rq_ep.moe.borrowing import BorrowBuffers
from rq_ep.moe.expert_bank import ExpertBank
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.output_norms import OutputNorms
from rq_ep.moe.telemetry import CallRecorder, LayerCall, PhaseTimer, Telemetry
from rq_ep.parallel import Combine, EPGroup, Exchange, GatheredRows, RankFailure, RoutingCounts, SoleHolders


class EPExperts(nn.Module):
    """This rank's part of a layer's experts. Every rank of the group calls it for every step, with zero rows too.

    A small step whose rows the ranks have agreed on (`Exchange.rows_R`) takes two collectives: rows with their routing,
    which go to all ranks, and sums. Otherwise a small one takes three - counts, rows, sums - and a larger one four, as
    the pairs' metadata goes ahead of the rows. The host waits for a GPU once, for the counts, and once more in a step
    so uneven that rows come in parts, for the pairs in each. Checksums of borrowed experts are computed beside the
    compute and looked at by the next layer, after its counts; the last layer of a forward pass waits for its own. To
    wait for none, the planner would have to run on the GPU and give the kernels their sizes there; every message
    already has the size of a bound that the plan gives.
    """

    def __init__(
        self,
        family: ExpertFamily,
        placement: LayerPlacement,
        planner: Planner,
        group: EPGroup,
        *,
        exchange: Exchange | None = None,
        telemetry: CallRecorder | None = None,
        joins_later: bool = False,
        borrow_buffers: BorrowBuffers | None = None,
        expert_buffers: ExpertBuffers | None = None,
    ) -> None:
        """Allocate this rank's replicas; fill `bank` before the first call.

        Args:
            family: layout and activation of the experts.
            placement: where the layer's replicas are.
            planner: the strategy's decision for each step, the same on every rank.
            group: the ranks that share the experts.
            exchange: moves the rows, in the same way on every rank; default: as suits the group's device.
            telemetry: records every call; default: nothing is recorded.
            joins_later: until `join`, every output is zero, and no other rank is asked.
            borrow_buffers: for borrowed experts, which layers may share; default: this layer's own.
            expert_buffers: for replicas that come and go, which layers may share; default: they lie together.
        """
        super().__init__()
        self.family = family
        self.post_expert_norm = family.post_norm  # named as in transformers: its weights are loaded with the model's
        self.placement = placement
        self.planner = planner
        self.group = group
        self.sole_holders = SoleHolders.of(placement.replicas, placement.num_experts, group.size, group.device)
        self.exchange = Exchange(group) if exchange is None else exchange
        self.bank = ExpertBank(
            family.layout, placement.replicas, group.rank, group.device, borrow_buffers, placement.index,
            expert_buffers,
        )  # fmt: skip
        self._telemetry: CallRecorder = Telemetry(max_records=0) if telemetry is None else telemetry
        self._output_norms: OutputNorms | None = None
        self._is_apart = joins_later

    @property
    def telemetry(self) -> CallRecorder:
        """Where calls are recorded."""
        return self._telemetry

    def join(self) -> None:
        """Take part in the exchange from the next call on."""
        self._is_apart = False

    def record_with(self, telemetry: CallRecorder) -> None:
        """Record calls there from the next one on."""
        self._telemetry = telemetry

    def sample_norms(self, output_norms: OutputNorms) -> None:
        """Have the norms of experts' outputs added up there, in the steps that it samples."""
        self._output_norms = output_norms

    @contextmanager
    def recording_nothing(self) -> Iterator[None]:
        """Inside, calls are neither recorded nor sampled."""
        telemetry, output_norms = self._telemetry, self._output_norms
        self._telemetry, self._output_norms = Telemetry(max_records=0), None
        try:
            yield
        finally:
            self._telemetry, self._output_norms = telemetry, output_norms

    def replace_placement(self, placement: LayerPlacement, planner: Planner) -> None:
        """Serve another placement of this layer from the next call on. Every rank does so between the same two calls.

        Args:
            placement: replicas that this rank holds, or has staged and verified in `bank`.
            planner: the strategy's for this placement.

        Raises:
            MissingExpert: this rank lacks a replica; nothing has changed.
        """
        assert (placement.index, placement.num_experts) == (self.placement.index, self.placement.num_experts)
        sole_holders = SoleHolders.of(placement.replicas, placement.num_experts, self.group.size, self.group.device)
        self.bank.commit(placement.replicas)
        self.placement, self.planner, self.sole_holders = placement, planner, sole_holders

    def discard_step(self) -> None:
        """Forget what a step that was cut off has left behind."""
        self.bank.borrow_buffers.discard()
        if self._output_norms is not None:
            self._output_norms.discard()

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
        if self._is_apart:
            return torch.zeros_like(hidden_TD)
        try:
            return self._forward(hidden_TD, topk_ids_TK, topk_weights_TK)
        except UserError:
            raise
        except Exception as error:
            message = f"MoE layer {self.placement.index} on rank {self.group.rank}: {error}"
            raise RankFailure(message) from error

    def _forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        row_bytes = hidden_TD.shape[1] * hidden_TD.dtype.itemsize
        rows_R = self.exchange.rows_to_gather(len(hidden_TD), row_bytes)
        if rows_R is not None:
            return self._forward_gathered(hidden_TD, topk_ids_TK, topk_weights_TK, rows_R)
        timer = self._telemetry.timer(self.group)
        counts = RoutingCounts.gather(topk_ids_TK, self.sole_holders, self.group)
        timer.mark("gather")
        plan = self.planner(counts.counts_RE)
        timer.mark("plan")
        borrowed = self.bank.borrow(plan.transfers, self.group)
        handle = self.exchange.dispatch(hidden_TD, topk_ids_TK, topk_weights_TK, plan, counts)
        combine = Combine(handle)
        norms_VE = self._norms_VE()
        for received in handle:
            timer.mark("dispatch")
            partial_MD = self.bank.compute(received, self.family, borrowed, norms_VE)
            timer.mark("compute")
            combine.send_back(partial_MD)
            timer.mark("combine")
        out_TD = combine.output()
        timer.mark("combine")
        self._record(counts.counts_RE, plan, timer, handle.received_bytes)
        return out_TD

    def _forward_gathered(
        self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, rows_R: IntArray
    ) -> Tensor:
        timer = self._telemetry.timer(self.group)
        gathered = GatheredRows.gather(hidden_TD, topk_ids_TK, topk_weights_TK, rows_R, self.group)
        counts_RE = gathered.counts_RE(self.placement.num_experts)
        timer.mark("gather")
        plan = self.planner(counts_RE)
        timer.mark("plan")
        borrowed = self.bank.borrow(plan.transfers, self.group)
        received = gathered.received(plan)
        timer.mark("dispatch")
        partial_MD = self.bank.compute(received, self.family, borrowed, self._norms_VE())
        timer.mark("compute")
        out_TD = gathered.combine(partial_MD)
        timer.mark("combine")
        self._record(counts_RE, plan, timer, gathered.received_bytes)
        return out_TD

    def _norms_VE(self) -> Tensor | None:
        if self._output_norms is None:
            return None
        return self._output_norms.sums_of(self.placement.index, self.placement.num_experts, self.group.device)

    def _record(
        self, counts_RE: IntArray, plan: DispatchPlan, timer: PhaseTimer, received_bytes: Mapping[str, int]
    ) -> None:
        call = LayerCall(
            self.placement.index, self.group.rank, counts_RE, plan, timer, received_bytes,
            partial(transfer_bytes, plan, self.family),
        )  # fmt: skip
        self._telemetry.record(call)

    def extra_repr(self) -> str:
        held = len(self.bank.experts)
        return f"{held} of {self.placement.num_experts} experts, rank {self.group.rank} of {self.group.size}"


def transfer_bytes(plan: DispatchPlan, family: ExpertFamily) -> IntArray:
    """[R] bytes of borrowed experts that each rank receives."""
    bytes_R = np.zeros(len(plan.pairs_RP), np.int64)
    for transfer in plan.transfers:
        bytes_R[transfer.dst] += get_format(transfer.format).nbytes(family.layout)
    return bytes_R
