"""Rounds of moves for a group that goes on serving: what arrives together, and what is dropped when it serves.

In a round a rank sends at most one expert to another rank and receives at most one. What has arrived serves from a
common step on, and replicas are dropped at that step, as many as the bytes ask for. So every rank holds what it may,
and one round's arrivals at most besides; every step finds a replica of every expert, all of them in one format; and the
cap on low pairs holds at every step, where it does at first.

Without other constraints the rounds are as few as there can be: as many as the busiest rank sends or receives, because
every round serves all ranks that are that busy (Koenig, Ueber Graphen und ihre Anwendung, Math. Annalen 77, 1916: the
edges of a bipartite graph need as many colours as its largest degree).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
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
    """Where a replica lies."""

    of: Expert
    rank: int


class LowCap(NamedTuple):
    """A limit of the pairs that are computed in another format than the native one."""

    pairs_LE: IntArray
    max_pairs: float


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

    def applied_to(self, layers: Sequence[LayerPlacement], goal: Placement | None = None) -> list[LayerPlacement]:
        """The layers after the round.

        A layer that has reached the goal takes its shares. In others that have changed, replicas of an expert share
        its pairs evenly.
        """
        stored = {layer: _stored(layers[layer].replicas) for layer in self.layers}
        for layer, move in (*self.receives, *self.drops):
            if move.do == RECEIVE:
                stored[layer][move.rank, move.expert] = move.format
            else:
                del stored[layer][move.rank, move.expert]
        result = list(layers)
        for layer, formats in stored.items():
            if goal is not None and formats == _stored(goal.layers[layer].replicas):
                result[layer] = goal.layers[layer]
                continue
            old = layers[layer]
            replicas = [Replica(rank, expert, name) for (rank, expert), name in formats.items()]
            result[layer] = LayerPlacement.even(old.index, old.num_experts, replicas, old.replicas.mixed_formats)
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
    low_cap: LowCap | None = None,
) -> list[MoveRound]:
    """The rounds that lead from `before` to `after`.

    Args:
        before: replicas of each layer of `after`, on the same ranks. An expert that has none is read from the
            checkpoint. Those of an expert share a format, before and after, where the layer does not mix formats.
        after: the goal.
        expert_bytes: format -> bytes of one expert.
        native_format: the one from which every other is made.
        room_bytes: by which a rank may exceed its limit (its budget, or what it holds before or after) while something
            arrives.
        value: of a replica at a position of a layer.
        low_cap: holds after every round; a cap that does not hold before, or after, is not exceeded further.

    Raises:
        UserError: there is too little room; the message says how much would do for the next round.
    """
    return list(_Migration(before, after, expert_bytes, native_format, room_bytes, value, low_cap).rounds())


def with_early_drops(rounds: Sequence[MoveRound]) -> list[MoveRound]:
    """The rounds for a strategy that serves one replica of each expert: it is dropped once another one has arrived.

    Args:
        rounds: in which an expert arrives once at most.
    """
    arrivals = {(layer, move.expert): at for at, one in enumerate(rounds) for layer, move in one.receives}
    drops: list[list[tuple[int, Move]]] = [[] for _ in rounds]
    for at, one in enumerate(rounds):
        for layer, move in one.drops:
            drops[min(at, arrivals.get((layer, move.expert), at))].append((layer, move))
    early = [MoveRound(one.receives, tuple(dropped)) for one, dropped in zip(rounds, drops, strict=True)]
    return [one for one in early if one.receives or one.drops]


def _stored(replicas: Iterable[Replica]) -> dict[tuple[int, int], str]:
    return {(one.rank, one.expert): one.format for one in replicas}


class _Addition(NamedTuple):
    """Replicas that joined a round together."""

    moves: Mapping[Slot, Move]
    freed: Sequence[tuple[int, int]]  # rank and bytes that could be dropped, or are replaced, when they serve
    low_pairs: int  # more than before


class _Arrivals:
    """Replicas that are to arrive together.

    Args:
        staging_R: bytes of each rank that may still arrive.
        serving_R: those that may still serve, when all is dropped that then may be.
        low_pairs: that may still be computed in few bits.
        expert_bytes: format -> bytes of one expert.
    """

    def __init__(
        self, staging_R: list[int], serving_R: list[int], low_pairs: float, expert_bytes: Mapping[str, int]
    ) -> None:
        self.staging_R, self.serving_R, self.low_pairs = staging_R, serving_R, low_pairs
        self._bytes = expert_bytes
        self._additions: list[_Addition] = []
        self.moves: dict[Slot, Move] = {}
        self.experts: Counter[Expert] = Counter()
        self.senders: set[int] = set()
        self.receivers: set[int] = set()  # from another rank, or from the checkpoint

    def __len__(self) -> int:
        """How many additions were made."""
        return len(self._additions)

    def are_free(self, moves: Iterable[Move]) -> bool:
        """Whether the ranks that these moves connect neither send nor receive anything else."""
        return not any(
            move.source != move.rank and (move.rank in self.receivers or move.source in self.senders) for move in moves
        )

    def is_staged(self, ranks: Iterable[int]) -> bool:
        """Whether what arrives on these ranks finds bytes."""
        return all(self.staging_R[rank] >= 0 for rank in ranks)

    def serves(self, ranks: Iterable[int]) -> bool:
        """Whether what arrives on these ranks can serve inside their limits."""
        return all(self.serving_R[rank] >= 0 for rank in ranks)

    def add(self, addition: _Addition) -> None:
        """Let these arrive as well; each rank sends one replica to others at most, and receives one from them."""
        self._additions.append(addition)
        self._count(addition, 1)
        self.moves |= addition.moves
        for move in addition.moves.values():
            if move.source != move.rank:
                self.receivers.add(move.rank)
                if move.source is not None:
                    self.senders.add(move.source)

    def take_back(self, length: int) -> None:
        """Take back the last additions; `length` of them stay."""
        while len(self._additions) > length:
            addition = self._additions.pop()
            self._count(addition, -1)
            for slot, move in addition.moves.items():
                del self.moves[slot]
                if move.source != move.rank:
                    self.receivers.remove(move.rank)
                    if move.source is not None:
                        self.senders.remove(move.source)

    def _count(self, addition: _Addition, sign: int) -> None:
        for slot, move in addition.moves.items():
            self.staging_R[slot.rank] -= sign * self._bytes[move.format]
            self.serving_R[slot.rank] -= sign * self._bytes[move.format]
            self.experts[slot.of] += sign
        for rank, size in addition.freed:
            self.serving_R[rank] += sign * size
        self.low_pairs -= sign * addition.low_pairs


class _FormatChange(NamedTuple):
    """An expert that is to be stored in another format, on all ranks at once that keep it."""

    of: Expert
    added_low: int  # low pairs; negative where it becomes native
    size: int  # bytes of a replica in the new format
    ranks: tuple[int, ...]  # that hold it before and in the end, or one that holds it in the end
    frees: bool  # whether it frees bytes; then the ranks convert what they hold


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
        low_cap: LowCap | None,
    ) -> None:
        self._bytes, self._native, self._room = expert_bytes, native_format, room_bytes
        self._num_ranks, self._nodes_R = after.topology.num_ranks, after.topology.nodes_R.tolist()
        self._stored, self._target = _changing(before, [list(layer.replicas) for layer in after.layers])
        self._holders = _ranks(self._stored)
        self._homes = _ranks(self._target)  # ranks that hold an expert in the end
        goals = {slot.of: name for slot, name in self._target.items()}
        self._formats = goals | {slot.of: name for slot, name in self._stored.items()}  # new where no rank holds it
        mixing = _mixing(self._stored) | _mixing(self._target)  # each of their replicas goes its own way
        self._new_format = {
            of: goals[of] for of, name in self._formats.items() if name != goals[of] and of not in mixing
        }
        self._missing = self._target.keys() - self._stored.keys()
        self._missing |= {
            slot for slot, name in self._target.items() if slot.of in mixing and self._stored.get(slot) != name
        }
        self._surplus = self._stored.keys() - self._target.keys()
        per_byte = {
            slot: value(slot.of.layer, Replica(slot.rank, slot.of.expert, name)) / expert_bytes[name]
            for slot in self._missing
            for name in (self._target[slot],)
        }
        self._order = sorted(self._missing, key=lambda slot: (-per_byte[slot], slot))  # of what is missing
        self._sources: dict[Slot, int] = {}  # the ranks that send what is missing, as far as they are chosen
        self._num_sent: Counter[int] = Counter()
        bytes_R = sum((replica_bytes(row, self._num_ranks, expert_bytes) for row in before), start=_none(after))
        self._bytes_R: list[int] = bytes_R.tolist()
        self._limit_R: list[int] = byte_limits(bytes_R, after).tolist()
        self._spare: set[Slot] = set()  # surplus replicas that may go: a rank holds the expert that does so in the end
        self._spare_of: list[list[Slot]] = [[] for _ in self._bytes_R]  # of each rank, as a heap, also after they went
        self._spare_R = [0] * self._num_ranks  # their bytes
        for of, holders in self._holders.items():
            if holders & self._homes[of]:
                self._release(of)
        pairs_LE = np.zeros((len(before), after.layers[0].num_experts), np.int64)
        self._low_pairs, self._max_low = 0, np.inf
        if low_cap is not None:
            pairs_LE = low_cap.pairs_LE
            low = {(i, one.expert) for i, row in enumerate(before) for one in row if one.format != native_format}
            staying = sum(int(pairs_LE[of]) for of in low if of not in self._formats)
            self._low_pairs, low_after = (
                staying + sum(int(pairs_LE[of]) for of, name in names.items() if name != native_format)
                for names in (self._formats, goals)
            )
            self._max_low = max(low_cap.max_pairs, self._low_pairs, low_after)
        changes = [self._format_change(of, int(pairs_LE[of])) for of in self._new_format]
        # More bits for the busiest first, fewer for the least busy.
        self._changes = sorted(changes, key=lambda change: (change.added_low, change.of))
        self._added_low = {change.of: change.added_low for change in changes}

    def _format_change(self, of: Expert, pairs: int) -> _FormatChange:
        old, new = self._formats[of], self._new_format[of]
        ranks = sorted(self._homes[of] & self._holders[of]) or [min(self._homes[of])]
        added_low = pairs * ((new != self._native) - (old != self._native))
        frees = self._bytes[new] < self._bytes[old]
        return _FormatChange(of, added_low, self._bytes[new], tuple(ranks), frees)

    def rounds(self) -> Iterator[MoveRound]:
        """Round after round, until the goal is reached."""
        while self._new_format or self._missing:
            self._order = [slot for slot in self._order if slot in self._missing]
            self._changes = [change for change in self._changes if change.of in self._new_format]
            pending = [slot for slot in self._order if slot.of not in self._new_format]
            left_R = [limit - held for limit, held in zip(self._limit_R, self._bytes_R, strict=True)]
            arrivals = _Arrivals(
                [left + self._room for left in left_R],
                [left + spare for left, spare in zip(left_R, self._spare_R, strict=True)],
                self._max_low - self._low_pairs,
                self._bytes,
            )
            self._change_formats(arrivals, (change for change in self._changes if change.frees))
            self._add(arrivals, pending)
            self._exchange(arrivals, pending)
            self._change_formats(arrivals, (change for change in self._changes if not change.frees))
            if not arrivals.moves:
                self._use_room(arrivals, pending)
            if not arrivals.moves:
                size = max(self._bytes.values())
                raise UserError(
                    f"--rebalance-room {self._room}: too little for any of {len(self._missing)} replicas to arrive; "
                    f"raise it to {(self._room // size + 1) * size} bytes or more"
                )
            yield self._commit(arrivals.moves)
        if self._surplus:
            yield MoveRound((), tuple(self._drop(slot) for slot in sorted(self._surplus)))

    def _commit(self, moves: Mapping[Slot, Move]) -> MoveRound:
        """Let replicas serve; drop those in a former format of their expert, and as many as exceed the bytes."""
        changed = {slot.of for slot in moves if slot.of in self._new_format}
        for of in changed:
            self._low_pairs += self._added_low.pop(of)
            self._formats[of] = self._new_format.pop(of)
        for slot, move in moves.items():
            self._bytes_R[slot.rank] += self._bytes[move.format] - self._bytes.get(self._stored.get(slot, ""), 0)
            self._stored[slot] = move.format
            self._holders[slot.of].add(slot.rank)
            self._missing.discard(slot)
        drops = [
            self._drop(Slot(of, rank))
            for of in sorted(changed)
            for rank in sorted(self._holders[of])
            if self._stored[Slot(of, rank)] != self._formats[of]
        ]
        for of in {slot.of for slot in moves}:
            self._release(of)
        for rank, spare in enumerate(self._spare_of):
            while self._bytes_R[rank] > self._limit_R[rank] and spare:
                if (slot := heappop(spare)) in self._spare:
                    drops.append(self._drop(slot))
        return MoveRound(tuple((slot.of.layer, move) for slot, move in sorted(moves.items())), tuple(drops))

    def _release(self, of: Expert) -> None:
        """Let the surplus replicas of an expert go when bytes ask for it."""
        for rank in self._holders[of] - self._homes[of]:
            if (slot := Slot(of, rank)) not in self._spare:
                self._spare.add(slot)
                heappush(self._spare_of[rank], slot)
                self._spare_R[rank] += self._bytes[self._stored[slot]]

    def _drop(self, slot: Slot) -> tuple[int, Move]:
        name = self._stored.pop(slot)
        self._bytes_R[slot.rank] -= self._bytes[name]
        self._holders[slot.of].remove(slot.rank)
        self._surplus.remove(slot)
        if slot in self._spare:
            self._spare.remove(slot)
            self._spare_R[slot.rank] -= self._bytes[name]
        return slot.of.layer, Move(DROP, slot.rank, slot.of.expert, name)

    def _change_formats(self, arrivals: _Arrivals, changes: Iterable[_FormatChange]) -> None:
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

    def _changing(self, change: _FormatChange) -> dict[Slot, Move]:
        slots = [Slot(change.of, rank) for rank in change.ranks]
        return {slot: self._receive(slot, self._source_of(slot)) for slot in slots}

    def _add(self, arrivals: _Arrivals, pending: Sequence[Slot]) -> None:
        """New replicas where bytes are free; the ranks that have most left to send or to receive are all served."""
        sources = {slot: self._source_of(slot) for slot in pending}
        num_sent = Counter(sources.values())
        del num_sent[None]  # the checkpoint is never busy
        num_received = Counter(slot.rank for slot in pending)
        most = max([*num_sent.values(), *num_received.values()], default=0)
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
                size, source = self._bytes[self._target[slot]], sources[slot]
                if size <= arrivals.staging_R[slot.rank] and size <= arrivals.serving_R[slot.rank]:
                    # Each rank has a checkpoint of its own to read from.
                    first.setdefault(
                        (self._num_ranks + slot.rank if source is None else source, slot.rank), (place, slot)
                    )
            if not first:
                return
            weight_RR = np.zeros((2 * self._num_ranks, self._num_ranks))
            for (source, rank), (place, slot) in first.items():
                num_critical = (num_sent.get(sources[slot], 0) == most) + (num_received[rank] == most)
                weight_RR[source, rank] = num_critical * 2 * self._num_ranks + 2 - place / len(pending)
            for pair in zip(*(axis.tolist() for axis in linear_sum_assignment(weight_RR, maximize=True)), strict=True):
                if pair in first:
                    slot = first[pair][1]
                    arrivals.add(self._addition(arrivals, {slot: self._receive(slot, sources[slot])}))

    def _exchange(self, arrivals: _Arrivals, pending: Sequence[Slot]) -> None:
        """New replicas on full ranks, which give up what arrives elsewhere at the same time."""
        departing: dict[int, list[Slot]] = {}  # rank -> replicas whose arrival frees bytes there
        for slot in pending:
            for rank in self._holders[slot.of] - self._homes[slot.of]:
                departing.setdefault(rank, []).append(slot)
        num_tried: Counter[int] = Counter()
        for slot in pending:
            if slot.rank not in arrivals.receivers and num_tried[slot.rank] < MAX_TRIED:
                num_tried[slot.rank] += 1
                self._exchange_one(arrivals, slot, departing)

    def _exchange_one(self, arrivals: _Arrivals, slot: Slot, departing: Mapping[int, Sequence[Slot]]) -> None:
        """Add this replica, and others whose arrival elsewhere makes room for it; none if there are too few."""
        move = self._receive(slot, self._source_of(slot))
        if not arrivals.are_free([move]):
            return
        length = len(arrivals)
        arrivals.add(self._addition(arrivals, {slot: move}))
        if arrivals.is_staged([slot.rank]):
            for other in departing.get(slot.rank, ())[:MAX_TRIED]:
                if arrivals.serves([slot.rank]):
                    break
                self._exchange_one(arrivals, other, departing)
        if not (arrivals.is_staged([slot.rank]) and arrivals.serves([slot.rank])):
            arrivals.take_back(length)

    def _use_room(self, arrivals: _Arrivals, pending: Sequence[Slot]) -> None:
        """Add what takes least of the room for longer than a round: sizes do not match exactly, or more bits come."""
        options: list[tuple[int, int, _Addition]] = []
        changes = [change for change in self._changes if change.added_low <= max(arrivals.low_pairs, 0)]
        additions = ({slot: self._receive(slot, self._source_of(slot))} for slot in pending)
        for moves in (*map(self._changing, changes), *additions):
            addition = self._addition(arrivals, moves)
            ranks = [slot.rank for slot in moves]
            arrivals.add(addition)
            if arrivals.is_staged(ranks):
                options.append((-min(arrivals.serving_R[rank] for rank in ranks), len(options), addition))
            arrivals.take_back(0)
        if options:
            arrivals.add(min(options)[2])

    def _add_if_it_fits(self, arrivals: _Arrivals, moves: Mapping[Slot, Move]) -> None:
        length, ranks = len(arrivals), [slot.rank for slot in moves]
        arrivals.add(self._addition(arrivals, moves))
        if not (arrivals.is_staged(ranks) and arrivals.serves(ranks)):
            arrivals.take_back(length)

    def _addition(self, arrivals: _Arrivals, moves: Mapping[Slot, Move]) -> _Addition:
        """These moves. What a rank of another layout holds of their experts can be dropped when they serve."""
        freed = [(slot.rank, self._bytes[self._stored[slot]]) for slot in moves if slot in self._stored]
        (of,) = {slot.of for slot in moves}
        if not arrivals.experts[of] and not self._holders[of] & self._homes[of]:
            freed += [(rank, self._bytes[self._stored[Slot(of, rank)]]) for rank in self._holders[of]]
        return _Addition(moves, freed, self._added_low.get(of, 0))

    def _receive(self, slot: Slot, source: int | None) -> Move:
        return Move(RECEIVE, slot.rank, slot.of.expert, self._target[slot], source)

    def _source_of(self, slot: Slot) -> int | None:
        """The rank that sends: itself, or one on its node, or the least busy; None: the checkpoint.

        A choice stays as long as the rank can send.
        """
        able = (self._target[slot], self._native)
        chosen = self._sources.get(slot)
        if chosen is not None and self._stored.get(Slot(slot.of, chosen)) in able:
            return chosen
        holders = [rank for rank in self._holders[slot.of] if self._stored[Slot(slot.of, rank)] in able]
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


def _changing(before: Held, after: Held) -> tuple[dict[Slot, str], dict[Slot, str]]:
    """The format of each replica before and after, of the experts whose replicas change; the others have no part."""
    stored: dict[Slot, str] = {}
    target: dict[Slot, str] = {}
    for layer, rows in enumerate(zip(before, after, strict=True)):
        experts = {expert: Expert(layer, expert) for _, expert, _ in set(rows[0]) ^ set(rows[1])}
        for row, slots in zip(rows, (stored, target), strict=True):
            slots |= {Slot(experts[expert], rank): name for rank, expert, name in row if expert in experts}
    return stored, target


def _ranks(slots: Iterable[Slot]) -> defaultdict[Expert, set[int]]:
    ranks: defaultdict[Expert, set[int]] = defaultdict(set)
    for slot in slots:
        ranks[slot.of].add(slot.rank)
    return ranks


def _mixing(slots: Mapping[Slot, str]) -> set[Expert]:
    """The experts whose replicas are stored in several formats."""
    stored = Counter(of for of, _ in {(slot.of, name) for slot, name in slots.items()})
    return {of for of, number in stored.items() if number > 1}


def _none(placement: Placement) -> IntArray:
    return np.zeros(placement.topology.num_ranks, np.int64)
