"""Static replicas first; what they cannot balance in a step travels, if it is worth it: `rq`, then lending as LLEP."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError, check_integer, check_number, check_text
from rq_ep.core.placement import LayerPlacement, Placement, PlacementProblem, Replicas
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.strategy import Planner
from rq_ep.core.topology import Topology
from rq_ep.solver.construct import solve
from rq_ep.solver.deal import nearest_first
from rq_ep.solver.split import SharedExperts, augment
from rq_ep.strategies.rq import ReplicateQuantize


@dataclass(frozen=True)
class ReplicateLend:
    """Places and splits as `rq`. Then the ranks that stay overloaded lend experts to the emptiest, one by one.

    With a cost of the layer, as many experts move as make the modelled step shortest, often none: what is saved is
    weighed against the transfers of the busiest link. Without one, LLEP's settings are applied to what the static
    replicas leave: nothing moves below `fallback_ratio`, and no expert for fewer than `min_tokens_per_gemm` pairs.
    """

    name: ClassVar[str] = "rq_llep"

    fallback_ratio: float = 1.3  # without a cost: max/mean after the static split below which nothing moves
    min_tokens_per_gemm: int = 1024  # without a cost: pairs for which an expert is worth moving
    max_borrowed: int = 4  # experts that a rank makes room for in a step
    transient_format: str | None = None  # that experts travel in; None: as they lie
    max_low_precision_share: float = 0.25  # of a step's pairs, computed in `transient_format`
    max_steps: int = 64  # as for `rq`
    max_moves: int = 3000  # as for `rq`

    def __post_init__(self) -> None:
        check_number("fallback_ratio", self.fallback_ratio)
        check_integer("min_tokens_per_gemm", self.min_tokens_per_gemm)
        check_integer("max_borrowed", self.max_borrowed)
        if self.transient_format is not None:
            check_text("transient_format", self.transient_format)
        check_number("max_low_precision_share", self.max_low_precision_share, 0, 1)
        check_integer("max_steps", self.max_steps, 1)
        check_integer("max_moves", self.max_moves)

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return solve(problem, self.name, self.max_steps, self.max_moves)

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        if cost is not None and self.transient_format is not None and self.transient_format not in cost.transfer_s:
            known = ", ".join(sorted(cost.transfer_s))
            raise UserError(f"transient_format {self.transient_format!r}: the machine's costs know {known}")
        replicas = layer.replicas
        static = ReplicateQuantize().planner(layer, topology, cost)
        lending = Lending.of(self, replicas, cost)

        def plan(counts_RE: IntArray) -> DispatchPlan:
            before = static(counts_RE)
            if before.bound == "bytes":
                return before
            fullest, total = int(before.loads_R.max()), int(before.loads_R.sum())
            if not lending.may_pay(fullest, total, topology.num_ranks):
                return before
            moved = lending.choose(before)
            if moved is None:
                return before
            transfers, quotas_E = moved
            together = _joined(replicas, transfers, lending.mixed_formats)
            shared = SharedExperts.of(together, topology.num_ranks)
            held = zip(shared.experts_C.tolist(), shared.ranks_C.tolist(), strict=True)
            quotas_C = np.array([quotas_E[expert][rank] for expert, rank in held], np.int64)
            pairs_RP = counts_RE[:, together.experts_P]
            pairs_RP[:, shared.replicas_C] = nearest_first(shared, counts_RE, quotas_C, topology)
            after = DispatchPlan(together, pairs_RP, transfers)
            if cost is not None and cost.step(after).layer_s >= cost.step(before).layer_s:
                return before
            return after

        return plan


Quotas = list[dict[int, int]]  # of each expert: rank -> pairs it computes


class Loan(NamedTuple):
    """Experts to lend, and who computes how much then."""

    step_s: float  # as estimated: the fullest rank and the busiest link
    transfers: list[WeightTransfer]
    quotas_E: Quotas
    is_cut_short: bool = False  # by the cap on low precision


@dataclass(frozen=True)
class Lending:
    """The tables of one layer, and the choice of what to lend in a step.

    Seconds stand in for a machine: with a cost they are modelled, without one a pair is the unit and a transfer free.
    """

    strategy: ReplicateLend
    num_experts: int
    formats: dict[tuple[int, int], str]  # (expert, rank) -> format of the resident replica
    pair_s: float
    transfer_s: dict[str, float]  # of the formats that may travel
    latency_s: float
    min_pairs: int  # that an expert must be able to take off the fullest ranks
    min_ratio: float
    mixed_formats: tuple[str, ...]  # of plans with borrowed experts
    holders_E: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, strategy: ReplicateLend, replicas: Replicas, cost: LayerCost | None) -> "Lending":
        stored = sorted(set(replicas.formats_P))
        low = strategy.transient_format
        mixed_formats = replicas.mixed_formats
        if low is not None and low not in mixed_formats:
            mixed_formats = (low, *(mixed_formats or (name for name in stored if name != low)))
        travelling = stored if low is None else [low, *stored]
        num_experts = int(replicas.experts_P.max()) + 1
        holders_E: list[list[int]] = [[] for _ in range(num_experts)]
        for rank, expert, _ in replicas:
            holders_E[expert].append(rank)
        pair_s = 1.0 if cost is None else max(cost.pair_s[name] for name in stored)
        transfer_s = {name: 0.0 if cost is None else cost.transfer_s[name] for name in travelling}
        return cls(
            strategy=strategy,
            num_experts=num_experts,
            formats={(expert, rank): name for rank, expert, name in replicas},
            pair_s=pair_s,
            transfer_s=transfer_s,
            latency_s=0.0 if cost is None else cost.latency_s,
            min_pairs=max(1, strategy.min_tokens_per_gemm if cost is None else 1),
            min_ratio=strategy.fallback_ratio if cost is None else 1.0,
            mixed_formats=mixed_formats,
            holders_E=holders_E,
        )

    def may_pay(self, fullest: int, total: int, num_ranks: int) -> bool:
        """Whether perfect balance by a single transfer would be worth it: if not, nothing is."""
        excess = fullest - -(-total // num_ranks)
        return (
            excess >= self.min_pairs
            and fullest * num_ranks >= self.min_ratio * total
            and excess * self.pair_s > min(self.transfer_s.values()) + self.latency_s
        )

    def choose(self, before: DispatchPlan) -> tuple[tuple[WeightTransfer, ...], Quotas] | None:
        """The experts to lend and everybody's pairs then; None if lending saves nothing."""
        loan = self._lend(before, has_low=self.strategy.transient_format is not None)
        if loan.is_cut_short:
            loan = min(loan, self._lend(before, has_low=False), key=lambda loan: loan.step_s)
        if not loan.transfers:
            return None
        kept = (transfer for transfer in loan.transfers if loan.quotas_E[transfer.expert][transfer.dst])
        return tuple(sorted(kept)), loan.quotas_E

    def _lend(self, before: DispatchPlan, has_low: bool) -> "Loan":
        """One expert after another goes to the emptiest rank: the one that has most pairs on the ranks which hold each
        other up (the cut that bounds the fullest one). Of the resulting steps the shortest is taken.
        """
        quotas_E: Quotas = [{} for _ in range(self.num_experts)]
        pairs_P = before.pairs_RP.sum(axis=0).tolist()
        for (rank, expert, _), pairs in zip(before.replicas, pairs_P, strict=True):
            quotas_E[expert][rank] = pairs
        loads = before.loads_R.tolist()
        total = sum(loads)
        mean = -(-total // len(loads))
        low_left = self.strategy.max_low_precision_share * total - self._resident_low(quotas_E)
        sent, received = [0.0] * len(loads), [0.0] * len(loads)
        num_borrowed = [0] * len(loads)
        transfers: list[WeightTransfer] = []
        best = Loan(max(loads) * self.pair_s, [], quotas_E)
        fullest, cut = augment(quotas_E, loads, mean)
        while fullest > mean:
            helpers = [rank for rank in range(len(loads)) if num_borrowed[rank] < self.strategy.max_borrowed]
            helper = min(helpers, key=lambda rank: (loads[rank], rank), default=None)
            if helper is None:
                break
            expert, movable = _most_confined(quotas_E, cut, helper)
            amount = min(movable, mean - loads[helper])
            if amount < self.min_pairs:
                break
            is_low = has_low and self._lent_low(quotas_E, transfers) + amount <= low_left
            transfer = self._transfer(expert, helper, sent, is_low)
            sent[transfer.src] += self.transfer_s[transfer.format]
            received[helper] += self.transfer_s[transfer.format]
            moved_s = max(*sent, *received) + self.latency_s
            if mean * self.pair_s + moved_s >= best.step_s and moved_s:
                break
            num_borrowed[helper] += 1
            transfers.append(transfer)
            quotas_E[expert][helper] = 0
            fullest, cut = augment(quotas_E, loads, mean)
            if has_low and self._lent_low(quotas_E, transfers) > max(low_left, 0):
                return best._replace(is_cut_short=True)
            if fullest * self.pair_s + moved_s < best.step_s:
                best = Loan(fullest * self.pair_s + moved_s, list(transfers), [dict(pairs) for pairs in quotas_E])
        return best

    def _transfer(self, expert: int, dst: int, sent: Sequence[float], is_low: bool) -> WeightTransfer:
        """From the holder that has sent least so far."""
        src = min(self.holders_E[expert], key=lambda rank: (sent[rank], rank))
        format_ = self.formats[expert, src]
        if is_low and self.strategy.transient_format is not None:
            format_ = self.strategy.transient_format
        return WeightTransfer(expert, src, dst, format_)

    def _resident_low(self, quotas_E: Quotas) -> int:
        """Pairs whose replicas lie in the transient format anyway."""
        low = self.strategy.transient_format
        return sum(quotas_E[expert][rank] for (expert, rank), name in self.formats.items() if name == low)

    def _lent_low(self, quotas_E: Quotas, transfers: Sequence[WeightTransfer]) -> int:
        """Pairs of experts that travel in another format than they lie in."""
        return sum(
            quotas_E[transfer.expert][transfer.dst]
            for transfer in transfers
            if transfer.format != self.formats[transfer.expert, transfer.src]
        )


def _most_confined(quotas_E: Quotas, cut: Sequence[int], helper: int) -> tuple[int, int]:
    """The expert with most pairs on the ranks of the cut, of those the helper lacks, and how many these are."""
    inside = set(cut)
    most, found = 0, 0
    for expert, by_rank in enumerate(quotas_E):
        if helper not in by_rank:
            pairs = sum(pairs for rank, pairs in by_rank.items() if rank in inside)
            if pairs > most:
                most, found = pairs, expert
    return found, most


def _joined(replicas: Replicas, transfers: Sequence[WeightTransfer], mixed_formats: tuple[str, ...]) -> Replicas:
    """Resident and borrowed replicas together."""
    ranks_P = np.concatenate([replicas.ranks_P, np.array([transfer.dst for transfer in transfers], np.int64)])
    experts_P = np.concatenate([replicas.experts_P, np.array([transfer.expert for transfer in transfers], np.int64)])
    formats = [*replicas.formats_P, *(transfer.format for transfer in transfers)]
    order_P = np.lexsort((experts_P, ranks_P))
    return Replicas(ranks_P[order_P], experts_P[order_P], tuple(formats[p] for p in order_P.tolist()), mixed_formats)
