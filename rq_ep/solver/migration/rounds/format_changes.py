"""Experts that change their format on the way, and the cap on pairs that are computed in few bits."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.moves import Held
from rq_ep.solver.migration.rounds.arrivals import Expert
from rq_ep.solver.migration.rounds.holdings import Holdings


class LowCap(NamedTuple):
    """A limit of the pairs that are computed in another format than the native one."""

    pairs_LE: IntArray
    max_pairs: float


class FormatChange(NamedTuple):
    """An expert that is to be stored in another format, on all ranks at once that keep it."""

    of: Expert
    added_low: int  # low pairs; negative where it becomes native
    size: int  # bytes of a replica in the new format
    ranks: tuple[int, ...]  # that hold it before and in the end, or one that holds it in the end
    frees: bool  # whether it frees bytes; then the ranks convert what they hold


class FormatChanges:
    """The changes that are left, and the low pairs that they may still add.

    Args:
        held: what ranks hold before the first round.
        before: all replicas before, also those that stay.
        native_format: the one that is not low.
        low_cap: on low pairs. One that does not hold before, or in the end, is not exceeded further.
    """

    def __init__(self, held: Holdings, before: Held, native_format: str, low_cap: LowCap | None) -> None:
        self._held, self._native = held, native_format
        self._low_pairs, self._max_low = 0, np.inf
        if low_cap is not None:
            low = {(i, one.expert) for i, row in enumerate(before) for one in row if one.format != native_format}
            staying = sum(int(low_cap.pairs_LE[of]) for of in low if of not in held.formats)
            self._low_pairs, low_after = (
                staying + sum(int(low_cap.pairs_LE[of]) for of, name in names.items() if name != native_format)
                for names in (held.formats, held.goals)
            )
            self._max_low = max(low_cap.max_pairs, self._low_pairs, low_after)
        changes = [self._change(of, 0 if low_cap is None else int(low_cap.pairs_LE[of])) for of in held.new_format]
        # More bits for the busiest first, fewer for the least busy.
        self._changes = {change.of: change for change in sorted(changes, key=lambda one: (one.added_low, one.of))}

    def _change(self, of: Expert, pairs: int) -> FormatChange:
        old, new = self._held.formats[of], self._held.new_format[of]
        ranks = sorted(self._held.homes[of] & self._held.holders[of]) or [min(self._held.homes[of])]
        added_low = pairs * ((new != self._native) - (old != self._native))
        size = self._held.expert_bytes[new]
        return FormatChange(of, added_low, size, tuple(ranks), size < self._held.expert_bytes[old])

    def __contains__(self, of: Expert) -> bool:
        """Whether the expert has yet to change its format."""
        return of in self._changes

    def __iter__(self) -> Iterator[FormatChange]:
        """Those that are left, in the order of their worth."""
        return iter(self._changes.values())

    def __len__(self) -> int:
        """How many are left."""
        return len(self._changes)

    @property
    def low_pairs_left(self) -> float:
        """Low pairs up to the cap."""
        return self._max_low - self._low_pairs

    def added_low(self, of: Expert) -> int:
        """Low pairs that a round adds in which a replica of the expert arrives."""
        return self._changes[of].added_low if of in self._changes else 0

    def serve(self, experts: Iterable[Expert]) -> None:
        """Count these experts, where they were to change, as changed."""
        for of in set(experts) & self._changes.keys():
            self._low_pairs += self._changes.pop(of).added_low
