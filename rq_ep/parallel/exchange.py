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
from rq_ep.parallel.row_parts import METADATA_BYTES, Part, PartLimit, split_part


@dataclass(frozen=True)
class ExchangeSettings:
    """How rows travel; the same on every rank."""

    # Bytes of all ranks' rows, up to which every rank gets all of them with their routing (`GatheredRows`), where the
    # ranks know how many each has. Where a rank is alone nothing travels, and on a CPU this way is faster at any size:
    # a forward pass of 512 tokens through a small model took a fifth less.
    max_gathered_bytes: int
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
    def for_device(
        cls, kind: str, max_dispatch_bytes: int | None = None, *, is_alone: bool = False
    ) -> "ExchangeSettings":
        """What suits a device of type `kind`, cpu or cuda, of one of several ranks or of one that is alone."""
        if kind == "cuda":
            return cls(1 << 20, 1 << 20, counts_rows=False, overlaps=True, max_dispatch_bytes=max_dispatch_bytes)
        max_gathered_bytes = 1 << 62 if is_alone else 1 << 16
        return cls(max_gathered_bytes, 1 << 16, counts_rows=True, overlaps=False, max_dispatch_bytes=max_dispatch_bytes)


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
        if settings is None:
            settings = ExchangeSettings.for_device(group.device.type, is_alone=group.size == 1)
        self.settings = settings
        self._rows_R: IntArray | None = None  # of this step, if the ranks have agreed on them

    def announce_rows(self, rows_R: IntArray | None) -> None:
        """Learn with how many rows each rank enters the next calls; None: the ranks have not agreed on that."""
        self._rows_R = rows_R

    def rows_to_gather(self, num_rows: int, row_bytes: int) -> IntArray | None:
        """[R] rows of each rank, if they are known and so few that every rank shall get all of them.

        Args:
            num_rows: of this rank; one that is alone knows all by that.
            row_bytes: of a row.
        """
        rows_R = np.array([num_rows]) if self.group.size == 1 else self._rows_R
        return None if rows_R is None or int(rows_R.sum()) * row_bytes > self.settings.max_gathered_bytes else rows_R

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
        settings, group = self.settings, self.group
        route = Route.of(topk_ids_TK, topk_weights_TK, plan, group.rank)
        parts: tuple[Part, ...] = ()
        overlaps = False
        if group.size > 1:
            sent = SentRows.of(route, len(hidden_TD))
            row_bytes = hidden_TD.shape[1] * hidden_TD.dtype.itemsize
            most_pairs = int(route.pairs_RR.sum(axis=0).max())  # that any rank receives
            if most_pairs * (row_bytes + METADATA_BYTES) <= settings.max_padded_bytes:
                parts = packed_message(group, sent, hidden_TD)
            else:
                overlaps = settings.overlaps
                top_k = max(topk_ids_TK.shape[1], 1)
                tokens_R = plan.pairs_RP.sum(axis=1) // top_k
                max_rows_RR = np.minimum(route.pairs_RR, tokens_R[:, None])
                if counts is not None:
                    max_rows_RR = np.minimum(max_rows_RR, counts.max_rows_RR(plan))
                max_bytes = settings.max_dispatch_bytes
                if max_bytes is None:
                    max_bytes = dispatch_limit(tokens_R, top_k, row_bytes, group.device.type)
                send_metadata = counted_rows if settings.counts_rows else bounded_rows
                parts = send_metadata(group, sent, max_rows_RR, PartLimit(max_bytes, row_bytes, overlaps))
        return DispatchHandle(group, hidden_TD, route.experts, route.own, parts, overlaps)


def packed_message(group: EPGroup, sent: SentRows, hidden_TD: Tensor) -> tuple[Part, ...]:
    """Send rows and metadata in one collective, with a row for every pair."""
    route = sent.route
    tokens = sent.tokens(route.pairs_out_R)
    rows = hidden_TD.index_select(0, tokens).view(torch.uint8)
    message = torch.cat([rows, sent.metadata_N2.view(torch.uint8)], 1)
    rows_out, rows_in = route.pairs_out_R.tolist(), route.pairs_in_R.tolist()
    arrived = group.all_to_all(message, rows_out, rows_in)
    rows_MD = arrived[:, :-METADATA_BYTES].contiguous().view(hidden_TD.dtype)
    # Not `contiguous`, which leaves up to one row where it lies: bytes that no int32 may begin at, if D is odd.
    metadata = arrived[:, -METADATA_BYTES:].clone(memory_format=torch.contiguous_format)
    metadata_N2 = metadata.view(torch.int32)
    return (Part(tokens, rows_out, rows_in, metadata_N2, route.pairs_RJ, rows_MD),)


def bounded_rows(group: EPGroup, sent: SentRows, max_rows_RR: IntArray, limit: PartLimit) -> tuple[Part, ...]:
    """Send the metadata of all pairs. As many rows as may travel at most are still to be sent.

    Args:
        group: the ranks.
        sent: what this rank sends.
        max_rows_RR: [source, destination] rows that travel at most.
        limit: on the rows that a rank holds at once.
    """
    metadata_N2 = _exchange_metadata(group, sent)
    return split_part(_whole(group, sent, metadata_N2, max_rows_RR), limit.num_parts(max_rows_RR))


def counted_rows(group: EPGroup, sent: SentRows, max_rows_RR: IntArray, limit: PartLimit) -> tuple[Part, ...]:
    """Send the metadata of all pairs, and count the rows that are still to be sent. Arguments as of `bounded_rows`."""
    metadata_N2 = _exchange_metadata(group, sent)
    if limit.num_parts(max_rows_RR) == 1:
        counts = torch.stack([sent.counts_R, _arriving_rows(sent.route, metadata_N2)]).cpu().numpy()
        tokens, (rows_out, rows_in) = sent.tokens(counts[0]), counts.tolist()
        return (Part(tokens, rows_out, rows_in, metadata_N2, sent.route.pairs_RJ),)
    # Those of every rank, so that all get the same number of parts: the rows may need fewer than their bound.
    rows_RR = group.gather_counts(sent.counts_R)
    return split_part(_whole(group, sent, metadata_N2, rows_RR), limit.num_parts(rows_RR))


def _exchange_metadata(group: EPGroup, sent: SentRows) -> Tensor:
    """int32 [N, 2] of the pairs that arrive, by source."""
    return group.all_to_all(sent.metadata_N2, sent.route.pairs_out_R.tolist(), sent.route.pairs_in_R.tolist())


def _whole(group: EPGroup, sent: SentRows, metadata_N2: Tensor, rows_RR: IntArray) -> Part:
    rows_out_R, rows_in_R = rows_RR[group.rank], rows_RR[:, group.rank]
    tokens = sent.tokens(rows_out_R)
    return Part(tokens, rows_out_R.tolist(), rows_in_R.tolist(), metadata_N2, sent.route.pairs_RJ)


def _arriving_rows(route: Route, metadata_N2: Tensor) -> Tensor:
    """[R] rows that arrive of each rank: one more than the last row number in its metadata."""
    source_N = repeat(np.arange(route.num_ranks), route.pairs_in_R, metadata_N2.device)
    rows_R = torch.zeros(route.num_ranks, dtype=torch.int32, device=metadata_N2.device)
    return rows_R.scatter_reduce_(0, source_N, metadata_N2[:, 0] + 1, "amax")
