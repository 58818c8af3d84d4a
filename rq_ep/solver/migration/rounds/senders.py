"""Which rank sends an expert that another one is to receive."""

from collections import Counter
from collections.abc import Sequence

from rq_ep.solver.migration.rounds.arrivals import Slot
from rq_ep.solver.migration.rounds.holdings import Holdings


class Senders:
    """The ranks that send what is missing, as far as they are chosen.

    Args:
        held: what ranks hold, as the rounds go on.
        nodes_R: node of each rank.
        native_format: the one from which every other is made.
    """

    def __init__(self, held: Holdings, nodes_R: Sequence[int], native_format: str) -> None:
        self._held, self._nodes_R, self._native = held, nodes_R, native_format
        self._chosen: dict[Slot, int] = {}
        self._num_sent: Counter[int] = Counter()

    def of(self, slot: Slot) -> int | None:
        """The rank that sends: itself, or one on its node, or the least busy; None: the checkpoint.

        A choice stays as long as the rank can send.
        """
        able = (self._held.target[slot], self._native)
        chosen = self._chosen.get(slot)
        if chosen is not None and self._held.stored.get(Slot(slot.of, chosen)) in able:
            return chosen
        holders = [rank for rank in self._held.holders[slot.of] if self._held.stored[Slot(slot.of, rank)] in able]
        if not holders:
            return None
        node = self._nodes_R[slot.rank]
        source = min(
            holders,
            key=lambda rank: (rank != slot.rank, self._nodes_R[rank] != node, self._num_sent[rank], rank),
        )
        if slot.of not in self._held.new_format:  # the holders of one that changes its format will be others
            self._chosen[slot] = source
            self._num_sent[source] += 1
        return source
