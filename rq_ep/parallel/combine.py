"""Combine: partial sums travel back to the ranks that their rows came from, and are added up there."""

import torch
from torch import Tensor

from rq_ep.parallel.dispatch_handle import DispatchHandle
from rq_ep.parallel.ep_group import Arrival


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
