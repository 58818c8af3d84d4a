"""Dispatch: rows travel to the replicas that the plan chose."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan
from rq_ep.parallel.dispatch_handle import DispatchHandle
from rq_ep.parallel.ep_group import EPGroup
from rq_ep.parallel.permute import Route, SentRows, repeat
from rq_ep.parallel.receive_buffers import dispatch_limit
from rq_ep.parallel.routing_counts import RoutingCounts
from rq_ep.parallel.row_parts import METADATA_BYTES, Part, split_part


@dataclass(frozen=True)
class ExchangeSettings:
    """How rows travel; the same on every rank."""

    # Bytes received by a rank, up to which rows and metadata are one message, with a row for every pair: a collective
    # saved is worth more than bytes saved.
    max_padded_bytes: int
    # Whether the host waits to count the rows sent, each token once, where an expert is split or lent; otherwise as
    # many are sent as the routing counts allow, at most a row for every pair.
    counts_rows: bool
    # Whether a rank computes its own rows while the others are under way. That takes two smaller GEMMs for each expert,
    # and with gloo the core that computes also carries the messages: on two pinned cores, 8 experts, D = F = 512, a
    # layer took 8 to 20 % more CPU time at 256 tokens a rank, and between 4 % less and 5 % more at 2048.
    overlaps: bool
    # Rows of other ranks that a rank holds at once, up to a row of each more in each part; None: a tenth more than in
    # a balanced step of as many tokens.
    max_dispatch_bytes: int | None = None

    @classmethod
    def for_device(cls, kind: str, max_dispatch_bytes: int | None = None) -> "ExchangeSettings":
        """What suits a device of type `kind`, cpu or cuda."""
        if kind == "cuda":
            return cls(1 << 20, counts_rows=False, overlaps=True, max_dispatch_bytes=max_dispatch_bytes)
        return cls(1 << 16, counts_rows=True, overlaps=False, max_dispatch_bytes=max_dispatch_bytes)


class Exchange:
    """Moves rows between the ranks of a group; a rank's own rows stay where they are.

    A call takes two collectives in small steps, rows with metadata and sums, and three in others: metadata, rows, sums.
    The host waits for no GPU: the plan says how many pairs arrive, and the routing counts how many rows at most. Only
    where rows come in parts it waits once, to learn how many pairs are in each. Where the host counts rows, one more
    tiny collective gathers the counts before rows are split into parts: there may be far fewer than the bound.
    """

    def __init__(self, group: EPGroup, settings: ExchangeSettings | None = None) -> None:
        """
        Args:
            group: the ranks.
            settings: default: those for the group's device.
        """
        self.group = group
        self.settings = ExchangeSettings.for_device(group.device.type) if settings is None else settings

    def dispatch(
        self,
        hidden_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        plan: DispatchPlan,
        counts: RoutingCounts | None = None,
    ) -> DispatchHandle:
        """Send this rank's rows to the replicas that the plan gives them.

        A source's j-th pair of an expert, in (token, k) order, fills the expert's replicas in the order of their ranks.
        A row bound for several replicas of one rank is computed there once and summed. Rows travel in their own dtype;
        ids do not: how many pairs belong to which replica follows from the plan.

        Args:
            hidden_TD: [T, D] rows, T may be 0.
            topk_ids_TK: [T, K] integers, the experts of each row; one may be named twice.
            topk_weights_TK: [T, K] routing weights.
            plan: made from the counts of these very ids.
            counts: of these ids; without them rows are only known not to exceed pairs and tokens.

        Returns:
            Handle to iterate over what this rank is to compute.
        """
        route = Route.of(topk_ids_TK, topk_weights_TK, plan, self.group.rank)
        row_bytes = hidden_TD.shape[1] * hidden_TD.dtype.itemsize
        overlaps = False
        parts: tuple[Part, ...] = ()
        if self.group.size > 1:
            sent = SentRows.of(route, len(hidden_TD))
            most_pairs = int(route.pairs_RR.sum(axis=0).max())  # that any rank receives
            if most_pairs * (row_bytes + METADATA_BYTES) <= self.settings.max_padded_bytes:
                parts = (packed_message(self.group, hidden_TD, sent),)
            else:
                top_k = max(topk_ids_TK.shape[1], 1)
                max_rows_RR = row_bound(route, plan, top_k, counts)
                limit = self._dispatch_limit(plan, top_k, row_bytes)
                parts = metadata_ahead(self.group, sent, max_rows_RR, row_bytes, limit, self.settings)
                overlaps = self.settings.overlaps
        return DispatchHandle(self.group, hidden_TD, route.experts, route.own, parts, overlaps)

    def _dispatch_limit(self, plan: DispatchPlan, top_k: int, row_bytes: int) -> int:
        if self.settings.max_dispatch_bytes is not None:
            return self.settings.max_dispatch_bytes
        return dispatch_limit(plan.pairs_RP.sum(axis=1) // top_k, top_k, row_bytes, self.group.device.type)


def row_bound(route: Route, plan: DispatchPlan, top_k: int, counts: RoutingCounts | None) -> IntArray:
    """[source, destination] rows that travel at most: no more than pairs, tokens, and what the routing counts allow."""
    tokens_R = plan.pairs_RP.sum(axis=1) // top_k
    bound_RR: IntArray = np.minimum(route.pairs_RR, tokens_R[:, None])
    if counts is not None:
        bound_RR = np.minimum(bound_RR, counts.max_rows_RR(plan))
    return bound_RR


def packed_message(group: EPGroup, hidden_TD: Tensor, sent: SentRows) -> Part:
    """Send rows and metadata in one collective, with a row for every pair."""
    route = sent.route
    tokens = sent.tokens(route.pairs_out_R)
    rows = hidden_TD.index_select(0, tokens).view(torch.uint8)
    message = torch.cat([rows, sent.metadata_N2.view(torch.uint8)], 1)
    rows_out, rows_in = route.pairs_out_R.tolist(), route.pairs_in_R.tolist()
    arrived = group.all_to_all(message, rows_out, rows_in)
    rows_MD = arrived[:, :-METADATA_BYTES].contiguous().view(hidden_TD.dtype)
    metadata_N2 = arrived[:, -METADATA_BYTES:].contiguous().view(torch.int32)
    return Part(tokens, rows_out, rows_in, metadata_N2, route.pairs_RJ, rows_MD)


def metadata_ahead(
    group: EPGroup, sent: SentRows, max_rows_RR: IntArray, row_bytes: int, limit: int, settings: ExchangeSettings
) -> tuple[Part, ...]:
    """Send the metadata of all pairs; the rows are still to be sent, in one part or in several.

    Args:
        group: the ranks.
        sent: what this rank sends.
        max_rows_RR: [source, destination] rows that travel at most.
        row_bytes: of one row.
        limit: bytes of other ranks' rows that a rank may hold at once.
        settings: of the exchange.
    """
    route, rank = sent.route, group.rank
    metadata_N2 = group.all_to_all(sent.metadata_N2, route.pairs_out_R.tolist(), route.pairs_in_R.tolist())
    rows_RR = max_rows_RR
    num_parts = parts_needed(rows_RR, row_bytes, limit, settings.overlaps)
    if not settings.counts_rows:
        rows_out_R, rows_in_R = rows_RR[rank], rows_RR[:, rank]
    elif num_parts == 1:
        rows_out_R, rows_in_R = torch.stack([sent.counts_R, arriving_rows(route, metadata_N2)]).cpu().numpy()
    else:  # every rank's, so that all get the same number of parts: the rows may need fewer than their bound
        rows_RR = group.gather_counts(sent.counts_R)
        rows_out_R, rows_in_R = rows_RR[rank], rows_RR[:, rank]
        num_parts = parts_needed(rows_RR, row_bytes, limit, settings.overlaps)
    tokens = sent.tokens(rows_out_R)
    return split_part(Part(tokens, rows_out_R.tolist(), rows_in_R.tolist(), metadata_N2, route.pairs_RJ), num_parts)


def arriving_rows(route: Route, metadata_N2: Tensor) -> Tensor:
    """[R] rows that arrive of each rank, from the metadata of all pairs that arrive: one more than the last number."""
    source_N = repeat(np.arange(route.num_ranks), route.pairs_in_R, metadata_N2.device)
    rows_R = torch.zeros(route.num_ranks, dtype=torch.int32, device=metadata_N2.device)
    return rows_R.scatter_reduce_(0, source_N, metadata_N2[:, 0] + 1, "amax")


def parts_needed(rows_RR: IntArray, row_bytes: int, limit: int, overlaps: bool) -> int:
    """In how many parts rows come, so that no rank holds more than `limit` bytes of them; the same on every rank."""
    most_bytes = int(rows_RR.sum(axis=0).max()) * row_bytes
    if most_bytes <= limit:
        return 1
    return -(-most_bytes * (1 + overlaps) // limit)  # two parts are held at once if they overlap
