"""What goes into the next round: format changes, then what is missing, in the order of its value.

Rounds are as few as the busiest rank needs because each is a matching that serves all ranks that are that busy.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from rq_ep.core.moves import RECEIVE, Move
from rq_ep.core.replicas import Replica
from rq_ep.solver.migration.rounds.arrivals import Arrivals, JointMoves, Slot
from rq_ep.solver.migration.rounds.format_changes import FormatChange, FormatChanges
from rq_ep.solver.migration.rounds.holdings import Holdings
from rq_ep.solver.migration.rounds.senders import Senders

MAX_TRIED = 16  # replicas of a full rank that might depart for one that arrives

# What a replica of the goal is worth, at a position of a layer: those of most value for a byte come first.
ReplicaValue = Callable[[int, Replica], float]


class RoundFilling:
    """The choice of what arrives in a round, from what the others say of all rounds before.

    Args:
        held: what ranks hold, and what is missing.
        changes: the format changes that are left.
        senders: who sends what is missing.
        value: of a replica that is missing.
    """

    def __init__(self, held: Holdings, changes: FormatChanges, senders: Senders, value: ReplicaValue) -> None:
        self._held, self._changes, self._senders = held, changes, senders
        per_byte = {
            slot: value(slot.of.layer, Replica(slot.rank, slot.of.expert, name)) / held.expert_bytes[name]
            for slot in held.missing
            for name in (held.target[slot],)
        }
        self._order = sorted(per_byte, key=lambda slot: (-per_byte[slot], slot))

    def next_moves(self, room_bytes: int) -> Mapping[Slot, Move]:
        """What arrives in the next round; nothing, if the room is too little for anything.

        Args:
            room_bytes: by which a rank may exceed its limit while something arrives.
        """
        self._order = [slot for slot in self._order if slot in self._held.missing]
        pending = [slot for slot in self._order if slot.of not in self._changes]
        left_R = self._held.left_R
        arrivals = Arrivals(
            [left + room_bytes for left in left_R],
            [left + spare for left, spare in zip(left_R, self._held.spare_R, strict=True)],
            self._changes.low_pairs_left,
            self._held.expert_bytes,
        )
        self._change_formats(arrivals, (change for change in self._changes if change.frees))
        self._add(arrivals, pending)
        self._exchange(arrivals, pending)
        self._change_formats(arrivals, (change for change in self._changes if not change.frees))
        if not arrivals.moves:
            self._use_room(arrivals, pending)
        return arrivals.moves

    def _change_formats(self, arrivals: Arrivals, changes: Iterable[FormatChange]) -> None:
        """Experts that change their format; those that fetch it do so where nothing else arrives."""
        for change in changes:
            if change.added_low > max(arrivals.low_pairs, 0):
                continue
            if any(arrivals.staging_R[rank] < change.size for rank in change.ranks):
                continue
            if change.frees or arrivals.receivers.isdisjoint(change.ranks):
                moves = self._changing(change)
                if arrivals.are_free(moves.values()):
                    self._add_if_it_fits(arrivals, moves)

    def _changing(self, change: FormatChange) -> dict[Slot, Move]:
        slots = [Slot(change.of, rank) for rank in change.ranks]
        return {slot: self._receive(slot, self._senders.of(slot)) for slot in slots}

    def _add(self, arrivals: Arrivals, pending: Sequence[Slot]) -> None:
        """New replicas where bytes are free; the ranks that have most left to send or to receive are all served."""
        from scipy.optimize import linear_sum_assignment  # here, as it takes as long as all of NumPy

        sources = {slot: self._senders.of(slot) for slot in pending}
        num_sent = Counter(sources.values())
        del num_sent[None]  # the checkpoint is never busy
        num_received = Counter(slot.rank for slot in pending)
        most = max([*num_sent.values(), *num_received.values()], default=0)
        num_ranks = len(arrivals.staging_R)
        while True:
            pending = [
                slot
                for slot in pending
                if slot not in arrivals.moves
                and slot.rank not in arrivals.receivers
                and sources[slot] not in arrivals.senders
            ]
            first: dict[tuple[int, int], tuple[int, Slot]] = {}  # of each pair of ranks
            for place, slot in enumerate(pending):
                size, source = self._held.expert_bytes[self._held.target[slot]], sources[slot]
                if size <= arrivals.staging_R[slot.rank] and size <= arrivals.serving_R[slot.rank]:
                    # Each rank has a checkpoint of its own to read from.
                    first.setdefault((num_ranks + slot.rank if source is None else source, slot.rank), (place, slot))
            if not first:
                return
            weight_RR = np.zeros((2 * num_ranks, num_ranks))
            for (source, rank), (place, slot) in first.items():
                num_critical = (num_sent.get(sources[slot], 0) == most) + (num_received[rank] == most)
                weight_RR[source, rank] = num_critical * 2 * num_ranks + 2 - place / len(pending)
            for pair in zip(*(axis.tolist() for axis in linear_sum_assignment(weight_RR, maximize=True)), strict=True):
                if pair in first:
                    slot = first[pair][1]
                    arrivals.add(self._joint(arrivals, {slot: self._receive(slot, sources[slot])}))

    def _exchange(self, arrivals: Arrivals, pending: Sequence[Slot]) -> None:
        """New replicas on full ranks, which give up what arrives elsewhere at the same time."""
        departing: dict[int, list[Slot]] = {}  # rank -> replicas whose arrival frees bytes there
        for slot in pending:
            for rank in self._held.holders[slot.of] - self._held.homes[slot.of]:
                departing.setdefault(rank, []).append(slot)
        num_tried: Counter[int] = Counter()
        for slot in pending:
            if slot.rank not in arrivals.receivers and num_tried[slot.rank] < MAX_TRIED:
                num_tried[slot.rank] += 1
                self._exchange_one(arrivals, slot, departing)

    def _exchange_one(self, arrivals: Arrivals, slot: Slot, departing: Mapping[int, Sequence[Slot]]) -> None:
        """Add this replica, and others whose arrival elsewhere makes room for it; none if there are too few."""
        move = self._receive(slot, self._senders.of(slot))
        if slot in arrivals.moves or not arrivals.are_free([move]):  # one that its own rank converts takes up no rank
            return
        length = len(arrivals)
        arrivals.add(self._joint(arrivals, {slot: move}))
        if arrivals.is_staged([slot.rank]):
            for other in departing.get(slot.rank, ())[:MAX_TRIED]:
                if arrivals.serves([slot.rank]):
                    break
                self._exchange_one(arrivals, other, departing)
        if not (arrivals.is_staged([slot.rank]) and arrivals.serves([slot.rank])):
            arrivals.take_back(length)

    def _use_room(self, arrivals: Arrivals, pending: Sequence[Slot]) -> None:
        """Add what takes least of the room for longer than a round: sizes do not match exactly, or more bits come."""
        options: list[tuple[int, int, JointMoves]] = []
        changes = [change for change in self._changes if change.added_low <= max(arrivals.low_pairs, 0)]
        additions = ({slot: self._receive(slot, self._senders.of(slot))} for slot in pending)
        for moves in (*map(self._changing, changes), *additions):
            joint = self._joint(arrivals, moves)
            ranks = [slot.rank for slot in moves]
            arrivals.add(joint)
            if arrivals.is_staged(ranks):
                options.append((-min(arrivals.serving_R[rank] for rank in ranks), len(options), joint))
            arrivals.take_back(0)
        if options:
            arrivals.add(min(options)[2])

    def _add_if_it_fits(self, arrivals: Arrivals, moves: Mapping[Slot, Move]) -> None:
        length, ranks = len(arrivals), [slot.rank for slot in moves]
        arrivals.add(self._joint(arrivals, moves))
        if not (arrivals.is_staged(ranks) and arrivals.serves(ranks)):
            arrivals.take_back(length)

    def _joint(self, arrivals: Arrivals, moves: Mapping[Slot, Move]) -> JointMoves:
        """These moves of one expert, and what a rank of another layout holds of it that can be dropped then."""
        (of,) = {slot.of for slot in moves}
        freed = self._held.freed_by(moves, is_first=not arrivals.experts[of])
        return JointMoves(moves, freed, self._changes.added_low(of))

    def _receive(self, slot: Slot, source: int | None) -> Move:
        return Move(RECEIVE, slot.rank, slot.of.expert, self._held.target[slot], source)
