"""Dispatch and combine: rows travel to the replicas the plan chose, weighted sums travel back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan
from rq_ep.parallel.base import Arrival, EPGroup

_NOTE_BYTES = 8  # a pair's row number and the bits of its fp32 weight

# A step in which no rank receives more than this goes in one message for each pair: fewer bytes are not worth a hop.
MAX_PADDED_BYTES = {"cpu": 1 << 16, "cuda": 1 << 20}
# Rows a rank receives at once; more arrive, are computed and leave part by part, in the same buffer.
MAX_PART_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
# Whether a rank computes its own rows while the others are under way. It takes two smaller GEMMs for each expert. On a
# CPU the messages are carried by the very core that computes: bench/layer.py on two pinned ranks is slower with it.
OVERLAPS = {"cpu": False, "cuda": True}


@dataclass(frozen=True)
class Received:
    """What a rank computes in one go. Pairs are sorted by local replica, then source rank, then (token, k)."""

    rows_MD: Tensor
    row_N: Tensor  # int64, the row of each pair
    weight_N: Tensor  # fp32, the routing weight of each pair
    experts: tuple[int, ...]  # expert of each local replica of the plan, ascending
    offsets: tuple[int, ...]  # local replica j computes pairs offsets[j] to offsets[j + 1]


@dataclass(frozen=True)
class Part:
    """Rows that travel together, as this rank sends and receives them."""

    tokens: Tensor  # sent, by destination rank
    rows_out: tuple[int, ...]  # [R] rows for each rank
    rows_in: tuple[int, ...]  # [R] rows of each rank
    notes_N2: Tensor  # int32, of each arriving pair the row among its source's and the bits of the weight
    pairs_RJ: IntArray  # arriving pairs of each source rank and local replica


class Exchange:
    """Moves rows between the ranks of a group. Own rows do not travel.

    Collectives of a call: small steps, dispatch 1, combine 1; larger ones notes, rows and sums. With a GPU the host
    waits for it once, in the larger ones, to learn how many rows arrive; in parts, once more. Small steps wait for
    nothing: the plan tells how many pairs arrive, and there are no more rows than pairs.
    """

    def __init__(
        self,
        group: EPGroup,
        *,
        max_part_bytes: int | None = None,
        max_padded_bytes: int | None = None,
        overlaps: bool | None = None,
    ) -> None:
        """
        Args:
            group: the ranks; all of them make the same choices here.
            max_part_bytes: of rows that a rank receives at once, up to a row for each rank more.
            max_padded_bytes: up to so many received bytes on every rank, rows go with each pair's note.
            overlaps: own rows are computed while the others travel. Defaults: by device.
        """
        device_type = group.device.type
        self.group = group
        self.max_part_bytes = max_part_bytes or MAX_PART_BYTES[device_type]
        self.max_padded_bytes = MAX_PADDED_BYTES[device_type] if max_padded_bytes is None else max_padded_bytes
        self.overlaps = OVERLAPS[device_type] if overlaps is None else overlaps

    def dispatch(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, plan: DispatchPlan) -> "Trip":
        """Send this rank's rows to the replicas the plan gives them; iterate over the result for what to compute.

        A source's j-th pair of an expert, in (token, k) order, fills the expert's replicas in the order of their ranks.
        Rows travel in their own dtype, ids not at all: how many pairs belong to which replica follows from the plan.

        Args:
            hidden_TD: [T, D] rows, T may be 0.
            topk_ids_TK: [T, K] integers, the experts of each row; one may be named twice.
            topk_weights_TK: [T, K] routing weights.
            plan: made from the counts of these very ids.
        """
        group, device = self.group, hidden_TD.device
        rank, size = group.rank, group.size
        num_tokens, top_k = topk_ids_TK.shape
        pairs_out_R = plan.pairs_RR[rank]
        local = plan.replicas.on_rank(rank)
        pairs_RJ = plan.pairs_RP[:, local.start : local.stop]
        experts = tuple(plan.replicas.experts_P[local.start : local.stop].tolist())

        pair_N = pairs_by_replica(topk_ids_TK, plan, rank)
        weight_N = topk_weights_TK.reshape(-1)[pair_N].float().view(torch.int32)
        token_N = pair_N // max(top_k, 1)
        start = int(pairs_out_R[:rank].sum())
        end = start + int(pairs_out_R[rank])
        own_notes = torch.stack([token_N[start:end].int(), weight_N[start:end]], 1)
        token_N, weight_N = (torch.cat([values[:start], values[end:]]) for values in (token_N, weight_N))
        trip = Trip(self, hidden_TD, experts, own_notes, pairs_RJ[rank])
        if size == 1:
            return trip

        away_RR = plan.pairs_RR * (1 - np.eye(size, dtype=np.int64))
        destination_N = _repeat(np.arange(size), away_RR[rank], device)
        # Which tokens each rank gets: marking them finds every one once, whatever the number of its pairs.
        is_sent_RT = torch.zeros(size, num_tokens, dtype=torch.int32, device=device)
        is_sent_RT[destination_N, token_N] = 1
        row_N = (is_sent_RT.cumsum(1, dtype=torch.int32) - 1)[destination_N, token_N]
        notes_N2 = torch.stack([row_N, weight_N], 1)
        arriving_RJ = pairs_RJ.copy()
        arriving_RJ[rank] = 0
        row_bytes = hidden_TD.shape[1] * hidden_TD.dtype.itemsize

        if int(away_RR.sum(axis=0).max()) * (row_bytes + _NOTE_BYTES) <= self.max_padded_bytes:
            rows_out_R, rows_in_R = away_RR[rank], away_RR[:, rank]
            tokens = _by_slot(token_N, row_N, rows_out_R)
            message = torch.cat([_bytes(hidden_TD[tokens]), _bytes(notes_N2)], 1)
            arrived = group.all_to_all(message, rows_out_R.tolist(), rows_in_R.tolist())
            notes_N2 = arrived[:, row_bytes:].contiguous().view(torch.int32)
            part = Part(tokens, tuple(rows_out_R.tolist()), tuple(rows_in_R.tolist()), notes_N2, arriving_RJ)
            return trip.expect([part], arrived[:, :row_bytes])

        notes_N2 = group.all_to_all(notes_N2, away_RR[rank].tolist(), away_RR[:, rank].tolist())
        source_N = _repeat(np.arange(size), away_RR[:, rank], device)
        rows_in = torch.zeros(size, dtype=torch.int32, device=device)
        rows_in.scatter_reduce_(0, source_N, notes_N2[:, 0] + 1, "amax")
        rows_out_R, rows_in_R = torch.stack([is_sent_RT.sum(1, dtype=torch.int32), rows_in]).cpu().numpy().astype(int)
        tokens = _by_slot_of(token_N, row_N, destination_N, rows_out_R)
        # A rank receives no more rows of another than that has tokens: every rank knows this bound of every rank.
        most_RR = np.minimum(away_RR, plan.pairs_RP.sum(axis=1, keepdims=True) // max(top_k, 1))
        num_parts = max(1, -(-int(most_RR.sum(axis=0).max()) * row_bytes // self.max_part_bytes))
        if num_parts == 1:
            return trip.expect(
                [Part(tokens, tuple(rows_out_R.tolist()), tuple(rows_in_R.tolist()), notes_N2, arriving_RJ)]
            )
        return trip.expect(_in_parts(num_parts, tokens, rows_out_R, rows_in_R, notes_N2, source_N, arriving_RJ))
