"""A replica of every expert on the members that are left: spare replicas make room, then the experts that tolerate it.

The busiest expert comes first, to the member of least load. Where no member has the bytes, replicas of experts that
others hold too are given up, those worth least first. Where that is not enough, experts are stored in few bits, those
of least damage first, as far as the caps on pairs and on error allow.
"""

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.solver.objective.precision import Formats, damage_FLE, error_LE

UNLIMITED = 2**60
_GIVES = np.array([-1.0, 1.0])  # what a rank and the one that it gives a replica to carry more


class Restoration:
    """What the members hold, and what they still lack.

    Args:
        problem: loads, formats, cap and budgets; where no load is known, every expert has the same.
        placement: what serves; replicas on other ranks are as good as gone.
        members: ascending.
        by_damage: experts of least damage are stored in few bits; else those of fewest pairs, so that most can be, and
            busier ones that are stored so are native again.
    """

    def __init__(
        self, problem: PlacementProblem, placement: Placement, members: Sequence[int], by_damage: bool = True
    ) -> None:
        self._problem, self._before, self._members, self._by_damage = problem, placement, members, by_damage
        stats = problem.stats
        self._formats = Formats.of(problem)
        self._names = tuple(dict.fromkeys((stats.native_format, *problem.formats, *placement.formats)))
        self._bytes_F = np.array([stats.expert_bytes[name] for name in self._names], np.int64)
        number = {name: index for index, name in enumerate(self._names)}
        num_layers, num_experts, num_ranks = len(placement.layers), stats.num_experts, placement.topology.num_ranks
        self.format_LER = np.full((num_layers, num_experts, num_ranks), -1, np.int8)  # index into the names, or -1
        for format_ER, layer in zip(self.format_LER, placement.layers, strict=True):
            table = layer.replicas
            format_ER[table.experts_P, table.ranks_P] = [number[name] for name in table.formats_P]
        self.pairs_LE = stats.counts.sum(axis=0)
        if not self.pairs_LE.any():
            self.pairs_LE = np.ones((num_layers, num_experts), np.int64)
        totals_L1 = self.pairs_LE.sum(axis=1, keepdims=True)
        self._load_LE: FloatArray = np.divide(  # of the pairs of a layer
            self.pairs_LE, totals_L1, out=np.full(self.pairs_LE.shape, 1 / num_experts), where=totals_L1 > 0
        )
        self._max_low = max(problem.max_low_precision_share * int(self.pairs_LE.sum()), self._low_pairs())
        is_native_LE = (self.format_LER == 0).any(axis=2)
        self._format_LE = np.where(is_native_LE, 0, self.format_LER.max(axis=2))  # that each expert comes back in
        is_hole_R = np.ones(num_ranks, bool)
        is_hole_R[list(members)] = False
        self.format_LER[:, :, is_hole_R] = -1
        # What is left of an expert in two formats is given up where its pairs would all be computed in the fewer bits.
        self.format_LER[is_native_LE & ~(self.format_LER == 0).any(axis=2)] = -1
        if not by_damage:
            by_pairs = np.argsort(self.pairs_LE, axis=None, kind="stable")
            is_kept = np.cumsum(self.pairs_LE.ravel()[by_pairs]) <= self._max_low
            becomes_native_LE = self._format_LE > 0
            becomes_native_LE.ravel()[by_pairs[is_kept]] = False
            self._format_LE[becomes_native_LE] = 0
            self.format_LER[becomes_native_LE] = -1
        held_LER = self.before_LER = self.held_LER
        self._copies_LE = held_LER.sum(axis=2)
        used_R = np.where(held_LER, self._bytes_F[self.format_LER], 0).sum(axis=(0, 1))
        budget_R = np.array(problem.budget_bytes_R or [UNLIMITED] * num_ranks, np.int64)
        self._free_R: list[int] = (np.maximum(budget_R, used_R) - used_R).tolist()
        self._capacity = int(np.maximum(budget_R, used_R)[list(members)].sum())
        self._load_LR: FloatArray = np.einsum("ler,le->lr", held_LER, self._load_LE / np.maximum(self._copies_LE, 1))
        self._spares: dict[int, list[tuple[float, int, int]]] = {}  # of a rank, as a heap, those worth least first
        self._tolerant: list[tuple[int, int]] | None = None  # experts that may be stored in few bits, best last

    @property
    def held_LER(self) -> BoolArray:
        """[L, E, R] whether the rank holds a replica of the expert."""
        held_LER: BoolArray = self.format_LER >= 0
        return held_LER

    @property
    def bytes_LE(self) -> IntArray:
        """[L, E] bytes of a replica of each expert."""
        bytes_LE: IntArray = self._bytes_F[self._format_LE]
        return bytes_LE

    def format_LE(self) -> IntArray | None:
        """[L, E] the format of each expert among the problem's; None if formats are mixed, or others are used."""
        allowed = {name: number for number, name in enumerate(self._formats.names)}
        number_F = np.array([allowed.get(name, -1) for name in self._names], np.int64)
        format_LE: IntArray = number_F[self._format_LE]
        mixes = (self.held_LER & (self.format_LER != self._format_LE[:, :, None])).any()
        return None if mixes or format_LE.min() < 0 else format_LE

    def hold(self, held_LEM: BoolArray, members: Sequence[int]) -> None:
        """Hold other replicas, each in the format of its expert."""
        self.format_LER[:, :, members] = np.where(held_LEM, self._format_LE[:, :, None], -1)

    def restore(self) -> bool:
        """Give every expert that has no replica one, the busiest first; whether there was any.

        Raises:
            UserError: they do not fit; the message says how many bytes are missing.
        """
        missing = np.argwhere(self._copies_LE == 0)
        order = np.argsort(-self._load_LE[self._copies_LE == 0], kind="stable")
        rest = self._place_all(missing[order].tolist())
        while rest:
            if not self._make_room(rest):
                raise UserError(self._too_small(rest))
            rest = self._place_all(rest)
        return len(missing) > 0

    def placement(self) -> Placement:
        """The result as a placement of all ranks."""
        before, stats = self._before, self._problem.stats
        layers = []
        for layer, format_ER in zip(before.layers, self.format_LER, strict=True):
            experts, ranks = np.nonzero(format_ER >= 0)
            formats = [self._names[name] for name in format_ER[experts, ranks].tolist()]
            replicas = map(Replica, ranks.tolist(), experts.tolist(), formats)
            after = LayerPlacement.even(layer.index, layer.num_experts, replicas, layer.replicas.mixed_formats)
            layers.append(layer if list(after.replicas) == list(layer.replicas) else after)
        bytes_R = bytes_by_rank(layers, before.topology.num_ranks, stats.expert_bytes)
        low_share = self._low_pairs() / int(self.pairs_LE.sum())
        return replace(
            before, layers=tuple(layers), bytes_R=tuple(bytes_R.tolist()),
            budget_bytes_R=self._problem.budget_bytes_R, low_precision_planned=low_share, certificate={},
        )  # fmt: skip

    def _low_pairs(self) -> float:
        """Pairs computed in few bits where replicas of an expert share them evenly; missing experts have none."""
        copies_LE = (self.format_LER >= 0).sum(axis=2)
        low_LE = (self.format_LER > 0).sum(axis=2) / np.maximum(copies_LE, 1)
        return float((low_LE * self.pairs_LE).sum())

    def _place_all(self, experts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Place these experts; those that do not fit."""
        rest, too_large = [], UNLIMITED
        for i, expert in experts:
            size = int(self._bytes_F[self._format_LE[i, expert]])
            if size >= too_large or not self._place(i, expert):
                rest.append((i, expert))
                too_large = min(too_large, size)
        return rest

    def _place(self, i: int, expert: int) -> bool:
        """Put an expert on the member of least load that has the bytes, or can give up spare replicas for them."""
        size = int(self._bytes_F[self._format_LE[i, expert]])
        by_load = sorted(self._members, key=lambda rank: (self._load_LR[i, rank], rank))
        for makes_room in (False, True):
            for rank in by_load:
                if self._free_R[rank] >= size or (makes_room and self._give_up_spares(rank, size)):
                    self._add(i, expert, rank)
                    return True
        return False

    def _add(self, i: int, expert: int, rank: int) -> None:
        self.format_LER[i, expert, rank] = self._format_LE[i, expert]
        self._copies_LE[i, expert] += 1
        self._free_R[rank] -= int(self._bytes_F[self._format_LE[i, expert]])
        self._load_LR[i, rank] += self._load_LE[i, expert]

    def _give_up_spares(self, rank: int, size: int) -> bool:
        """Drop replicas of a rank that have others, those worth least first, until it has so many bytes; or none."""
        if rank not in self._spares:
            rows = np.argwhere((self.format_LER[:, :, rank] >= 0) & (self._copies_LE > 1)).tolist()
            self._spares[rank] = [(self._worth(i, expert), i, expert) for i, expert in rows]
            heapify(self._spares[rank])
        spares, dropped, free = self._spares[rank], [], self._free_R[rank]
        while spares and free < size:
            worth, i, expert = heappop(spares)
            if not self._is_spare(i, expert, rank):
                continue
            if (now := self._worth(i, expert)) > worth:
                heappush(spares, (now, i, expert))  # another replica went since
                continue
            free += int(self._bytes_F[self.format_LER[i, expert, rank]])
            dropped.append((i, expert))
        if free < size:
            for i, expert in dropped:
                heappush(spares, (self._worth(i, expert), i, expert))
            return False
        for i, expert in dropped:
            self.format_LER[i, expert, rank] = -1
            copies = int(self._copies_LE[i, expert])
            self._copies_LE[i, expert] = copies - 1
            share = self._load_LE[i, expert] / copies
            self._load_LR[i, rank] -= share
            self._load_LR[i, self.format_LER[i, expert] >= 0] += share / (copies - 1)
        self._free_R[rank] = free
        return True

    def _is_spare(self, i: int, expert: int, rank: int) -> bool:
        """Whether others hold the expert in as many bits."""
        if self._copies_LE[i, expert] < 2:
            return False
        name = self.format_LER[i, expert, rank]
        return bool(name > 0 or (self.format_LER[i, expert] == 0).sum() > 1)

    def _worth(self, i: int, expert: int) -> float:
        """Load that other ranks take over when one replica fewer is there, for a byte."""
        copies = int(self._copies_LE[i, expert])
        size = int(self._bytes_F[self._format_LE[i, expert]])
        return float(self._load_LE[i, expert]) / (copies * max(copies - 1, 1) * size)

    def _make_room(self, rest: Sequence[tuple[int, int]]) -> bool:
        """Store in few bits one expert at least, or as many as it takes for one replica of each to fit by the bytes.

        Where none may be stored so, free bytes are brought together on a rank. False: that does not help either.
        """
        bytes_LE = self.bytes_LE
        lacking = int(bytes_LE.sum()) - self._capacity
        while saved := self._lower_one():
            lacking -= saved
            if lacking <= 0:
                return True
        return lacking <= 0 and self._relocate(min(int(bytes_LE[i, expert]) for i, expert in rest))

    def _lower_one(self) -> int:
        """Store one more expert in the fewest bits. Returns the bytes that a replica of it saves; 0: none may be."""
        if self._tolerant is None:
            self._tolerant = self._tolerant_experts()
        if not self._tolerant:
            return 0
        i, expert = self._tolerant.pop()
        low = self._names.index(self._formats.low or "")
        before = int(self._format_LE[i, expert])
        more = int(self._bytes_F[before] - self._bytes_F[low])
        self._format_LE[i, expert] = low
        for rank in np.flatnonzero(self.format_LER[i, expert] == before).tolist():
            self.format_LER[i, expert, rank] = low
            self._free_R[rank] += more
        return more

    def _relocate(self, size: int) -> bool:
        """Let a rank have so many bytes by moving what it holds to others' free bytes; False: that is not possible."""
        for rank in sorted(self._members, key=lambda rank: (-self._free_R[rank], rank)):
            before, moved = list(self._free_R), []
            for i, expert in np.argwhere(self.format_LER[:, :, rank] >= 0).tolist():
                if self._free_R[rank] >= size:
                    break
                bytes_ = int(self._bytes_F[self.format_LER[i, expert, rank]])
                taking = [
                    other
                    for other in self._members
                    if self._free_R[other] >= bytes_ and self.format_LER[i, expert, other] < 0
                ]
                if taking:
                    to = min(taking, key=lambda other: (self._free_R[other], other))
                    self._free_R[to] -= bytes_
                    self._free_R[rank] += bytes_
                    moved.append((i, expert, to))
            if self._free_R[rank] >= size:
                for i, expert, to in moved:
                    self._load_LR[i, [rank, to]] += self._load_LE[i, expert] / self._copies_LE[i, expert] * _GIVES
                    self.format_LER[i, expert, to] = self.format_LER[i, expert, rank]
                    self.format_LER[i, expert, rank] = -1
                return True
            self._free_R = before
        return False

    def _tolerant_experts(self) -> list[tuple[int, int]]:
        """Experts that the caps on pairs and on error allow in the fewest bits; that of least damage last."""
        problem, formats = self._problem, self._formats
        if formats.low is None:
            return []
        stats = problem.stats
        damages_LE = damage_FLE(stats, formats)[-1]
        errors_FLE = np.stack([error_LE(stats, name) for name in self._names])
        stored_LE = np.take_along_axis(errors_FLE, self._format_LE[None], axis=0)[0]
        more_LE = errors_FLE[self._names.index(formats.low)] - stored_LE
        low_LE: BoolArray = self._format_LE > 0
        mixes_LE = (self.held_LER & (self.format_LER != self._format_LE[:, :, None])).any(axis=2)
        may_be_lower_LE: BoolArray = (self.bytes_LE > formats.low_bytes) & ~mixes_LE
        left = self._max_low - self._low_pairs() - float(self.pairs_LE[low_LE & (self._copies_LE == 0)].sum())
        left_error = np.inf if problem.max_error is None else problem.max_error - stored_LE.sum()
        tolerant = []
        keys = [self.pairs_LE.ravel(), damages_LE.ravel()]
        for flat in np.lexsort(keys if self._by_damage else keys[::-1]).tolist():
            i, expert = divmod(flat, stats.num_experts)
            pairs, error = 0.0 if low_LE[i, expert] else float(self.pairs_LE[i, expert]), float(more_LE[i, expert])
            if may_be_lower_LE[i, expert] and pairs <= left and error <= left_error:
                tolerant.append((i, expert))
                left, left_error = left - pairs, left_error - error
        return tolerant[::-1]

    def _too_small(self, rest: Sequence[tuple[int, int]]) -> str:
        """The message for too few bytes, with how many would do."""
        free, missing = {rank: self._free_R[rank] for rank in self._members}, 0
        for i, expert in rest:
            rank = max(free, key=lambda rank: (free[rank], -rank))
            size = int(self._bytes_F[self._format_LE[i, expert]])
            missing += max(size - max(free[rank], 0), 0)
            free[rank] -= size
        problem = self._problem
        return (
            f"the ranks that are left ({len(self._members)}) cannot hold every expert: {missing} bytes are missing: "
            f"raise --budget, or allow fewer bits with --formats (now {','.join(problem.formats)}) and "
            f"--max-low-precision-share (now {problem.max_low_precision_share:g})"
        )
