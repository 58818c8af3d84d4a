"""The handle of one dispatch: what this rank is to compute, as the rows arrive, and the way back of their sums.

Axes: J local replicas of a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.parallel.ep_group import Arrival, EPGroup
from rq_ep.parallel.permute import LocalPairs, block_order, repeat
from rq_ep.parallel.row_parts import METADATA_BYTES, Part


@dataclass(frozen=True)
class Received:
    """What a rank computes in one go. Pairs are sorted by local replica, then source rank, then as they were sent."""

    rows_MD: Tensor
    row_N: Tensor  # int64, the row of each pair
    weight_N: Tensor  # fp32, the routing weight of each pair
    experts: tuple[int, ...]  # expert of each local replica of the plan, ascending
    offsets: tuple[int, ...]  # local replica j computes pairs offsets[j] to offsets[j + 1]


@dataclass(frozen=True)
class DispatchHandle:
    """One dispatch on this rank. Iterate over what is to be computed, once; `Combine` takes the sums, in this order."""

    group: EPGroup
    hidden_TD: Tensor  # this rank's rows
    experts: tuple[int, ...]  # expert of each local replica
    own: LocalPairs  # pairs that stay on this rank
    parts: tuple[Part, ...]  # what travels; every rank has as many
    overlaps: bool  # own rows are computed while the first part is under way, each part while the next one is

    @property
    def received_bytes(self) -> dict[str, int]:
        """Bytes that the other ranks send to this one: rows with metadata, and sums."""
        row_bytes = self.hidden_TD.shape[1] * self.hidden_TD.dtype.itemsize
        return {
            "dispatch": sum(
                sum(part.rows_in) * row_bytes + len(part.metadata_N2) * METADATA_BYTES for part in self.parts
            ),
            "combine": sum(sum(part.rows_out) * row_bytes for part in self.parts),
        }

    @property
    def max_rows_held(self) -> int:
        """Most rows of other ranks that are held at once."""
        rows = sorted((sum(part.rows_in) for part in self.parts), reverse=True)
        return sum(rows[: 1 + self.overlaps])

    def __iter__(self) -> Iterator[Received]:
        """Own rows together with the first part, or before it if they overlap; then part by part."""
        if not self.parts:
            yield self._own_rows()
        elif not self.overlaps:
            first, *others = self.parts
            yield self._own_rows_and(first)
            for part in others:
                yield self._rows_of(part, part.rows_MD if part.rows_MD is not None else self._start(part, 0).wait())
        else:
            arriving = self._start(self.parts[0], 0)
            yield self._own_rows()
            for number, part in enumerate(self.parts):
                is_last = number + 1 == len(self.parts)
                following = None if is_last else self._start(self.parts[number + 1], (number + 1) % 2)
                yield self._rows_of(part, arriving.wait())
                if following is not None:
                    arriving = following

    def _own_rows(self) -> Received:
        """This rank's rows alone: of one source, so that its pairs are in the order of computing."""
        row_N, weight_bits_N = self.own.metadata_N2[:, 0].long(), self.own.metadata_N2[:, 1]
        return self._received(self.hidden_TD, row_N, weight_bits_N, self.own.pairs_J)

    def _rows_of(self, part: Part, rows_MD: Tensor) -> Received:
        """A part that has arrived, without this rank's rows."""
        first_row_R = np.cumsum(part.rows_in) - np.array(part.rows_in, np.int64)
        return self._by_replica(rows_MD, part.metadata_N2, part.pairs_RJ, first_row_R)

    def _own_rows_and(self, part: Part) -> Received:
        """This rank's rows followed by those of a part, which are waited for; pairs with this rank in its turn."""
        rank, num_own = self.group.rank, len(self.hidden_TD)
        if part.rows_MD is not None:
            rows_MD = torch.cat([self.hidden_TD, part.rows_MD])
        else:
            rows_MD = self._buffer(0, num_own + sum(part.rows_in))
            rows_MD[:num_own] = self.hidden_TD
            self._start_into(part, rows_MD[num_own:]).wait()
        before = int(part.pairs_RJ[:rank].sum())
        metadata_N2 = torch.cat([part.metadata_N2[:before], self.own.metadata_N2, part.metadata_N2[before:]])
        pairs_RJ = part.pairs_RJ.copy()
        pairs_RJ[rank] = self.own.pairs_J
        first_row_R = num_own + np.cumsum(part.rows_in) - np.array(part.rows_in, np.int64)
        first_row_R[rank] = 0
        return self._by_replica(rows_MD, metadata_N2, pairs_RJ, first_row_R)

    def _by_replica(self, rows_MD: Tensor, metadata_N2: Tensor, pairs_RJ: IntArray, first_row_R: IntArray) -> Received:
        """Bring pairs from the order of their sources into that of the local replicas, and number their rows.

        Args:
            rows_MD: rows of all sources.
            metadata_N2: of the pairs, by source and local replica; rows are numbered within their source.
            pairs_RJ: pairs of each source and local replica.
            first_row_R: where the rows of each source begin.
        """
        device = metadata_N2.device
        blocks_JR = np.arange(pairs_RJ.size).reshape(pairs_RJ.shape).T
        metadata_N2 = metadata_N2[block_order(pairs_RJ.ravel(), blocks_JR.ravel(), device)]
        first_row_N = repeat(np.tile(first_row_R, pairs_RJ.shape[1]), pairs_RJ.T.ravel(), device)
        return self._received(rows_MD, metadata_N2[:, 0] + first_row_N, metadata_N2[:, 1], pairs_RJ.sum(axis=0))

    def _received(self, rows_MD: Tensor, row_N: Tensor, weight_bits_N: Tensor, pairs_J: IntArray) -> Received:
        weight_N = weight_bits_N.contiguous().view(torch.float32)
        return Received(rows_MD, row_N, weight_N, self.experts, (0, *np.cumsum(pairs_J).tolist()))

    def _start(self, part: Part, buffer: int) -> Arrival:
        return self._start_into(part, self._buffer(buffer, sum(part.rows_in)))

    def _start_into(self, part: Part, out: Tensor) -> Arrival:
        rows = self.hidden_TD.index_select(0, part.tokens)  # on a CPU several times as fast as by brackets
        return self.group.start_all_to_all(rows, part.rows_out, part.rows_in, out)

    def _buffer(self, number: int, num_rows: int) -> Tensor:
        return self.group.receive_buffers.take(number, num_rows, self.hidden_TD.shape[1], self.hidden_TD.dtype)


class Combine:
    """The way back of one dispatch: `send_back` the sums of every `Received`, in their order; then take `output`."""

    def __init__(self, handle: DispatchHandle) -> None:
        self._handle = handle
        self._own_MD: Tensor | None = None  # fp32 sums of this rank's own rows
        self._num_sent = 0  # parts whose sums are on their way or there
        self._returning: Arrival | None = None
        self._returned: list[Tensor] = []  # sums that the other ranks made of this one's rows, part by part

    def send_back(self, partial_MD: Tensor) -> None:
        """Return sums to where their rows came from.

        Args:
            partial_MD: [M, D] fp32, for each row of the next `Received` the weighted sum over this rank's replicas.
        """
        handle = self._handle
        if self._own_MD is None:
            num_own = len(handle.hidden_TD)
            self._own_MD, partial_MD = partial_MD[:num_own], partial_MD[num_own:]
            if handle.overlaps or not handle.parts:
                return
        part = handle.parts[self._num_sent]
        self._num_sent += 1
        self._wait()  # at most one part's sums are under way: their memory is bounded
        sums_MD = partial_MD.to(handle.hidden_TD.dtype)
        self._returning = handle.group.start_all_to_all(sums_MD, part.rows_in, part.rows_out)
        if not handle.overlaps:
            self._wait()

    def output(self) -> Tensor:
        """Add all sums up: out_TD [T, D] in the rows' dtype.

        Sums are fp32, in the order of the ranks after this rank's own part, so that the same inputs give the same bits.
        """
        self._wait()
        parts, hidden_TD = self._handle.parts, self._handle.hidden_TD
        assert self._own_MD is not None
        assert self._num_sent == len(parts)
        out_TD = self._own_MD
        # The parts of one rank, then those of the next. Within one call tokens are distinct, apart from zeros in slots
        # without a row, so that no two additions meet and their order is fixed.
        sums_by_part = [
            list(zip(torch.split(part.tokens, part.rows_out), torch.split(sums_MD, part.rows_out), strict=True))
            for part, sums_MD in zip(parts, self._returned, strict=True)
        ]
        for sums_of_rank in zip(*sums_by_part, strict=True):
            for tokens, sums_MD in sums_of_rank:
                if len(tokens):
                    out_TD.index_add_(0, tokens, sums_MD.float())
        return out_TD.to(hidden_TD.dtype, copy=True)

    def _wait(self) -> None:
        if self._returning is not None:
            self._returned.append(self._returning.wait())
            self._returning = None
