"""The replicas that members hold while their experts are restored: formats, bytes and loads, kept current together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.solver.objective.precision import Formats

UNLIMITED = 2**60
_GIVES = np.array([-1.0, 1.0])  # what a rank and the one that it gives a replica to carry more


class MemberReplicas:
    """What the members hold; replicas on other ranks are as good as gone.

    Args:
        problem: loads, formats, cap and budgets; where no load is known, every expert has the same.
        placement: what serves.
        members: ascending.
        keeps_low: experts in few bits stay so; else those of most pairs, which the cap would not have, lose their
            replicas and come back native.
    """

    def __init__(
        self, problem: PlacementProblem, placement: Placement, members: Sequence[int], keeps_low: bool = True
    ) -> None:
        self._problem, self._before = problem, placement
        stats = problem.stats
        self.names = tuple(dict.fromkeys((stats.native_format, *problem.formats, *placement.formats)))
        self._bytes_F = np.array([stats.expert_bytes[name] for name in self.names], np.int64)
        number = {name: index for index, name in enumerate(self.names)}
        num_layers, num_experts, num_ranks = len(placement.layers), stats.num_experts, placement.topology.num_ranks
        self.format_LER = np.full((num_layers, num_experts, num_ranks), -1, np.int8)  # index into the names, or -1
        for format_ER, layer in zip(self.format_LER, placement.layers, strict=True):
            table = layer.replicas
            format_ER[table.experts_P, table.ranks_P] = [number[name] for name in table.formats_P]
        self.pairs_LE = stats.counts.sum(axis=0)
        if not self.pairs_LE.any():
            self.pairs_LE = np.ones((num_layers, num_experts), np.int64)
        totals_L1 = self.pairs_LE.sum(axis=1, keepdims=True)
        self.load_LE: FloatArray = np.divide(  # of the pairs of a layer
            self.pairs_LE, totals_L1, out=np.full(self.pairs_LE.shape, 1 / num_experts), where=totals_L1 > 0
        )
        self.max_low = max(problem.max_low_precision_share * int(self.pairs_LE.sum()), self.low_pairs())
        is_native_LE = (self.format_LER == 0).any(axis=2)
        self.format_LE = np.where(is_native_LE, 0, self.format_LER.max(axis=2))  # that each expert comes back in
        is_hole_R = np.ones(num_ranks, bool)
        is_hole_R[list(members)] = False
        self.format_LER[:, :, is_hole_R] = -1
        # What is left of an expert in two formats is given up where its pairs would all be computed in the fewer bits.
        self.format_LER[is_native_LE & ~(self.format_LER == 0).any(axis=2)] = -1
        if not keeps_low:
            self._give_up_busy_low_experts()
        held_LER = self.held_LER
        self.copies_LE = held_LER.sum(axis=2)
        used_R = np.where(held_LER, self._bytes_F[self.format_LER], 0).sum(axis=(0, 1))
        budget_R = np.array(problem.budget_bytes_R or [UNLIMITED] * num_ranks, np.int64)
        self.free_R: list[int] = (np.maximum(budget_R, used_R) - used_R).tolist()
        self.capacity = int(np.maximum(budget_R, used_R)[list(members)].sum())  # bytes of all members together
        self.load_LR: FloatArray = np.einsum("ler,le->lr", held_LER, self.load_LE / np.maximum(self.copies_LE, 1))

    @property
    def held_LER(self) -> BoolArray:
        """[L, E, R] whether the rank holds a replica of the expert."""
        held_LER: BoolArray = self.format_LER >= 0
        return held_LER

    @property
    def mixes_LE(self) -> BoolArray:
        """[L, E] whether a replica of the expert is in another format than the one it comes back in."""
        mixes_LE: BoolArray = (self.held_LER & (self.format_LER != self.format_LE[:, :, None])).any(axis=2)
        return mixes_LE

    @property
    def bytes_LE(self) -> IntArray:
        """[L, E] bytes of a new replica of each expert."""
        bytes_LE: IntArray = self._bytes_F[self.format_LE]
        return bytes_LE

    def new_bytes(self, i: int, expert: int) -> int:
        """Bytes of a new replica of an expert."""
        return int(self._bytes_F[self.format_LE[i, expert]])

    def held_bytes(self, i: int, expert: int, rank: int) -> int:
        """Bytes of the replica that a rank holds."""
        return int(self._bytes_F[self.format_LER[i, expert, rank]])

    def low_pairs(self) -> float:
        """Pairs computed in few bits where replicas of an expert share them evenly; missing experts have none."""
        copies_LE = (self.format_LER >= 0).sum(axis=2)
        low_LE = (self.format_LER > 0).sum(axis=2) / np.maximum(copies_LE, 1)
        return float((low_LE * self.pairs_LE).sum())

    def solver_format_LE(self) -> IntArray | None:
        """[L, E] the format of each expert among the problem's; None if formats are mixed, or others are used."""
        allowed = {name: number for number, name in enumerate(Formats.of(self._problem).names)}
        number_F = np.array([allowed.get(name, -1) for name in self.names], np.int64)
        format_LE: IntArray = number_F[self.format_LE]
        return None if self.mixes_LE.any() or format_LE.min() < 0 else format_LE

    def add(self, i: int, expert: int, rank: int) -> None:
        """Put an expert that has no replica on a rank."""
        self.format_LER[i, expert, rank] = self.format_LE[i, expert]
        self.copies_LE[i, expert] += 1
        self.free_R[rank] -= self.new_bytes(i, expert)
        self.load_LR[i, rank] += self.load_LE[i, expert]

    def drop(self, i: int, expert: int, rank: int) -> None:
        """Drop a replica of an expert that has others, which share its load."""
        self.free_R[rank] += self.held_bytes(i, expert, rank)
        self.format_LER[i, expert, rank] = -1
        copies = int(self.copies_LE[i, expert])
        self.copies_LE[i, expert] = copies - 1
        share = self.load_LE[i, expert] / copies
        self.load_LR[i, rank] -= share
        self.load_LR[i, self.format_LER[i, expert] >= 0] += share / (copies - 1)

    def shift(self, i: int, expert: int, rank: int, to: int) -> None:
        """Move a replica to a rank that has none of the expert."""
        size = self.held_bytes(i, expert, rank)
        self.free_R[rank] += size
        self.free_R[to] -= size
        self.load_LR[i, [rank, to]] += self.load_LE[i, expert] / self.copies_LE[i, expert] * _GIVES
        self.format_LER[i, expert, to] = self.format_LER[i, expert, rank]
        self.format_LER[i, expert, rank] = -1

    def lower(self, i: int, expert: int, name: str) -> int:
        """Store an expert in a format of fewer bytes; the bytes that a replica of it saves."""
        before, low = int(self.format_LE[i, expert]), self.names.index(name)
        saved = int(self._bytes_F[before] - self._bytes_F[low])
        self.format_LE[i, expert] = low
        for rank in np.flatnonzero(self.format_LER[i, expert] == before).tolist():
            self.format_LER[i, expert, rank] = low
            self.free_R[rank] += saved
        return saved

    def hold(self, held_LEM: BoolArray, members: Sequence[int]) -> None:
        """Hold other replicas in the end, each in the format of its expert; bytes and loads are not kept any more."""
        self.format_LER[:, :, members] = np.where(held_LEM, self.format_LE[:, :, None], -1)

    def placement(self) -> Placement:
        """What is held as a placement of all ranks."""
        before, stats = self._before, self._problem.stats
        layers = []
        for layer, format_ER in zip(before.layers, self.format_LER, strict=True):
            experts, ranks = np.nonzero(format_ER >= 0)
            formats = [self.names[name] for name in format_ER[experts, ranks].tolist()]
            replicas = map(Replica, ranks.tolist(), experts.tolist(), formats)
            after = LayerPlacement.even(layer.index, layer.num_experts, replicas, layer.replicas.mixed_formats)
            layers.append(layer if list(after.replicas) == list(layer.replicas) else after)
        bytes_R = bytes_by_rank(layers, before.topology.num_ranks, stats.expert_bytes)
        low_share = self.low_pairs() / int(self.pairs_LE.sum())
        return replace(
            before, layers=tuple(layers), bytes_R=tuple(bytes_R.tolist()),
            budget_bytes_R=self._problem.budget_bytes_R, low_precision_planned=low_share, certificate={},
        )  # fmt: skip

    def _give_up_busy_low_experts(self) -> None:
        """Let only those experts be in few bits whose pairs, the fewest first, fit the cap."""
        by_pairs = np.argsort(self.pairs_LE, axis=None, kind="stable")
        is_kept = np.cumsum(self.pairs_LE.ravel()[by_pairs]) <= self.max_low
        becomes_native_LE = self.format_LE > 0
        becomes_native_LE.ravel()[by_pairs[is_kept]] = False
        self.format_LE[becomes_native_LE] = 0
        self.format_LER[becomes_native_LE] = -1
