"""What to lend for one step: experts for the emptiest ranks, so that overloaded ones can pass pairs on."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rq_ep.core.cost import LayerCost
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replicas

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

    With a cost seconds are modelled; without one a pair takes one second, a transfer none, and thresholds decide.
    """

    num_experts: int
    max_borrowed: int  # experts that a rank makes room for
    transient_format: str | None
    max_low_precision_share: float  # of the step's pairs, computed in `transient_format`
    formats: dict[tuple[int, int], str]  # (expert, rank) -> format of the resident replica
    pair_s: float
    transfer_s: dict[str, float]  # of the formats that may travel
    latency_s: float
    min_pairs: int  # that an expert must be able to take off the fullest ranks
    min_ratio: float
    mixed_formats: tuple[str, ...]  # of plans with borrowed experts
    holders_E: list[list[int]]

    @classmethod
    def of(
        cls,
        replicas: Replicas,
        cost: LayerCost | None,
        *,
        max_borrowed: int,
        transient_format: str | None,
        max_low_precision_share: float,
        min_pairs: int,
        min_ratio: float,
    ) -> "Lending":
        """The tables of a layer; `min_pairs` and `min_ratio` are thresholds for want of a cost."""
        stored = sorted(set(replicas.formats_P))
        low = transient_format
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
            num_experts=num_experts,
            max_borrowed=max_borrowed,
            transient_format=transient_format,
            max_low_precision_share=max_low_precision_share,
            formats={(expert, rank): name for rank, expert, name in replicas},
            pair_s=pair_s,
            transfer_s=transfer_s,
            latency_s=0.0 if cost is None else cost.latency_s,
            min_pairs=max(1, min_pairs if cost is None else 1),
            min_ratio=min_ratio if cost is None else 1.0,
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
        loan = self._lend(before, has_low=self.transient_format is not None)
        if loan.is_cut_short:
            loan = min(loan, self._lend(before, has_low=False), key=lambda loan: loan.step_s)
        if not loan.transfers:
            return None
        kept = (transfer for transfer in loan.transfers if loan.quotas_E[transfer.expert][transfer.dst])
        return tuple(sorted(kept)), loan.quotas_E

    def _lend(self, before: DispatchPlan, has_low: bool) -> Loan:
        """Lend one expert after another, as long as that may shorten the step, and return the shortest.

        The emptiest rank borrows, and always the expert with most pairs on the ranks that hold each other up: the cut
        which bounds the fullest one. After each loan paths of replicas carry pairs to where room has become.
        """
        quotas_E: Quotas = [{} for _ in range(self.num_experts)]
        pairs_P = before.pairs_RP.sum(axis=0).tolist()
        for (rank, expert, _), pairs in zip(before.replicas, pairs_P, strict=True):
            quotas_E[expert][rank] = pairs
        loads = before.loads_R.tolist()
        total = sum(loads)
        mean = -(-total // len(loads))
        low_left = self.max_low_precision_share * total - self._resident_low(quotas_E)
        sent, received = [0.0] * len(loads), [0.0] * len(loads)
        num_borrowed = [0] * len(loads)
        transfers: list[WeightTransfer] = []
        best = Loan(max(loads) * self.pair_s, [], quotas_E)
        fullest, cut = _augment(quotas_E, loads, mean)
        while fullest > mean:
            helpers = [rank for rank in range(len(loads)) if num_borrowed[rank] < self.max_borrowed]
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
            fullest, cut = _augment(quotas_E, loads, mean)
            if has_low and self._lent_low(quotas_E, transfers) > max(low_left, 0):
                return best._replace(is_cut_short=True)
            if fullest * self.pair_s + moved_s < best.step_s:
                best = Loan(fullest * self.pair_s + moved_s, list(transfers), [dict(pairs) for pairs in quotas_E])
        return best

    def _transfer(self, expert: int, dst: int, sent: Sequence[float], is_low: bool) -> WeightTransfer:
        """From the holder that has sent least so far."""
        src = min(self.holders_E[expert], key=lambda rank: (sent[rank], rank))
        format_ = self.formats[expert, src]
        if is_low and self.transient_format is not None:
            format_ = self.transient_format
        return WeightTransfer(expert, src, dst, format_)

    def _resident_low(self, quotas_E: Quotas) -> int:
        """Pairs whose replicas lie in the transient format anyway."""
        low = self.transient_format
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


def _augment(quotas: Sequence[dict[int, int]], loads: list[int], target: int) -> tuple[int, tuple[int, ...]]:
    """Push pairs along shortest chains of replicas until no rank exceeds `target`; raise it where a cut proves it low.

    Changes `quotas` and `loads`; returns the target in the end and the cut that proves it.
    """
    cut = tuple(range(len(loads)))
    over = [rank for rank, load in enumerate(loads) if load > target]
    if not over:
        return target, cut
    held: list[list[dict[int, int]]] = [[] for _ in loads]
    for by_rank in quotas:
        for rank in by_rank:
            held[rank].append(by_rank)
    while over:
        came_from: dict[int, tuple[int, dict[int, int]] | None] = dict.fromkeys(over)
        found = _nearest_below(held, loads, target, came_from)
        if found is None:
            cut = tuple(sorted(came_from))
            target = -(-sum(loads[rank] for rank in cut) // len(cut))
        else:
            _push(came_from, found, loads, target)
        over = [rank for rank in over if loads[rank] > target]
    return target, cut


def _nearest_below(
    held: list[list[dict[int, int]]],
    loads: list[int],
    target: int,
    came_from: dict[int, tuple[int, dict[int, int]] | None],
) -> int | None:
    """Breadth first from the ranks in `came_from`, which grows, to a rank below `target`; None if there is none."""
    queue = deque(came_from)
    while queue:
        rank = queue.popleft()
        for by_rank in held[rank]:
            if by_rank[rank]:
                for other in by_rank:
                    if other not in came_from:
                        came_from[other] = (rank, by_rank)
                        if loads[other] < target:
                            return other
                        queue.append(other)
    return None


def _push(came_from: dict[int, tuple[int, dict[int, int]] | None], found: int, loads: list[int], target: int) -> None:
    """Move as many pairs as fit along the chain that ends in `found`."""
    chain = []
    rank = found
    while (step := came_from[rank]) is not None:
        chain.append((step[0], rank, step[1]))
        rank = step[0]
    amount = min(loads[rank] - target, target - loads[found], *(by_rank[source] for source, _, by_rank in chain))
    for source, destination, by_rank in chain:
        by_rank[source] -= amount
        by_rank[destination] += amount
    loads[rank] -= amount
    loads[found] += amount
