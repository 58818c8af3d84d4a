"""Dispatch: rows travel to the replicas the plan chose."""

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan
from rq_ep.parallel.dispatch_handle import NOTE_BYTES, Part, Trip
from rq_ep.parallel.ep_group import EPGroup, count
from rq_ep.parallel.permute import pairs_by_replica, repeat, stable_order
from rq_ep.parallel.receive_buffers import dispatch_limit
from rq_ep.parallel.routing_counts import Census

# A step in which no rank receives more goes as one message with room for a row beside every pair: a hop saved is worth
# more than bytes saved.
MAX_PADDED_BYTES = {"cpu": 1 << 16, "cuda": 1 << 20}
# Whether the host waits to learn how many rows are sent, each token once, where an expert is split or lent; otherwise
# there is room for all that the census allows, at most for a row beside every pair.
LEARNS_ROWS = {"cpu": True, "cuda": False}
# Whether a rank computes its own rows while the others are under way. That takes two smaller GEMMs for each expert, and
# with gloo the core that computes also carries the messages: on two pinned cores, 8 experts, D = F = 512, a layer took
# 8 to 20 % more CPU time at 256 tokens a rank, and between 4 % less and 5 % more at 2048.
OVERLAPS = {"cpu": False, "cuda": True}


class Exchange:
    """Moves rows between the ranks of a group; a rank's own rows stay where they are.

    A call takes two collectives in small steps, rows with notes and sums, and three in others: notes, rows, sums. The
    host waits for no GPU: the plan says how many pairs arrive, and the census how many rows at most. Only where they
    come in parts it waits once, to learn how many pairs are in each. Where the host learns rows, a tiny collective
    more tells every rank's, before they are dealt to parts: there may be far fewer than the bound.
    """

    def __init__(
        self,
        group: EPGroup,
        *,
        max_dispatch_bytes: int | None = None,
        max_padded_bytes: int | None = None,
        learns_rows: bool | None = None,
        overlaps: bool | None = None,
    ) -> None:
        """Settings, by default those of the device, must be the same on every rank.

        Args:
            group: the ranks.
            max_dispatch_bytes: rows of other ranks that a rank holds at once, up to a row of each more in each part;
                default: a tenth more than in a balanced step of as many tokens.
            max_padded_bytes: received by a rank, up to which rows and notes are one message.
            learns_rows: the host waits to learn how many rows there are, where a plan only bounds them.
            overlaps: own rows are computed while others are under way.
        """
        kind = group.device.type
        self.group = group
        self.max_dispatch_bytes = max_dispatch_bytes
        self.max_padded_bytes = MAX_PADDED_BYTES[kind] if max_padded_bytes is None else max_padded_bytes
        self.learns_rows = LEARNS_ROWS[kind] if learns_rows is None else learns_rows
        self.overlaps = OVERLAPS[kind] if overlaps is None else overlaps

    def dispatch(
        self,
        hidden_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        plan: DispatchPlan,
        census: Census | None = None,
    ) -> Trip:
        """Send this rank's rows to the replicas the plan gives them; the trip tells what to compute, part by part.

        A source's j-th pair of an expert, in (token, k) order, fills the expert's replicas in the order of their ranks.
        A row bound for several replicas of one rank is computed there once and summed. Rows travel in their own dtype;
        ids do not: how many pairs belong to which replica follows from the plan.

        Args:
            hidden_TD: [T, D] rows, T may be 0.
            topk_ids_TK: [T, K] integers, the experts of each row; one may be named twice.
            topk_weights_TK: [T, K] routing weights.
            plan: made from the counts of these very ids.
            census: of these ids; without it rows are only known not to exceed pairs and tokens.
        """
        group, device = self.group, hidden_TD.device
        rank, size, top_k = group.rank, group.size, max(topk_ids_TK.shape[1], 1)
        local = plan.replicas.on_rank(rank)
        pairs_RJ = plan.pairs_RP[:, local.start : local.stop]
        experts = tuple(plan.replicas.experts_P[local.start : local.stop].tolist())

        pair_N = pairs_by_replica(topk_ids_TK, topk_weights_TK, plan, rank)
        note_N2 = torch.stack([pair_N // top_k, topk_weights_TK.reshape(-1)[pair_N].float().view(torch.int32)], 1)
        start = int(plan.pairs_RR[rank, :rank].sum())
        end = start + int(plan.pairs_RR[rank, rank])
        own = (note_N2[start:end].int(), pairs_RJ[rank])
        if size == 1:
            return Trip(group, hidden_TD, experts, own, [], overlaps=False)

        away_RR = plan.pairs_RR.copy()
        np.fill_diagonal(away_RR, 0)
        pairs_out_R, pairs_in_R = away_RR[rank], away_RR[:, rank]
        sent_N2 = torch.cat([note_N2[:start], note_N2[end:]])
        token_N = sent_N2[:, 0]
        destination_N = repeat(np.arange(size), pairs_out_R, device)
        # Which tokens each rank gets: marking them finds every one once, whatever the number of its pairs.
        is_sent_RT = torch.zeros(size, len(hidden_TD), dtype=torch.int32, device=device)
        one = torch.ones((), dtype=torch.int32, device=device)  # a number would be copied to a GPU, with a wait
        is_sent_RT.index_put_((destination_N, token_N), one)
        row_N = is_sent_RT.cumsum(1)[destination_N, token_N] - 1
        notes_N2 = torch.stack([row_N, sent_N2[:, 1]], 1).int()
        row_bytes = hidden_TD.shape[1] * hidden_TD.dtype.itemsize
        away_RJ = pairs_RJ.copy()
        away_RJ[rank] = 0

        if int(away_RR.sum(axis=0).max()) * (row_bytes + NOTE_BYTES) <= self.max_padded_bytes:
            tokens = _by_slot(token_N, row_N, pairs_out_R, pairs_out_R)
            message = torch.cat([hidden_TD.index_select(0, tokens).view(torch.uint8), notes_N2.view(torch.uint8)], 1)
            rows_out, rows_in = pairs_out_R.tolist(), pairs_in_R.tolist()
            arrived = group.all_to_all(message, rows_out, rows_in)
            notes_N2 = arrived[:, row_bytes:].contiguous().view(torch.int32)
            rows_MD = arrived[:, :row_bytes].contiguous().view(hidden_TD.dtype)
            part = Part(tokens, rows_out, rows_in, notes_N2, away_RJ, rows_MD)
            return Trip(group, hidden_TD, experts, own, [part], overlaps=False)

        tokens_R = plan.pairs_RP.sum(axis=1) // top_k
        most_RR = np.minimum(away_RR, tokens_R[:, None])
        if census is not None:
            most_RR = np.minimum(most_RR, census.most_rows_RR(plan))
        notes_N2 = group.all_to_all(notes_N2, pairs_out_R.tolist(), pairs_in_R.tolist())
        num_parts = self._num_parts(most_RR, tokens_R, top_k, row_bytes)
        if not self.learns_rows:
            rows_out_R, rows_in_R = most_RR[rank], most_RR[:, rank]
        elif num_parts == 1:
            last_R = torch.zeros(size, dtype=torch.int32, device=device)
            last_R.scatter_reduce_(0, repeat(np.arange(size), pairs_in_R, device), notes_N2[:, 0] + 1, "amax")
            rows_out_R, rows_in_R = torch.stack([is_sent_RT.sum(1), last_R]).cpu().numpy()
        else:  # every rank's, so that all find the same number: the rows may need fewer parts than their bound
            rows_RR = group.gather_counts(is_sent_RT.sum(1))
            rows_out_R, rows_in_R = rows_RR[rank], rows_RR[:, rank]
            num_parts = self._num_parts(rows_RR, tokens_R, top_k, row_bytes)
        whole = Part(
            tokens=_by_slot(token_N, row_N, pairs_out_R, rows_out_R),
            rows_out=rows_out_R.tolist(),
            rows_in=rows_in_R.tolist(),
            notes_N2=notes_N2,
            pairs_RJ=away_RJ,
        )
        parts = [whole] if num_parts == 1 else _in_parts(whole, num_parts)
        return Trip(group, hidden_TD, experts, own, parts, self.overlaps)

    def _num_parts(self, rows_RR: IntArray, tokens_R: IntArray, top_k: int, row_bytes: int) -> int:
        """In how many parts rows come, from what every rank knows of every rank."""
        limit = self.max_dispatch_bytes
        if limit is None:
            limit = dispatch_limit(tokens_R, top_k, row_bytes, self.group.device.type)
        most = int(rows_RR.sum(axis=0).max()) * row_bytes
        if most <= limit:
            return 1
        return -(-most * (1 + self.overlaps) // limit)  # two parts are held at once if they overlap


def _by_slot(token_N: Tensor, row_N: Tensor, pairs_R: IntArray, slots_R: IntArray) -> Tensor:
    """Tokens in the order they are sent: row `row_N[n]` for the rank of pair n is its token; unused slots say 0.

    Args:
        token_N: token of each pair, pairs by destination rank.
        row_N: number of the token among those of the destination.
        pairs_R: pairs for each rank.
        slots_R: rows sent to each rank, at least as many as tokens are different.
    """
    first_N = repeat(np.cumsum(slots_R) - slots_R, pairs_R, token_N.device)
    return token_N.new_zeros(int(slots_R.sum())).index_put_((first_N + row_N,), token_N)


def _in_parts(whole: Part, num_parts: int) -> list[Part]:
    """Deal out the rows of every pair of ranks in runs of equal length, and their pairs with them."""
    rows_out_R, rows_in_R = np.array(whole.rows_out), np.array(whole.rows_in)
    run_out_R, run_in_R = -(-rows_out_R // num_parts), -(-rows_in_R // num_parts)
    device, num_blocks = whole.tokens.device, whole.pairs_RJ.size
    run_N = repeat(run_in_R, whole.pairs_RJ.sum(axis=1), device)
    block_N = repeat(np.arange(num_blocks), whole.pairs_RJ.ravel(), device)
    row_N = whole.notes_N2[:, 0]
    part_N = row_N // run_N
    counts = count(part_N * num_blocks + block_N, num_parts * num_blocks).cpu().numpy()
    pairs_PRJ = counts.reshape(num_parts, *whole.pairs_RJ.shape)
    notes_N2 = torch.stack([row_N - part_N * run_N, whole.notes_N2[:, 1]], 1).int()[stable_order(part_N, num_parts)]
    tokens_R = torch.split(whole.tokens, whole.rows_out)
    return [
        Part(
            tokens=torch.cat(
                [tokens[p * run : (p + 1) * run] for tokens, run in zip(tokens_R, run_out_R, strict=True)]
            ),
            rows_out=(rows_out_R - p * run_out_R).clip(0, run_out_R).tolist(),
            rows_in=(rows_in_R - p * run_in_R).clip(0, run_in_R).tolist(),
            notes_N2=notes,
            pairs_RJ=pairs_RJ,
        )
        for p, (notes, pairs_RJ) in enumerate(
            zip(torch.split(notes_N2, pairs_PRJ.sum(axis=(1, 2)).tolist()), pairs_PRJ, strict=True)
        )
    ]
