"""What ranks hold between two rounds of moves, and which of it can be dropped."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush

import numpy as np

from rq_ep.core.moves import DROP, Held, Move, byte_limits
from rq_ep.core.placement import Placement
from rq_ep.core.replicas import replica_bytes
from rq_ep.solver.migration.rounds.arrivals import Expert, Slot


class Holdings:
    """The replicas of experts that change between two placements, as far as the rounds have come.

    Args:
        before: replicas of each layer of `after`.
        after: the goal.
        expert_bytes: format -> bytes of one expert.
    """

    def __init__(self, before: Held, after: Placement, expert_bytes: Mapping[str, int]) -> None:
        self.expert_bytes = expert_bytes
        self.stored, self.target = _changing(before, [list(layer.replicas) for layer in after.layers])
        self.holders = _ranks(self.stored)
        self.homes = _ranks(self.target)  # ranks that hold an expert in the end
        self.goals = {slot.of: name for slot, name in self.target.items()}
        self.formats = self.goals | {slot.of: name for slot, name in self.stored.items()}  # new where no rank holds it
        mixing = _mixing(self.stored) | _mixing(self.target)  # each of their replicas goes its own way
        self.new_format = {
            of: self.goals[of] for of, name in self.formats.items() if name != self.goals[of] and of not in mixing
        }
        self.missing = self.target.keys() - self.stored.keys()
        self.missing |= {
            slot for slot, name in self.target.items() if slot.of in mixing and self.stored.get(slot) != name
        }
        self._surplus = self.stored.keys() - self.target.keys()
        num_ranks = after.topology.num_ranks
        bytes_R = sum(
            (replica_bytes(row, num_ranks, expert_bytes) for row in before), start=np.zeros(num_ranks, np.int64)
        )
        self._bytes_R: list[int] = bytes_R.tolist()
        self._limit_R: list[int] = byte_limits(bytes_R, after).tolist()
        self._spare: set[Slot] = set()  # surplus replicas that may go: a rank holds the expert that does so in the end
        # Of each rank, as a heap, also after they went: those of experts of which no other replica is awaited go first.
        self._spare_of: list[list[tuple[bool, Slot]]] = [[] for _ in self._bytes_R]
        self.spare_R = [0] * num_ranks  # their bytes
        for of, holders in self.holders.items():
            if holders & self.homes[of]:
                self._release(of)

    @property
    def left_R(self) -> list[int]:
        """[R] bytes up to the limit of each rank."""
        return [limit - held for limit, held in zip(self._limit_R, self._bytes_R, strict=True)]

    def freed_by(self, moves: Mapping[Slot, Move], is_first: bool) -> list[tuple[int, int]]:
        """Ranks and bytes that are replaced, or can be dropped, when one expert's moves serve.

        Args:
            moves: of one expert.
            is_first: whether no other replica of the expert arrives in the round.
        """
        freed = [(slot.rank, self.expert_bytes[self.stored[slot]]) for slot in moves if slot in self.stored]
        (of,) = {slot.of for slot in moves}
        if is_first and not self.holders[of] & self.homes[of]:
            freed += [(rank, self.expert_bytes[self.stored[Slot(of, rank)]]) for rank in self.holders[of]]
        return freed

    def serve(self, moves: Mapping[Slot, Move]) -> list[tuple[int, Move]]:
        """Let replicas serve; drop those in a former format of their expert, and as many as exceed the bytes."""
        changed = {slot.of for slot in moves} & self.new_format.keys()
        for of in changed:
            self.formats[of] = self.new_format.pop(of)
        for slot, move in moves.items():
            replaced = self.expert_bytes[self.stored[slot]] if slot in self.stored else 0
            self._bytes_R[slot.rank] += self.expert_bytes[move.format] - replaced
            self.stored[slot] = move.format
            self.holders[slot.of].add(slot.rank)
            self.missing.discard(slot)
        drops = [
            self._drop(Slot(of, rank))
            for of in sorted(changed)
            for rank in sorted(self.holders[of])
            if self.stored[Slot(of, rank)] != self.formats[of]
        ]
        for of in {slot.of for slot in moves}:
            self._release(of)
        for rank, spare in enumerate(self._spare_of):
            while self._bytes_R[rank] > self._limit_R[rank] and spare:
                if (slot := heappop(spare)[1]) in self._spare:
                    drops.append(self._drop(slot))
        return drops

    def drop_surplus(self) -> list[tuple[int, Move]]:
        """Drop what the goal does not hold."""
        return [self._drop(slot) for slot in sorted(self._surplus)]

    def _release(self, of: Expert) -> None:
        """Let the surplus replicas of an expert go when bytes ask for it."""
        is_awaited = not self.holders[of] >= self.homes[of]
        for rank in self.holders[of] - self.homes[of]:
            slot = Slot(of, rank)
            heappush(self._spare_of[rank], (is_awaited, slot))
            if slot not in self._spare:
                self._spare.add(slot)
                self.spare_R[rank] += self.expert_bytes[self.stored[slot]]

    def _drop(self, slot: Slot) -> tuple[int, Move]:
        name = self.stored.pop(slot)
        self._bytes_R[slot.rank] -= self.expert_bytes[name]
        self.holders[slot.of].remove(slot.rank)
        self._surplus.remove(slot)
        if slot in self._spare:
            self._spare.remove(slot)
            self.spare_R[slot.rank] -= self.expert_bytes[name]
        return slot.of.layer, Move(DROP, slot.rank, slot.of.expert, name)


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
