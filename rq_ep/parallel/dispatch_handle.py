"""Rows on their way, and combine: weighted sums travel back to where the rows came from."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.parallel.ep_group import Arrival, EPGroup
from rq_ep.parallel.permute import block_order, repeat

NOTE_BYTES = 8  # a pair's row number and the bits of its fp32 weight


@dataclass(frozen=True)
class Received:
    """What a rank computes in one go. Pairs are sorted by local replica, then source rank, then as they were sent."""

    rows_MD: Tensor
    row_N: Tensor  # int64, the row of each pair
    weight_N: Tensor  # fp32, the routing weight of each pair
    experts: tuple[int, ...]  # expert of each local replica of the plan, ascending
    offsets: tuple[int, ...]  # local replica j computes pairs offsets[j] to offsets[j + 1]


@dataclass(frozen=True)
class Part:
    """Rows that travel together, as this rank sends and receives them."""

    tokens: Tensor  # sent, by destination rank
    rows_out: list[int]  # [R] rows for each rank, none for this one
    rows_in: list[int]  # [R] rows of each rank
    notes_N2: Tensor  # int32; of each arriving pair, by source: its row among the source's, the bits of its weight
    pairs_RJ: IntArray  # arriving pairs of each source rank and local replica
    rows_MD: Tensor | None = None  # the arriving rows, where they are here already


class Trip:
    """One call's rows on their way and back. Iterate; after each part, send its sums back; then add them up."""

    def __init__(
        self,
        group: EPGroup,
        hidden_TD: Tensor,
        experts: tuple[int, ...],
        own: tuple[Tensor, IntArray],
        parts: list[Part],
        overlaps: bool,
    ) -> None:
        """
        Args:
            group: the ranks.
            hidden_TD: [T, D] this rank's rows.
            experts: expert of each local replica.
            own: notes [N, 2] of the pairs that stay on this rank, and how many each local replica has, [J].
            parts: what travels; every rank has as many.
            overlaps: own rows are computed while the first part is under way, each part while the next one is.
        """
        self.group = group
        self.overlaps = overlaps
        self.hidden_TD = hidden_TD
        self.experts = experts
        self.own = own
        self.parts = parts
        self._own_MD: Tensor | None = None  # fp32 sums of this rank's own rows
        self._num_back = 0
        self._going_back: Arrival | None = None
        self._back: list[Tensor] = []  # sums of the other ranks, part by part

    @property
    def received_bytes(self) -> dict[str, int]:
        """Bytes that the other ranks send to this one: rows with notes, and sums."""
        row_bytes = self.hidden_TD.shape[1] * self.hidden_TD.dtype.itemsize
        return {
            "dispatch": sum(sum(part.rows_in) * row_bytes + len(part.notes_N2) * NOTE_BYTES for part in self.parts),
            "combine": sum(sum(part.rows_out) * row_bytes for part in self.parts),
        }

    def __iter__(self) -> Iterator[Received]:
        """What to compute: own rows with or, if they overlap, before the others."""
        if not self.overlaps:
            yield self._received(self.parts[0] if self.parts else None, True, None)
            for part in self.parts[1:]:
                yield self._received(part, False, None)
            return
        arriving: list[Arrival] = []
        computing: Part | None = None  # first, this rank's own
        for number, part in enumerate(self.parts):
            arriving.append(self._start(part, self._room(number % 2, sum(part.rows_in))))
            yield self._received(computing, computing is None, arriving.pop(0).wait() if computing else None)
            computing = part
        yield self._received(computing, False, arriving.pop(0).wait())

    def send_back(self, partial_MD: Tensor) -> None:
        """Return sums to where the rows came from.

        Args:
            partial_MD: [M, D] fp32, for each row of the part that was iterated last the weighted sum over this rank's
                replicas.
        """
        if self._own_MD is None:
            num_own = len(self.hidden_TD)
            self._own_MD, partial_MD = partial_MD[:num_own], partial_MD[num_own:]
            if self.overlaps:
                return
        if not self.parts:
            return
        part = self.parts[self._num_back]
        self._num_back += 1
        self._wait_for_sums()  # at most one part's sums are under way: their memory is bounded
        sums_MD = partial_MD.to(self.hidden_TD.dtype)
        self._going_back = self.group.start_all_to_all(sums_MD, part.rows_in, part.rows_out)
        if not self.overlaps:
            self._wait_for_sums()

    def combine(self) -> Tensor:
        """Add everything up: out_TD [T, D] in the rows' dtype.

        Sums are fp32, in the order of the ranks after this rank's own part, so that the same inputs give the same bits.
        """
        self._wait_for_sums()
        assert self._own_MD is not None
        assert self._num_back == len(self.parts)
        out_TD = self._own_MD
        # The parts of one rank, then those of the next. Within one call tokens are distinct, apart from zeros that
        # nobody asked for, so that no two additions meet and their order is fixed.
        pieces = [
            list(zip(torch.split(part.tokens, part.rows_out), torch.split(back, part.rows_out), strict=True))
            for part, back in zip(self.parts, self._back, strict=True)
        ]
        for of_rank in zip(*pieces, strict=True):
            for tokens, sums_MD in of_rank:
                if len(tokens):
                    out_TD.index_add_(0, tokens, sums_MD.float())
        return out_TD.to(self.hidden_TD.dtype, copy=True)

    def _wait_for_sums(self) -> None:
        if self._going_back is not None:
            self._back.append(self._going_back.wait())
            self._going_back = None

    def _start(self, part: Part, out: Tensor) -> Arrival:
        rows = self.hidden_TD.index_select(0, part.tokens)  # on a CPU several times as fast as by brackets
        return self.group.start_all_to_all(rows, part.rows_out, part.rows_in, out)

    def _room(self, number: int, num_rows: int) -> Tensor:
        return self.group.room.take(number, num_rows, self.hidden_TD.shape[1], self.hidden_TD.dtype)

    def _received(self, part: Part | None, has_own: bool, rows_MD: Tensor | None) -> Received:
        """Pairs of a part, of this rank, or of both, in the order of computing; `rows_MD` is None if yet to come."""
        own_notes_N2, own_pairs_J = self.own
        if part is None:  # one source: its pairs are in order
            return self._ready(self.hidden_TD, own_notes_N2[:, 0].long(), own_notes_N2[:, 1], own_pairs_J)
        pairs_RJ, notes_N2 = part.pairs_RJ, part.notes_N2
        first_row_R = np.cumsum(part.rows_in) - np.array(part.rows_in, np.int64)
        if rows_MD is None:
            rows_MD = self._fetch(part, has_own)
        if has_own:
            rank = self.group.rank
            before = int(pairs_RJ[:rank].sum())
            notes_N2 = torch.cat([notes_N2[:before], own_notes_N2, notes_N2[before:]])
            pairs_RJ = pairs_RJ.copy()
            pairs_RJ[rank] = own_pairs_J
            first_row_R += len(self.hidden_TD)
            first_row_R[rank] = 0
        blocks_JR = np.arange(pairs_RJ.size).reshape(pairs_RJ.shape).T
        notes_N2 = notes_N2[block_order(pairs_RJ.ravel(), blocks_JR.ravel(), notes_N2.device)]
        first_row_N = repeat(np.tile(first_row_R, len(own_pairs_J)), pairs_RJ.T.ravel(), notes_N2.device)
        return self._ready(rows_MD, notes_N2[:, 0] + first_row_N, notes_N2[:, 1], pairs_RJ.sum(axis=0))

    def _ready(self, rows_MD: Tensor, row_N: Tensor, weight_bits_N: Tensor, pairs_J: IntArray) -> Received:
        weight_N = weight_bits_N.contiguous().view(torch.float32)
        return Received(rows_MD, row_N, weight_N, self.experts, (0, *np.cumsum(pairs_J).tolist()))

    def _fetch(self, part: Part, has_own: bool) -> Tensor:
        """The rows of a part, after this rank's own if it has them; returns when they are here."""
        if part.rows_MD is not None:
            return torch.cat([self.hidden_TD, part.rows_MD]) if has_own else part.rows_MD
        num_own = len(self.hidden_TD) if has_own else 0
        rows_MD = self._room(0, num_own + sum(part.rows_in))
        rows_MD[:num_own] = self.hidden_TD[:num_own]
        self._start(part, rows_MD[num_own:]).wait()
        return rows_MD
