"""Replicas that are to arrive together in one round, and the bytes, ranks and low pairs that leaves to others."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rq_ep.core.moves import Move


class Expert(NamedTuple):
    """An expert of the layer at a position."""

    layer: int
    expert: int


class Slot(NamedTuple):
    """Where a replica lies."""

    of: Expert
    rank: int


class JointMoves(NamedTuple):
    """Replicas that joined a round together."""

    moves: Mapping[Slot, Move]
    freed: Sequence[tuple[int, int]]  # rank and bytes that could be dropped, or are replaced, when they serve
    low_pairs: int  # more than before


class Arrivals:
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
        self._additions: list[JointMoves] = []
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

    def add(self, joint: JointMoves) -> None:
        """Let these arrive as well; each rank sends one replica to others at most, and receives one from them."""
        self._additions.append(joint)
        self._count(joint, 1)
        self.moves |= joint.moves
        for move in joint.moves.values():
            if move.source != move.rank:
                self.receivers.add(move.rank)
                if move.source is not None:
                    self.senders.add(move.source)

    def take_back(self, length: int) -> None:
        """Take back the last additions; `length` of them stay."""
        while len(self._additions) > length:
            joint = self._additions.pop()
            self._count(joint, -1)
            for slot, move in joint.moves.items():
                del self.moves[slot]
                if move.source != move.rank:
                    self.receivers.remove(move.rank)
                    if move.source is not None:
                        self.senders.remove(move.source)

    def _count(self, joint: JointMoves, sign: int) -> None:
        for slot, move in joint.moves.items():
            self.staging_R[slot.rank] -= sign * self._bytes[move.format]
            self.serving_R[slot.rank] -= sign * self._bytes[move.format]
            self.experts[slot.of] += sign
        for rank, size in joint.freed:
            self.serving_R[rank] += sign * size
        self.low_pairs -= sign * joint.low_pairs
