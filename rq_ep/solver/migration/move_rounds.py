"""Rounds of moves for a group that goes on serving: what arrives together, and what is dropped when it serves.

In a round a rank sends at most one expert to another rank and receives at most one. What has arrived serves from a
common step on, and replicas are dropped at that step, as many as the bytes ask for. So every rank holds what it may,
and one round's arrivals at most besides; and every step finds a replica of every expert, all of them in one format.

Without other constraints the rounds are as few as there can be: as many as the busiest rank sends or receives, because
every round serves all ranks that are that busy (Koenig, Ueber Graphen und ihre Anwendung, Math. Annalen 77, 1916: the
edges of a bipartite graph need as many colours as its largest degree).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.moves import DROP, RECEIVE, Held, LayerMoves, Move, Moves, byte_limits
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica, replica_bytes

MAX_TRIED = 16  # replicas of a full rank that might depart for one that arrives


class Expert(NamedTuple):
    """An expert of the layer at a position."""

    layer: int
    expert: int


class Slot(NamedTuple):
    """Where a replica lies: the position of its layer, its rank, its expert."""

    layer: int
    rank: int
    expert: int

    @property
    def of(self) -> Expert:
        return Expert(self.layer, self.expert)


class MoveRound(NamedTuple):
    """Replicas that arrive together, and those that are dropped when they serve; with positions of layers."""

    receives: tuple[tuple[int, Move], ...]
    drops: tuple[tuple[int, Move], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Positions of the layers that change, ascending."""
        return tuple(sorted({layer for layer, _ in (*self.receives, *self.drops)}))

    def received_bytes_R(self, num_ranks: int, expert_bytes: Mapping[str, int]) -> IntArray:
        """[R] bytes that reach each rank from another one or from the checkpoint."""
        moves = [LayerMoves(layer, (move,)) for layer, move in self.receives]
        return Moves(num_ranks, 0, tuple(moves)).received_bytes_R(expert_bytes)

    def applied_to(self, layers: Sequence[LayerPlacement]) -> list[LayerPlacement]:
        """The layers after the round; replicas of an expert share its pairs evenly where the layer has changed."""
        stored = {layer: _stored(layers[layer].replicas) for layer in self.layers}
        for layer, move in (*self.receives, *self.drops):
            if move.do == RECEIVE:
                stored[layer][move.rank, move.expert] = move.format
            else:
                del stored[layer][move.rank, move.expert]
        result = list(layers)
        for layer, formats in stored.items():
            old = layers[layer]
            replicas = [Replica(rank, expert, name) for (rank, expert), name in formats.items()]
            result[layer] = LayerPlacement.even(old.index, old.num_experts, replicas)
        return result


# What a replica of the goal is worth: those of most value for a byte come first.
ReplicaValue = Callable[[int, Replica], float]


def move_rounds(
    before: Held,
    after: Placement,
    expert_bytes: Mapping[str, int],
    native_format: str,
    room_bytes: int,
    value: ReplicaValue = lambda layer, replica: 0.0,
) -> list[MoveRound]:
    """The rounds that lead from `before` to `after`.

    Args:
        before: replicas of each layer of `after`, at least one of every expert, on the same ranks; those of an expert
            share a format, before and after.
        after: the goal.
        expert_bytes: format -> bytes of one expert.
        native_format: the one from which every other is made.
        room_bytes: by which a rank may exceed its limit (its budget, or what it holds before or after) while something
            arrives.
        value: of a replica at a position of a layer.

    Raises:
        UserError: there is too little room; the message says how much would do for the next round.
    """
    return list(_Migration(before, after, expert_bytes, native_format, room_bytes, value).rounds())


def _stored(replicas: Iterable[Replica]) -> dict[tuple[int, int], str]:
    return {(one.rank, one.expert): one.format for one in replicas}


@dataclass(frozen=True)
class _Arrivals:
    """Replicas that are to arrive together, and what that does to the bytes of each rank."""

    arriving_R: IntArray
    freed_R: IntArray  # that could be dropped, or are replaced, when they serve
    moves: Mapping[Slot, Move] = field(default_factory=dict)
    senders: frozenset[int | None] = frozenset()
    receivers: frozenset[int] = frozenset()


class _Migration:
    """What ranks hold between two rounds, and what is left to do."""

    def __init__(
        self,
        before: Held,
        after: Placement,
        expert_bytes: Mapping[str, int],
        native_format: str,
        room_bytes: int,
        value: ReplicaValue,
    ) -> None:
        self._bytes, self._native, self._room = expert_bytes, native_format, room_bytes
        self._num_ranks, self._nodes_R = after.topology.num_ranks, after.topology.nodes_R
        self._stored = {Slot(i, *key): name for i, row in enumerate(before) for key, name in _stored(row).items()}
        target = [_stored(layer.replicas) for layer in after.layers]
        self._target = {Slot(i, *key): name for i, row in enumerate(target) for key, name in row.items()}
        self._holders: dict[Expert, set[int]] = {}
        for slot in self._stored:
            self._holders.setdefault(slot.of, set()).add(slot.rank)
        self._homes: dict[Expert, set[int]] = {}  # ranks that hold an expert in the end
        for slot in self._target:
            self._homes.setdefault(slot.of, set()).add(slot.rank)
        goal_formats = {slot.of: name for slot, name in self._target.items()}
        self._new_format = {  # of experts that change theirs
            slot.of: goal_formats[slot.of] for slot, name in self._stored.items() if name != goal_formats[slot.of]
        }
        self._missing = self._target.keys() - self._stored.keys()
        self._surplus = self._stored.keys() - self._target.keys()
        per_byte = {
            slot: value(slot.layer, Replica(slot.rank, slot.expert, self._target[slot])) / expert_bytes[name]
            for slot, name in self._target.items()
        }
        self._order = sorted(self._missing, key=lambda slot: (-per_byte[slot], slot))  # of what is missing
        self._sources: dict[Slot, int] = {}  # the ranks that send what is missing, as far as they are chosen
        self._num_sent: Counter[int] = Counter()
        self._bytes_R = sum((replica_bytes(row, self._num_ranks, expert_bytes) for row in before), start=_none(after))
        self._limit_R = byte_limits(self._bytes_R, after)

    def rounds(self) -> Iterator[MoveRound]:
        """Round after round, until the goal is reached."""
        while self._new_format or self._missing:
            self._order = [slot for slot in self._order if slot in self._missing]
            pending = [slot for slot in self._order if slot.of not in self._new_format]
            spare_R = self._bytes_of(slot for slot in self._surplus if self._is_spare(slot))
            arrivals = self._with_changes_of_format(_Arrivals(np.zeros_like(spare_R), spare_R))
            arrivals = self._with_exchanges(self._with_additions(arrivals, pending), pending)
            arrivals = arrivals if arrivals.moves else self._with_one_in_the_room(arrivals, pending)
            if not arrivals.moves:
                raise UserError(
                    f"--rebalance-room {self._room}: too little for any of {len(self._missing)} replicas to arrive; "
                    f"raise it to {max(self._bytes.values())} bytes or a multiple of that"
                )
            yield self._commit(arrivals.moves)
        if self._surplus:
            yield MoveRound((), tuple(self._drop(slot) for slot in sorted(self._surplus)))

    def _commit(self, moves: Mapping[Slot, Move]) -> MoveRound:
        """Let replicas serve; drop those in a former format of their expert, and as many as exceed the bytes."""
        for slot, move in moves.items():
            self._bytes_R[slot.rank] += self._bytes[move.format] - self._bytes.get(self._stored.get(slot, ""), 0)
            self._stored[slot] = move.format
            self._holders[slot.of].add(slot.rank)
            self._missing.discard(slot)
            self._new_format.pop(slot.of, None)
        stale = {
            Slot(slot.layer, rank, slot.expert)
            for slot, move in moves.items()
            for rank in self._holders[slot.of]
            if self._stored[Slot(slot.layer, rank, slot.expert)] != move.format
        }
        drops = [self._drop(slot) for slot in sorted(stale)]
        for slot in sorted(self._surplus):
            if self._bytes_R[slot.rank] > self._limit_R[slot.rank] and self._is_spare(slot):
                drops.append(self._drop(slot))
        return MoveRound(tuple((slot.layer, move) for slot, move in sorted(moves.items())), tuple(drops))

    def _drop(self, slot: Slot) -> tuple[int, Move]:
        name = self._stored.pop(slot)
        self._bytes_R[slot.rank] -= self._bytes[name]
        self._holders[slot.of].remove(slot.rank)
        self._surplus.discard(slot)
        if slot in self._target:  # it comes again in the new format
            self._missing.add(slot)
            self._order.append(slot)
        return slot.layer, Move(DROP, slot.rank, slot.expert, name)

    def _is_spare(self, slot: Slot) -> bool:
        """Whether a surplus replica may go: a rank holds its expert that does so in the end."""
        return bool(self._holders[slot.of] & self._homes[slot.of])

    def _with_changes_of_format(self, arrivals: _Arrivals) -> _Arrivals:
        """Experts that change their format, on all ranks at once that keep them; smallest formats first."""
        for of in sorted(self._new_format, key=lambda of: (self._bytes[self._new_format[of]], of)):
            homes = self._homes[of]
            slots = [Slot(of.layer, rank, of.expert) for rank in sorted(homes & self._holders[of]) or [min(homes)]]
            moves = {slot: self._receive(slot, self._source_of(slot)) for slot in slots}
            arrivals = self._if_it_fits(arrivals, self._joined(arrivals, moves))
        return arrivals

    def _with_additions(self, arrivals: _Arrivals, pending: Sequence[Slot]) -> _Arrivals:
        """New replicas where bytes are free: at most one for each rank that sends and each that receives."""
        while pending and (matched := self._matched(pending, arrivals)):
            for slot, move in matched.items():
                arrivals = self._if_it_fits(arrivals, self._joined(arrivals, {slot: move}))
            pending = [slot for slot in pending if slot not in matched and slot.rank not in arrivals.receivers]
        return arrivals

    def _with_exchanges(self, arrivals: _Arrivals, pending: Sequence[Slot]) -> _Arrivals:
        """New replicas on full ranks, which give up what arrives elsewhere at the same time."""
        departing: dict[int, list[Slot]] = {}  # rank -> replicas whose arrival frees bytes there
        for slot in pending:
            for rank in self._holders[slot.of] - self._homes[slot.of]:
                departing.setdefault(rank, []).append(slot)
        num_tried: Counter[int] = Counter()
        for slot in pending:
            if slot.rank not in arrivals.receivers and num_tried[slot.rank] < MAX_TRIED:
                num_tried[slot.rank] += 1
                arrivals = self._exchanged(arrivals, slot, departing) or arrivals
        return arrivals

    def _exchanged(self, arrivals: _Arrivals, slot: Slot, departing: Mapping[int, Sequence[Slot]]) -> _Arrivals | None:
        """With this replica, and with others whose arrival elsewhere makes room for it; None if there are none."""
        source = self._source_of(slot)
        if slot in arrivals.moves or slot.rank in arrivals.receivers or source in arrivals.senders:
            return None
        arrivals = self._joined(arrivals, {slot: self._receive(slot, source)})
        if arrivals.arriving_R[slot.rank] + self._bytes_R[slot.rank] > self._limit_R[slot.rank] + self._room:
            return None
        for other in departing.get(slot.rank, ())[:MAX_TRIED]:
            if self._exceeds_R(arrivals)[slot.rank] <= 0:
                break
            arrivals = self._exchanged(arrivals, other, departing) or arrivals
        return arrivals if self._exceeds_R(arrivals)[slot.rank] <= 0 else None

    def _with_one_in_the_room(self, arrivals: _Arrivals, pending: Sequence[Slot]) -> _Arrivals:
        """With the replica that takes least of the room for longer than a round: sizes do not match exactly."""
        options: list[tuple[int, int, _Arrivals]] = []
        for slot in pending:
            more = self._joined(arrivals, {slot: self._receive(slot, self._source_of(slot))})
            if self._bytes_R[slot.rank] + more.arriving_R[slot.rank] <= self._limit_R[slot.rank] + self._room:
                options.append((int(self._exceeds_R(more)[slot.rank]), len(options), more))
        return min(options)[2] if options else arrivals

    def _matched(self, pending: Sequence[Slot], arrivals: _Arrivals) -> dict[Slot, Move]:
        """Additions, one for each rank that neither sends nor receives yet; the busiest ranks are all served."""
        num_sent, num_received = Counter[int](), Counter[int]()
        best: dict[tuple[int, int], tuple[int, Slot]] = {}
        for place, slot in enumerate(pending):
            source = self._source_of(slot)
            assert source is not None, f"no rank holds expert {slot.expert} any more"
            num_sent[source] += 1
            num_received[slot.rank] += 1
            best.setdefault((source, slot.rank), (place, slot))
        most = max(*num_sent.values(), *num_received.values(), 1)
        weight_RR = np.zeros((self._num_ranks, self._num_ranks))
        for (source, rank), (place, _) in best.items():
            if source not in arrivals.senders and rank not in arrivals.receivers:
                num_critical = (num_sent[source] == most) + (num_received[rank] == most)
                weight_RR[source, rank] = num_critical * 2 * self._num_ranks + 2 - place / len(pending)
        pairs = [pair for pair in zip(*linear_sum_assignment(weight_RR, maximize=True), strict=True) if weight_RR[pair]]
        return {best[pair][1]: self._receive(best[pair][1], int(pair[0])) for pair in sorted(pairs)}

    def _receive(self, slot: Slot, source: int | None) -> Move:
        return Move(RECEIVE, slot.rank, slot.expert, self._target[slot], source)

    def _source_of(self, slot: Slot) -> int | None:
        """The rank that sends: itself, or one on its node, or the least busy; None: the checkpoint.

        A choice stays as long as the rank can send.
        """
        if self._sources.get(slot) in self._holders[slot.of]:
            return self._sources[slot]
        able = (self._target[slot], self._native)
        holders = [rank for rank in self._holders[slot.of] if self._stored[Slot(slot.layer, rank, slot.expert)] in able]
        if not holders:
            return None
        node = self._nodes_R[slot.rank]
        source = min(
            holders,
            key=lambda rank: (rank != slot.rank, self._nodes_R[rank] != node, self._num_sent[rank], rank),
        )
        if slot.of not in self._new_format:  # the holders of one that changes its format will be others
            self._sources[slot] = source
            self._num_sent[source] += 1
        return source

    def _joined(self, arrivals: _Arrivals, moves: Mapping[Slot, Move]) -> _Arrivals:
        """With these moves. What a rank of another layout holds of their experts can be dropped when they serve."""
        arriving_R = replica_bytes(
            [Replica(move.rank, move.expert, move.format) for move in moves.values()], self._num_ranks, self._bytes
        )
        freed = [slot for slot in moves if slot in self._stored]
        for of in {slot.of for slot in moves} - {slot.of for slot in arrivals.moves}:
            if not self._holders[of] & self._homes[of]:
                freed += [Slot(of.layer, rank, of.expert) for rank in self._holders[of]]
        return _Arrivals(
            arrivals.arriving_R + arriving_R,
            arrivals.freed_R + self._bytes_of(freed),
            {**arrivals.moves, **moves},
            arrivals.senders.union(move.source for move in moves.values() if move.source != move.rank),
            arrivals.receivers.union(move.rank for move in moves.values() if move.source != move.rank),
        )

    def _if_it_fits(self, arrivals: _Arrivals, more: _Arrivals) -> _Arrivals:
        """`more`, if that can arrive inside the room and serve inside the limits; else `arrivals`."""
        over_R = self._bytes_R + more.arriving_R - self._limit_R - self._room
        touched_R = more.arriving_R > arrivals.arriving_R
        if (over_R[touched_R] > 0).any() or (self._exceeds_R(more)[touched_R] > 0).any():
            return arrivals
        return more

    def _exceeds_R(self, arrivals: _Arrivals) -> IntArray:
        """[R] bytes above the limit when these serve, and all is dropped that then may be."""
        exceeds_R: IntArray = self._bytes_R + arrivals.arriving_R - arrivals.freed_R - self._limit_R
        return exceeds_R

    def _bytes_of(self, slots: Iterable[Slot]) -> IntArray:
        """[R] bytes of stored replicas."""
        held = [Replica(slot.rank, slot.expert, self._stored[slot]) for slot in slots]
        return replica_bytes(held, self._num_ranks, self._bytes)


def _none(placement: Placement) -> IntArray:
    return np.zeros(placement.topology.num_ranks, np.int64)
