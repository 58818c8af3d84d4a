"""A rank's place among the members of one generation.

Axes: M members, R ranks, V values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import IntArray


@dataclass(frozen=True)
class Seat:
    """A rank's place among the members of one generation, who have numbers of their own in its communicators."""

    rank: int
    size: int  # R
    members: tuple[int, ...]  # ranks, ascending
    generation: int = 0

    @property
    def has_holes(self) -> bool:
        return len(self.members) < self.size

    @property
    def index(self) -> int:
        """This rank's number among the members."""
        return self.index_of(self.rank)

    def index_of(self, rank: int) -> int:
        """A rank's number among the members.

        Raises:
            RuntimeError: it is none of them.
        """
        if rank not in self.members:
            raise RuntimeError(f"rank {rank} is no member of generation {self.generation}")
        return self.members.index(rank)

    def of_members(self, values_R: Sequence[int]) -> list[int]:
        """[M] of a value for each rank; [] of []."""
        return [values_R[rank] for rank in self.members] if values_R and self.has_holes else list(values_R)

    def of_ranks(self, values_MV: IntArray) -> IntArray:
        """[R, V] of a row for each member: zeros for the others."""
        if not self.has_holes:
            return values_MV
        values_RV = np.zeros((self.size, values_MV.shape[1]), values_MV.dtype)
        values_RV[list(self.members)] = values_MV
        return values_RV
