"""Replicas: physical copies of experts, in the order of every `_P` axis."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, IntArray
from rq_ep.core.errors import UserError


class Replica(NamedTuple):
    """One physical copy of an expert: the rank that holds it and the weight format it is stored in."""

    rank: int
    expert: int
    format: str


@dataclass(frozen=True)
class Replicas:
    """P replicas of one layer, at most one per (rank, expert), in the order of every `_P` axis: by rank, then expert.

    `mixed_formats` empty: replicas of one expert share a format. Otherwise they may mix those it names, the one of
    fewest bits first: of a source's pairs of an expert, those with the lowest gates go there.
    """

    ranks_P: IntArray
    experts_P: IntArray
    formats_P: tuple[str, ...]
    mixed_formats: tuple[str, ...] = ()

    @classmethod
    def of(cls, replicas: Iterable[Replica], mixed_formats: Sequence[str] = ()) -> "Replicas":
        ordered = sorted(replicas)
        ranks, experts, formats = zip(*ordered, strict=True) if ordered else ((), (), ())
        if len(set(zip(ranks, experts, strict=True))) < len(ordered):
            raise UserError("a rank holds two replicas of one expert")
        return cls(np.array(ranks, np.int64), np.array(experts, np.int64), tuple(formats), tuple(mixed_formats))

    @classmethod
    def from_mask(cls, held_ER: BoolArray, formats_E: Sequence[str] | None = None) -> "Replicas":
        """The replicas of a layer where rank r holds expert e if `held_ER` is true, in the format of the expert."""
        ranks_P, experts_P = np.nonzero(held_ER.T)
        formats = tuple(formats_E[expert] for expert in experts_P.tolist()) if formats_E else ("",) * len(ranks_P)
        return cls(ranks_P.astype(np.int64), experts_P.astype(np.int64), formats)

    def mask(self, num_experts: int, num_ranks: int) -> BoolArray:
        """[E, R] whether the rank holds the expert."""
        held_ER = np.zeros((num_experts, num_ranks), bool)
        held_ER[self.experts_P, self.ranks_P] = True
        return held_ER

    def __len__(self) -> int:
        return len(self.formats_P)

    def __getitem__(self, p: int) -> Replica:
        return Replica(int(self.ranks_P[p]), int(self.experts_P[p]), self.formats_P[p])

    def __iter__(self) -> Iterator[Replica]:
        return map(Replica, self.ranks_P.tolist(), self.experts_P.tolist(), self.formats_P)

    @cached_property
    def by_expert_P(self) -> IntArray:
        """[P] replica indices sorted by (expert, rank): the order in which a source fills an expert's replicas.

        Where an expert mixes formats, those of fewer bits come first.
        """
        if not self.mixed_formats:
            return np.lexsort((self.ranks_P, self.experts_P))
        place = {name: number for number, name in enumerate(self.mixed_formats)}
        bits_P = np.array([place.get(name, len(place)) for name in self.formats_P], np.int64)
        return np.lexsort((self.ranks_P, bits_P, self.experts_P))

    @cached_property
    def first_E(self) -> IntArray:
        """[E + 1] where the replicas of each expert begin in `by_expert_P`; E counts up to the last expert held."""
        num_experts = int(self.experts_P.max(initial=-1)) + 1
        return np.searchsorted(self.experts_P[self.by_expert_P], np.arange(num_experts + 1))

    @cached_property
    def stored_formats(self) -> tuple[tuple[str, ...], IntArray]:
        """The formats in use, sorted, and [P] the index of each replica's format among them."""
        names = tuple(sorted(set(self.formats_P)))
        if len(names) == 1:
            return names, np.zeros(len(self), np.int64)
        return names, np.array([names.index(name) for name in self.formats_P], np.int64)

    @cached_property
    def mixing_experts(self) -> tuple[int, ...]:
        """The experts whose replicas are stored in several formats, ascending."""
        if not self.mixed_formats:
            return ()
        stored = set(zip(self.experts_P.tolist(), self.formats_P, strict=True))
        numbers = Counter(expert for expert, _ in stored)
        return tuple(sorted(expert for expert, number in numbers.items() if number > 1))

    def changed(self, arrived: Iterable[Replica], dropped: Iterable[tuple[int, int]]) -> "Replicas":
        """These with replicas that arrive, some in place of others of the same rank and expert, and without some.

        Args:
            arrived: none of them is dropped.
            dropped: rank and expert of replicas that are there.
        """
        coming = sorted(arrived)
        ranks_A, experts_A = np.array([one[:2] for one in coming], np.int64).reshape(-1, 2).T
        ranks_D, experts_D = np.array(list(dropped), np.int64).reshape(-1, 2).T
        num_experts = int(max(self.experts_P.max(initial=0), experts_A.max(initial=0))) + 1
        place_P = self.ranks_P * num_experts + self.experts_P  # ascending
        place_A, place_D = ranks_A * num_experts + experts_A, ranks_D * num_experts + experts_D
        kept_P = np.ones(len(self), bool)
        kept_P[_found(place_A, place_P)] = False
        in_place_D = _found(place_D, place_P)
        assert len(in_place_D) == len(place_D), "what is dropped is there"
        kept_P[in_place_D] = False
        at_A = np.searchsorted(place_P[kept_P], place_A)
        formats = list(compress(self.formats_P, kept_P.tolist()))
        for at, one in zip(reversed(at_A.tolist()), reversed(coming), strict=True):
            formats.insert(at, one.format)
        ranks_P, experts_P = (
            np.insert(old_P[kept_P], at_A, new_A)
            for old_P, new_A in ((self.ranks_P, ranks_A), (self.experts_P, experts_A))
        )
        return Replicas(ranks_P, experts_P, tuple(formats), self.mixed_formats)

    def are_those_of(self, other: "Replicas") -> bool:
        """Whether both are the same replicas in the same formats."""
        return (
            self.formats_P == other.formats_P
            and np.array_equal(self.ranks_P, other.ranks_P)
            and np.array_equal(self.experts_P, other.experts_P)
        )

    def joined(self, borrowed: Sequence[Replica], mixed_formats: tuple[str, ...]) -> tuple["Replicas", IntArray]:
        """Merge borrowed replicas in; also return the permutation from (these, then the borrowed) to the result."""
        ranks_P = np.concatenate([self.ranks_P, np.array([replica.rank for replica in borrowed], np.int64)])
        experts_P = np.concatenate([self.experts_P, np.array([replica.expert for replica in borrowed], np.int64)])
        formats = [*self.formats_P, *(replica.format for replica in borrowed)]
        order_P = np.lexsort((experts_P, ranks_P))
        formats_P = tuple(formats[p] for p in order_P.tolist())
        return Replicas(ranks_P[order_P], experts_P[order_P], formats_P, mixed_formats), order_P

    def on_rank(self, rank: int) -> range:
        """Replica indices held by `rank`; their position in the range is the local replica number."""
        first, last = np.searchsorted(self.ranks_P, [rank, rank + 1])
        return range(int(first), int(last))


def replica_bytes(replicas: Iterable[Replica], num_ranks: int, expert_bytes: Mapping[str, int]) -> IntArray:
    """[R] bytes of the replicas on each rank; `expert_bytes` maps a format to bytes of one expert."""
    bytes_of = [0] * num_ranks
    for rank, _, name in replicas:
        bytes_of[rank] += expert_bytes[name]
    return np.array(bytes_of, np.int64)


def _found(values: IntArray, ascending: IntArray) -> IntArray:
    """Where those of the values are that are in an array."""
    at = np.searchsorted(ascending, values)
    at, values = at[at < len(ascending)], values[at < len(ascending)]
    found: IntArray = at[ascending[at] == values]
    return found
