"""A replica of every expert on the members that are left: spare replicas make room, then the experts that tolerate it.

The busiest expert comes first, to the member of least load. Where no member has the bytes, replicas of experts that
others hold too are given up, those worth least first. Where that is not enough, experts are stored in few bits, those
of least damage first, as far as the caps on pairs and on error allow.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np

from rq_ep.core.arrays import BoolArray
from rq_ep.core.errors import UserError
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.migration.member_replicas import MemberReplicas
from rq_ep.solver.objective.precision import Formats, damage_FLE, error_LE


class Restoration:
    """The choice of what comes where, and of what makes room for it.

    Args:
        problem: loads, formats, cap and budgets.
        members: ascending.
        held: what they hold, which is completed.
        by_damage: experts of least damage are stored in few bits first; else those of fewest pairs, so that most can.
    """

    def __init__(
        self, problem: PlacementProblem, members: Sequence[int], held: MemberReplicas, by_damage: bool
    ) -> None:
        self._problem, self._members, self._held, self._by_damage = problem, members, held, by_damage
        self._formats = Formats.of(problem)
        self._spares: dict[int, list[tuple[float, int, int]]] = {}  # of a rank, as a heap, those worth least first
        self._tolerant: list[tuple[int, int]] | None = None  # experts that may be stored in few bits, best last

    def restore(self) -> bool:
        """Give every expert that has no replica one, the busiest first; whether there was any.

        Raises:
            UserError: they do not fit; the message says how many bytes are missing.
        """
        is_missing_LE = self._held.copies_LE == 0
        missing = np.argwhere(is_missing_LE)
        order = np.argsort(-self._held.load_LE[is_missing_LE], kind="stable")
        rest = self._place_all(missing[order].tolist())
        while rest:
            if not self._make_room(rest):
                raise UserError(self._too_small(rest))
            rest = self._place_all(rest)
        return len(missing) > 0

    def _place_all(self, experts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Place these experts; those that do not fit."""
        rest: list[tuple[int, int]] = []
        too_large = np.inf
        for i, expert in experts:
            size = self._held.new_bytes(i, expert)
            if size >= too_large or not self._place(i, expert):
                rest.append((i, expert))
                too_large = min(too_large, size)
        return rest

    def _place(self, i: int, expert: int) -> bool:
        """Put an expert on the member of least load that has the bytes, or can give up spare replicas for them."""
        size = self._held.new_bytes(i, expert)
        by_load = sorted(self._members, key=lambda rank: (self._held.load_LR[i, rank], rank))
        for makes_room in (False, True):
            for rank in by_load:
                if self._held.free_R[rank] >= size or (makes_room and self._give_up_spares(rank, size)):
                    self._held.add(i, expert, rank)
                    return True
        return False

    def _give_up_spares(self, rank: int, size: int) -> bool:
        """Drop replicas of a rank that have others, those worth least first, until it has so many bytes; or none."""
        held = self._held
        if rank not in self._spares:
            rows = np.argwhere((held.format_LER[:, :, rank] >= 0) & (held.copies_LE > 1)).tolist()
            self._spares[rank] = [(self._worth(i, expert), i, expert) for i, expert in rows]
            heapify(self._spares[rank])
        spares, dropped, free = self._spares[rank], [], held.free_R[rank]
        while spares and free < size:
            worth, i, expert = heappop(spares)
            if not self._is_spare(i, expert, rank):
                continue
            if (now := self._worth(i, expert)) > worth:
                heappush(spares, (now, i, expert))  # another replica went since
                continue
            free += held.held_bytes(i, expert, rank)
            dropped.append((i, expert))
        if free < size:
            for i, expert in dropped:
                heappush(spares, (self._worth(i, expert), i, expert))
            return False
        for i, expert in dropped:
            held.drop(i, expert, rank)
        return True

    def _is_spare(self, i: int, expert: int, rank: int) -> bool:
        """Whether others hold the expert in as many bits."""
        if self._held.copies_LE[i, expert] < 2:
            return False
        format_R = self._held.format_LER[i, expert]
        return bool(format_R[rank] > 0 or (format_R == 0).sum() > 1)

    def _worth(self, i: int, expert: int) -> float:
        """Load that other ranks take over when one replica fewer is there, for a byte."""
        copies = int(self._held.copies_LE[i, expert])
        return float(self._held.load_LE[i, expert]) / (copies * max(copies - 1, 1) * self._held.new_bytes(i, expert))

    def _make_room(self, rest: Sequence[tuple[int, int]]) -> bool:
        """Store in few bits one expert at least, or as many as it takes for one replica of each to fit by the bytes.

        Where none may be stored so, free bytes are brought together on a rank. False: that does not help either.
        """
        lacking = int(self._held.bytes_LE.sum()) - self._held.capacity
        while saved := self._lower_one():
            lacking -= saved
            if lacking <= 0:
                return True
        return lacking <= 0 and self._relocate(min(self._held.new_bytes(i, expert) for i, expert in rest))

    def _lower_one(self) -> int:
        """Store one more expert in the fewest bits. Returns the bytes that a replica of it saves; 0: none may be."""
        if self._tolerant is None:
            self._tolerant = self._tolerant_experts()
        if not self._tolerant or self._formats.low is None:
            return 0
        return self._held.lower(*self._tolerant.pop(), self._formats.low)

    def _relocate(self, size: int) -> bool:
        """Let a rank have so many bytes by moving what it holds to others' free bytes; False: that is not possible."""
        held = self._held
        for rank in sorted(self._members, key=lambda rank: (-held.free_R[rank], rank)):
            free_R, shifts = list(held.free_R), []
            for i, expert in np.argwhere(held.format_LER[:, :, rank] >= 0).tolist():
                if free_R[rank] >= size:
                    break
                bytes_ = held.held_bytes(i, expert, rank)
                taking = [
                    other
                    for other in self._members
                    if free_R[other] >= bytes_ and held.format_LER[i, expert, other] < 0
                ]
                if taking:
                    to = min(taking, key=lambda other: (free_R[other], other))
                    free_R[to] -= bytes_
                    free_R[rank] += bytes_
                    shifts.append((i, expert, rank, to))
            if free_R[rank] >= size:
                for shift in shifts:
                    held.shift(*shift)
                return True
        return False

    def _tolerant_experts(self) -> list[tuple[int, int]]:
        """Experts that the caps on pairs and on error allow in the fewest bits; that of least damage last."""
        problem, formats, held = self._problem, self._formats, self._held
        if formats.low is None:
            return []
        stats = problem.stats
        damages_LE = damage_FLE(stats, formats)[-1]
        errors_FLE = np.stack([error_LE(stats, name) for name in held.names])
        stored_LE = np.take_along_axis(errors_FLE, held.format_LE[None], axis=0)[0]
        more_LE = errors_FLE[held.names.index(formats.low)] - stored_LE
        low_LE: BoolArray = held.format_LE > 0
        may_be_lower_LE: BoolArray = (held.bytes_LE > formats.low_bytes) & ~held.mixes_LE
        left = held.max_low - held.low_pairs() - float(held.pairs_LE[low_LE & (held.copies_LE == 0)].sum())
        left_error = np.inf if problem.max_error is None else problem.max_error - stored_LE.sum()
        tolerant = []
        keys = [held.pairs_LE.ravel(), damages_LE.ravel()]
        for flat in np.lexsort(keys if self._by_damage else keys[::-1]).tolist():
            i, expert = divmod(flat, stats.num_experts)
            pairs, error = 0.0 if low_LE[i, expert] else float(held.pairs_LE[i, expert]), float(more_LE[i, expert])
            if may_be_lower_LE[i, expert] and pairs <= left and error <= left_error:
                tolerant.append((i, expert))
                left, left_error = left - pairs, left_error - error
        return tolerant[::-1]

    def _too_small(self, rest: Sequence[tuple[int, int]]) -> str:
        """The message for too few bytes, with how many would do."""
        free, missing = {rank: self._held.free_R[rank] for rank in self._members}, 0
        for i, expert in rest:
            rank = max(free, key=lambda rank: (free[rank], -rank))
            size = self._held.new_bytes(i, expert)
            missing += max(size - max(free[rank], 0), 0)
            free[rank] -= size
        problem = self._problem
        return (
            f"the ranks that are left ({len(self._members)}) cannot hold every expert: {missing} bytes are missing: "
            f"raise --budget, or allow fewer bits with --formats (now {','.join(problem.formats)}) and "
            f"--max-low-precision-share (now {problem.max_low_precision_share:g})"
        )
